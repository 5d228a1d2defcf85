"""Inputs with labels, in their usual forms, as a uniform sequence of batches; and a model's outputs for them.

=======================================================  ===========================================================
argument                                                 content
=======================================================  ===========================================================
``(inputs, labels)``, or ``inputs`` without labels       tensors [n, ...] and [n]
a ``DataLoader``, or any iterable of such pairs that     batches of any size, which are regrouped
can be iterated more than once
a list of training samples                               dictionaries of ``input_ids`` and ``labels`` [time], see
                                                         ``lamella.train.pairs``: sequences for a decoder
=======================================================  ===========================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from lamella.errors import CalibrationError, MethodError, NumericsError

Sample = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor | None]
Data = Tensor | Pair | Sequence[Sample] | Iterable[Pair]
LabelledBatch = Pair | Sequence[Sample]
Order = Literal["given", "by class", "shuffled"]
NO_LABEL = -100


def batches(data: Data, size: int, order: Order = "given", seed: int = 0) -> Iterator[LabelledBatch]:
    """Yield the data in batches of ``size``; the last one may be smaller.

    Args:
        data: see the table of this module.
        size: number of samples in a batch.
        order: as ``given``; sorted ``by class``, so that nearly all batches have one class; or ``shuffled``.
        seed: random seed of the shuffling.

    Raises:
        MethodError: for an order that is not possible for these data.
        CalibrationError: if inputs and labels differ in number.
    """
    if isinstance(data, Tensor):
        data = (data, None)
    if is_pair(data):
        inputs, labels = data
        if labels is not None and len(labels) != len(inputs):
            raise CalibrationError(f"{len(inputs)} inputs have {len(labels)} labels: give one for each")
        indices = _indices(len(inputs), order, seed, labels)
        for chosen in indices.split(size) if len(indices) else ():
            yield inputs[chosen], None if labels is None else labels[chosen]
    elif are_samples(data):
        for chosen in _indices(len(data), order, seed, None).split(size):
            yield [data[index] for index in chosen.tolist()]
    else:
        if order != "given":
            raise MethodError(f"order '{order}' needs all data at once: give (inputs, labels) instead of a loader")
        yield from _regrouped(data, size)


def count(data: Data) -> int | None:
    """Return the number of samples; None if it is unknown before iterating over the data."""
    if isinstance(data, Tensor) or are_samples(data):
        return len(data)
    return len(data[0]) if is_pair(data) else None


def is_pair(data: Any) -> TypeIs[Pair]:
    """Return whether these are (inputs, labels) in tensors."""
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def are_samples(data: Any) -> TypeIs[Sequence[Sample]]:
    """Return whether these are sequences for a decoder."""
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], Mapping)


def _indices(count: int, order: Order, seed: int, labels: Tensor | None) -> Tensor:
    if order == "given":
        return torch.arange(count)
    if order == "shuffled":
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if order != "by class":
        raise MethodError(f"order '{order}': choose given, by class or shuffled")
    if labels is None:
        raise MethodError("order 'by class' needs data with one label each: give (inputs, labels)")
    return labels.cpu().argsort(stable=True)


def _regrouped(loader: Any, size: int) -> Iterator[Pair]:
    inputs: Tensor | None = None
    labels: Tensor | None = None
    for item in loader:
        x, y = (item, None) if isinstance(item, Tensor) else (item[0], item[1] if len(item) > 1 else None)
        inputs = x if inputs is None else torch.cat([inputs, x])
        labels = y if labels is None or y is None else torch.cat([labels, y])
        while len(inputs) >= size:
            yield inputs[:size], None if labels is None else labels[:size]
            inputs, labels = inputs[size:], None if labels is None else labels[size:]
    if inputs is not None and len(inputs):
        yield inputs, labels


def content(batch: LabelledBatch) -> bytes:
    """Return the content of a batch as bytes, to be hashed."""
    if is_pair(batch):
        tensors = [tensor for tensor in batch if isinstance(tensor, Tensor)]
    else:
        tensors = [sample[name] for sample in batch for name in ("input_ids", "labels")]
    return b"".join(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for each in tensors)


def check_disjoint(forget: Data, retain: Data) -> None:
    """Check that no sample is to be both forgotten and retained.

    Args:
        forget: data to forget.
        retain: data to retain.

    Raises:
        CalibrationError: if a sample is in both.
    """
    forgotten = {row: index for index, row in enumerate(_hashes(forget))}
    both = [(forgotten[row], index) for index, row in enumerate(_hashes(retain)) if row in forgotten]
    if both:
        raise CalibrationError(
            f"{len(both)} samples are to be forgotten and retained at once, such as forget {both[0][0]} = retain "
            f"{both[0][1]}: take them out of one of the two"
        )


def _hashes(data: Data) -> Iterator[bytes]:
    for batch in batches(data, 1):
        yield hashlib.sha256(content(batch)).digest()


def outputs(model: nn.Module, batch: LabelledBatch, first: int = 0) -> list[tuple[Tensor, Tensor | None]]:
    """Return a model's outputs for a batch: logits [positions, classes] with their labels [positions].

    Pairs of tensors yield one entry, in which each sample is one position; each sequence yields an entry of its own,
    whose positions are those that predict a label.

    Args:
        model: the model.
        batch: the batch.
        first: number of samples before this batch, for messages.

    Raises:
        CalibrationError: for a label or a token that the model does not have.
        NumericsError: for inputs that are not finite.
    """
    device = next(model.parameters()).device
    if is_pair(batch):
        inputs, labels = batch
        _check_finite(inputs, first)
        logits = _logits(model(inputs.to(device)))
        labels = None if labels is None else labels.to(device)
        _check_labels(labels, logits.shape[-1], first)
        return [(logits, labels)]
    found: list[tuple[Tensor, Tensor | None]] = []
    for index, sample in enumerate(batch, first):
        ids = sample["input_ids"].to(device)
        get_embedding: Any = getattr(model, "get_input_embeddings", None)
        embedding = get_embedding() if get_embedding else None
        if embedding is not None and (len(ids) < 2 or int(ids.max()) >= len(embedding.weight)):
            raise CalibrationError(
                f"sample {index} has {len(ids)} tokens up to {int(ids.max()) if len(ids) else 0}: at least 2 are "
                f"needed, from the {len(embedding.weight)} of the model's vocabulary"
            )
        logits = _logits(model(input_ids=ids[None], use_cache=False))[0, :-1]
        labels = sample["labels"].to(device)[1:]
        carries = labels != NO_LABEL
        if not carries.any():
            raise CalibrationError(f"sample {index} has no token with a label: give a response")
        _check_labels(labels[carries], logits.shape[-1], index)
        found.append((logits[carries], labels[carries]))
    return found


def _logits(output: Any) -> Tensor:
    if isinstance(output, tuple | list):
        return output[0]
    return output.logits if hasattr(output, "logits") else output


def _check_finite(inputs: Tensor, first: int) -> None:
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        bad = int((~torch.isfinite(inputs.flatten(1))).any(1).nonzero()[0])
        raise NumericsError(f"sample {first + bad} has inputs that are not finite: clean the data")


def _check_labels(labels: Tensor | None, classes: int, first: int) -> None:
    if labels is None or labels.is_floating_point() or labels.ndim != 1:
        return
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise CalibrationError(
            f"label {int(labels[index])} of sample {first + index} is out of range: the model has the outputs 0 to "
            f"{classes - 1}"
        )
