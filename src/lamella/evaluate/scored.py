"""The positions of a batch that carry labels, and what a model's final states there are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lamella.data import ImageText, Samples
from lamella.data.samples import NO_LOSS, collate
from lamella.runtime import phase_options
from lamella.stack import Stack, last_stack


def scored_states(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The final states that predict a label [positions, hidden], and those labels [positions], rows joined.

    Args:
        model: a model or a view. A view runs as it is served: each row's first ``prompt_lengths`` columns are prompt.
        batch: ``input_ids``, ``labels`` and ``prompt_lengths``, and what the model takes beside them, such as images.
            Of an encoder-decoder, the encoder reads ``input_ids`` and the decoder writes ``labels``; its prompt is its
            start token.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return _decoded_states(model, batch)
    options = phase_options(model, batch["prompt_lengths"])
    states = last_stack(model).hidden(read_inputs(model, batch), **options)[:, :-1]  # the last one predicts nothing
    labels = batch["labels"][:, 1:]
    carries = labels != NO_LOSS
    return states[carries], labels[carries]


def _decoded_states(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The same of an encoder-decoder, whose decoder begins with its start token and sees the labels before each."""
    encoder, decoder = Stack(model, stack="encoder"), Stack(model, stack="decoder")
    labels, inputs = batch["labels"], read_inputs(model, batch)
    begun = {"decoder_input_ids": _begun(model, labels), "use_cache": False}
    begun |= phase_options(model, labels.new_ones(len(labels)))  # the start token is the prompt
    if encoder.architecture.images:  # what puts images between the tokens runs both
        states = model.get_submodule(encoder.architecture.front)(**inputs, **begun).last_hidden_state
    else:
        read, mask = encoder.hidden(inputs), batch["attention_mask"]
        begun["input_ids"] = begun.pop("decoder_input_ids")
        states = decoder.hidden({"encoder_hidden_states": read, "encoder_attention_mask": mask}, **begun)
    carries = labels != NO_LOSS
    return states[carries], labels[carries]


def _begun(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads to write these labels: its start token, then each of them but the last [batch, time]."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):  # mBART starts with the language that labels end with
        begun: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        return begun
    config = model.config.get_text_config()
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == NO_LOSS, config.pad_token_id)], dim=1)


def labelled_batches(
    rows: Samples | ImageText, size: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Samples of text, or rows of images with text, so many in a batch, on a device."""
    if isinstance(rows, ImageText):
        batches: Iterable[Mapping[str, Tensor]] = rows.batches(size)
    else:
        batches = (collate(rows[start : start + size]) for start in range(0, len(rows), size))
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}


def last_answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same batch, in which of conversations the last answer alone has labels."""
    labels, lengths = batch["labels"], batch["prompt_lengths"]
    in_prompt = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
    return {**batch, "labels": labels.masked_fill(in_prompt, NO_LOSS)}


def read_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a batch the model's own forward takes, but its labels."""
    kind: Any = type(model)
    takes = _parameters(kind) | {"input_ids", "attention_mask"}
    return {name: each for name, each in batch.items() if name in takes and name != "labels"}


@cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
