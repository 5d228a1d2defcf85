"""Exact-match answers of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamella.data import ImageText
from lamella.data.samples import NO_LOSS
from lamella.evaluate.scored import last_answers, scored_states
from lamella.stack import last_stack


@torch.no_grad()
def answered(model: Any, rows: ImageText, batch: int = 32) -> Tensor:
    """Return which rows a model answers word for word with greedy decoding.

    One forward pass over prompt and answer suffices: greedy decoding generates the answer if and only if each of its
    tokens is the most likely one after those before it.

    Args:
        model: a model or a view.
        rows: the rows; of a conversation, the last answer counts.
        batch: rows per forward pass.

    Returns:
        [rows] bool.
    """
    device, stack = next(model.parameters()).device, last_stack(model)
    found = []
    for given in rows.batches(batch):
        each = {name: values.to(device) for name, values in last_answers(given).items()}
        states, labels = scored_states(model, each)
        wrong = stack.logits(states).argmax(-1) != labels
        row = (each["labels"] != NO_LOSS).nonzero()[:, 0]
        errors = torch.zeros(len(each["labels"]), device=device).index_add(0, row, wrong.float())
        found.append(errors == 0)
    return torch.cat(found).cpu()
