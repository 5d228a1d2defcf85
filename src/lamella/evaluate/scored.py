"""The labelled positions of a batch, and a model's final states there."""

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
    """Return the final states that predict a label [positions, hidden] and those labels [positions], of all rows.

    Args:
        model: a model or a view. A view runs as in generation: each row's first ``prompt_lengths`` columns are prompt.
        batch: ``input_ids``, ``labels`` and ``prompt_lengths``, and further inputs of the model, such as images. In an
            encoder-decoder, the encoder reads ``input_ids`` and the decoder predicts ``labels``; its prompt is its
            start token.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return _decoded_states(model, batch)
    options = phase_options(model, batch["prompt_lengths"])
    states = last_stack(model).hidden(read_inputs(model, batch), **options)[
        :, :-1
    ]  # the last position predicts no label
    labels = batch["labels"][:, 1:]
    labelled = labels != NO_LOSS
    return states[labelled], labels[labelled]


def _decoded_states(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the same for an encoder-decoder, whose decoder reads its start token and the preceding labels."""
    encoder, decoder = Stack(model, stack="encoder"), Stack(model, stack="decoder")
    labels, inputs = batch["labels"], read_inputs(model, batch)
    inputs_of_decoder = {"decoder_input_ids": _decoder_inputs(model, labels), "use_cache": False}
    inputs_of_decoder |= phase_options(model, labels.new_ones(len(labels)))  # the start token is the prompt
    if encoder.architecture.images:  # the module that inserts images between the tokens runs both
        states = model.get_submodule(encoder.architecture.front)(**inputs, **inputs_of_decoder).last_hidden_state
    else:
        read, mask = encoder.hidden(inputs), batch["attention_mask"]
        inputs_of_decoder["input_ids"] = inputs_of_decoder.pop("decoder_input_ids")
        states = decoder.hidden({"encoder_hidden_states": read, "encoder_attention_mask": mask}, **inputs_of_decoder)
    labelled = labels != NO_LOSS
    return states[labelled], labels[labelled]


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Return the decoder inputs for these labels: its start token, then all of them but the last [batch, time]."""
    if hasattr(
        model, "prepare_decoder_input_ids_from_labels"
    ):  # mBART's decoder starts with the language token at the end of the labels
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        return shifted
    config = model.config.get_text_config()
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == NO_LOSS, config.pad_token_id)], dim=1)


def labelled_batches(
    rows: Samples | ImageText, size: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of samples of text, or of rows of images with text, on a device.

    Args:
        rows: samples of text, or images with text.
        size: rows per batch.
        device: device of the batches.
    """
    if isinstance(rows, ImageText):
        batches: Iterable[Mapping[str, Tensor]] = rows.batches(size)
    else:
        batches = (collate(rows[start : start + size]) for start in range(0, len(rows), size))
    for batch in batches:
        yield {name: value.to(device) for name, value in batch.items()}


def last_answers(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same batch, with labels only on the last answer of each conversation."""
    labels, lengths = batch["labels"], batch["prompt_lengths"]
    in_prompt = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
    return {**batch, "labels": labels.masked_fill(in_prompt, NO_LOSS)}


def read_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parts of a batch that the model's own forward accepts, except for labels.

    Args:
        model: a transformers model.
        batch: tensors by name.
    """
    kind: Any = type(model)
    accepted = _parameters(kind) | {"input_ids", "attention_mask"}
    return {name: each for name, each in batch.items() if name in accepted and name != "labels"}


@cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
