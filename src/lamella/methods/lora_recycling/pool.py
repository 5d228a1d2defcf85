"""The pool: other people's adapters in a folder, and which of them can be used with a model.

Adapters are read as safetensors alone and one at a time, since a pool may be larger than the memory. Whatever is more
than plain LoRA for a causal model is refused with its reason, and so are adapters with values that are not finite, of
other shapes or weights, and those that do nearly nothing or far too much, by sqrt(sum_m |s B A|_F^2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import CheckpointError, LamellaError, MethodError
from lamella.methods.lora_recycling.choosing import norm
from lamella.reading import parse_json
from lamella.signature import Fixture
from lamella.stack import Stack
from lamella.train import Adapter
from lamella.train.adapters import CONFIG, TENSORS, check_fits

PICKLED = "adapter_model.bin"
RANDOM = re.compile(r"random(?::count=(\d+),r=(\d+))?")
TASKS = ("CAUSAL_LM", None)
SHOWN = 3  # reasons in a message


@dataclass(frozen=True)
class Members:
    """The adapters of a pool that a model can use.

    Attributes:
        norms: total scaled norm of each, by name.
        refused: why each of the others cannot be used.
        load: gives a member by name, with the model's own names of its modules.
    """

    norms: Mapping[str, float]
    refused: Mapping[str, str]
    load: Callable[[str], Adapter]

    def take(self, names: list[str]) -> list[Adapter]:
        return [self.load(name) for name in names]


@dataclass(frozen=True)
class Pool:
    """Adapters by name.

    Attributes:
        names: of all, also of those that turn out to be of no use.
        load: gives one by name, for a model.
        bounds: the total scaled norms that are of use: above the first, and up to the second.
        source: where they come from, for provenance.
    """

    names: tuple[str, ...]
    load: Callable[[str, Stack], Adapter]
    bounds: tuple[float, float] = (1.0, 1000.0)
    source: Mapping[str, Any] = field(default_factory=dict)

    metavar: ClassVar[str] = "FOLDER"
    source_help: ClassVar[str] = (
        "a folder with LoRA adapters as peft saves them, each in a folder of its own; or random:count=20,r=8, adapters "
        "with random weights"
    )
    example: ClassVar[Fixture] = Fixture("random:count=4,r=2")

    @classmethod
    def open(cls, name: str | Path, *, least_norm: float = 1.0, most_norm: float = 1000.0) -> Pool:
        """Find the adapters of a folder, at any depth.

        Args:
            name: the folder, or ``random:count=20,r=8``.
            least_norm: adapters of this total scaled norm or less do nearly nothing and are refused; the paper's 1.
            most_norm: those above it are refused; the paper's 1000.

        Raises:
            CheckpointError: for a folder that is missing or holds no adapter.
        """
        bounds = (least_norm, most_norm)
        if drawn := RANDOM.fullmatch(str(name)):
            count, rank = int(drawn[1] or 20), int(drawn[2] or 8)
            names = tuple(f"random-{number}" for number in range(count))
            return cls(names, partial(_random, rank=rank), bounds, {"data": "random", "count": count, "r": rank})
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{name} is no folder: give one with LoRA adapters, each in a folder of its own")
        places = sorted(file.parent for file in folder.rglob(CONFIG))
        if not places:
            raise CheckpointError(f"{name} holds no {CONFIG}: give a folder with LoRA adapters, as peft saves them")
        found = {str(place.relative_to(folder)) if place != folder else folder.name: place for place in places}
        source = {"data": str(name), "count": len(found), "bytes": sum(map(_size, places))}
        return cls(tuple(found), partial(_from_folder, found), bounds, source)

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter], *, least_norm: float = 0.0, most_norm: float = 1000.0) -> Pool:
        """A pool in memory."""
        return cls(tuple(adapters), lambda name, stack: adapters[name], (least_norm, most_norm))

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        return {**self.source, "names": list(self.names), "norms": list(self.bounds)}

    def members(self, stack: Stack) -> Members:
        """Which of them a model can use; each is read once.

        Raises:
            MethodError: when there is none, with the reasons.
        """
        norms, refused = {}, {}
        for name in self.names:
            try:
                norms[name] = self._checked(name, stack)
            except LamellaError as error:
                refused[name] = str(error)
        if not norms:
            reasons = "; ".join(list(dict.fromkeys(refused.values()))[:SHOWN])
            raise MethodError(f"none of the {len(self.names)} adapters of the pool can be used: {reasons}")
        return Members(norms, refused, lambda name: fitting(self.load(name, stack), stack))

    def _checked(self, name: str, stack: Stack) -> float:
        """The total scaled norm of a member that can be used."""
        adapter = fitting(self.load(name, stack), stack)
        for module, pair in adapter.pairs.items():
            if not all(torch.isfinite(half).all() for half in pair):
                raise CheckpointError(f"{module} has values that are not finite")
        check_fits(stack, adapter)
        size, (low, high) = norm(adapter), self.bounds
        if not low < size <= high:
            raise CheckpointError(f"its total scaled norm is {size:.3g}, not in ({low:g}, {high:g}]")
        return size


def fitting(adapter: Adapter, stack: Stack) -> Adapter:
    """The same adapter with the model's own names of its modules; what adapts the head is left out.

    Checkpoints of one model differ in what stands before ``layers.``, so names are compared from there on.

    Raises:
        CheckpointError: when nothing is left.
    """
    head, _, last = stack.architecture.prefix.rstrip(".").rpartition(".")
    pairs, scales = {}, {}
    for name, pair in adapter.pairs.items():
        _, found, inside = f".{name}".rpartition(f".{last}.")
        if found:
            ours = f"{head}.{last}.{inside}" if head else f"{last}.{inside}"
            pairs[ours], scales[ours] = pair, adapter.scales[name]
        elif not name.endswith(("lm_head", "embed_out")):
            raise CheckpointError(f"{name} is no module in the layers of {stack.name}")
    if not pairs:
        raise CheckpointError("it adapts the head alone")
    return replace(adapter, pairs=pairs, scales=scales)


def _from_folder(places: Mapping[str, Path], name: str, stack: Stack) -> Adapter:
    place = places[name]
    if not (place / TENSORS).is_file() and (place / PICKLED).is_file():
        raise CheckpointError(f"{PICKLED} is pickled, which can run code: only {TENSORS} is read")
    adapter = Adapter.open(place)
    task = parse_json((place / CONFIG).read_bytes()).get("task_type")
    if task not in TASKS:
        raise CheckpointError(f"{place / CONFIG}: task_type is {task}, not CAUSAL_LM")
    return adapter


def _random(name: str, stack: Stack, *, rank: int) -> Adapter:
    """An adapter in all layers with |D_m|^2 of about its rank in each module."""
    generator = torch.Generator().manual_seed(int(name.rpartition("-")[2]))
    pairs, transposed = {}, False
    for module, each in stack.model.named_modules():
        if module.startswith(stack.architecture.prefix) and isinstance(each, nn.Linear | Conv1D):
            transposed = isinstance(each, Conv1D)
            outs, ins = reversed(each.weight.shape) if transposed else each.weight.shape
            a = torch.randn(rank, ins, generator=generator) / ins**0.5
            pairs[module] = (a, torch.randn(outs, rank, generator=generator) / outs**0.5)
    return Adapter(pairs, dict.fromkeys(pairs, 1.0), transposed)


def _size(place: Path) -> int:
    file = place / TENSORS
    return file.stat().st_size if file.is_file() else 0
