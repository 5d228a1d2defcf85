"""The pool: a folder of existing adapters, and the check of which can be used with a model.

Only safetensors are read, one module of one adapter at a time, because a pool may be larger than the memory. Everything
beyond plain LoRA for a causal model is rejected with a reason, and so are adapters with non-finite values, with other
shapes or weights, and those with a negligible or excessive total norm sqrt(sum_m |s B A|_F^2).
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
from lamella.methods.lora_recycling.merging import module_seed
from lamella.reading import parse_json
from lamella.signature import Fixture
from lamella.stack import Stack
from lamella.train import Adapter
from lamella.train.adapters import CONFIG, TENSORS, LazyPairs, Pair, check_fits

PICKLED = "adapter_model.bin"
RANDOM = re.compile(r"random(?::count=(\d+),r=(\d+))?")
TASKS = ("CAUSAL_LM", None)
SHOWN = 3  # maximum number of reasons in a message


@dataclass(frozen=True)
class Members:
    """The adapters of a pool that a model can use.

    Attributes:
        norms: total scaled norm of each, by name.
        refused: reason for rejecting each of the others.
        load: opens a member by name, with the model's own module names; its factors are loaded on access.
    """

    norms: Mapping[str, float]
    refused: Mapping[str, str]
    load: Callable[[str], Adapter]

    def take(self, names: list[str]) -> list[Adapter]:
        """Open members by name."""
        return [self.load(name) for name in names]


@dataclass(frozen=True)
class AdapterPool:
    """Adapters by name.

    Attributes:
        names: names of all adapters, including unusable ones.
        load: opens one by name, for a model.
        bounds: range of usable total scaled norms: above the first, and up to the second.
        source: origin, for provenance.
    """

    names: tuple[str, ...]
    load: Callable[[str, Stack], Adapter]
    bounds: tuple[float, float] = (1.0, 1000.0)
    source: Mapping[str, Any] = field(default_factory=dict)

    metavar: ClassVar[str] = "FOLDER"
    source_help: ClassVar[str] = (
        "a folder with LoRA adapters as saved by peft, each in its own folder; or random:count=20,r=8, adapters "
        "with random weights"
    )
    example: ClassVar[Fixture] = Fixture("random:count=4,r=2")

    @classmethod
    def open(cls, name: str | Path, *, least_norm: float = 1.0, most_norm: float = 1000.0) -> AdapterPool:
        """Find the adapters in a folder, at any depth.

        Args:
            name: the folder, or ``random:count=20,r=8``.
            least_norm: adapters with at most this total scaled norm are rejected as negligible; the paper's 1.
            most_norm: adapters above this norm are rejected; the paper's 1000.

        Returns:
            The pool.

        Raises:
            CheckpointError: for a folder that is missing or holds no adapter.
        """
        bounds = (least_norm, most_norm)
        if match := RANDOM.fullmatch(str(name)):
            count, rank = int(match[1] or 20), int(match[2] or 8)
            names = tuple(f"random-{number}" for number in range(count))
            return cls(names, partial(_random, rank=rank), bounds, {"data": "random", "count": count, "r": rank})
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{name} is not a folder: give a folder with LoRA adapters, each in its own folder")
        places = sorted(file.parent for file in folder.rglob(CONFIG))
        if not places:
            raise CheckpointError(f"{name} holds no {CONFIG}: give a folder with LoRA adapters as saved by peft")
        found = {str(path.relative_to(folder)) if path != folder else folder.name: path for path in places}
        source = {"data": str(name), "count": len(found), "bytes": sum(map(_size, places))}
        return cls(tuple(found), partial(_from_folder, found), bounds, source)

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter], *, least_norm: float = 0.0, most_norm: float = 1000.0) -> AdapterPool:
        """Create a pool from adapters in memory.

        Args:
            adapters: adapters by name.
            least_norm: lower bound of the total scaled norm.
            most_norm: upper bound of the total scaled norm.
        """
        return cls(tuple(adapters), lambda name, stack: adapters[name], (least_norm, most_norm))

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        return {**self.source, "names": list(self.names), "norms": list(self.bounds)}

    def members(self, stack: Stack) -> Members:
        """Check which adapters a model can use.

        Raises:
            MethodError: if there is none, with the reasons.
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
        return Members(norms, refused, lambda name: fit_names(self.load(name, stack), stack))

    def _checked(self, name: str, stack: Stack) -> float:
        """Check an adapter and return its total scaled norm."""
        adapter = fit_names(self.load(name, stack), stack)
        for module, pair in adapter.pairs.items():
            if not all(torch.isfinite(half).all() for half in pair):
                raise CheckpointError(f"{module} has values that are not finite")
        check_fits(stack, adapter)
        size, (low, high) = norm(adapter), self.bounds
        if not low < size <= high:
            raise CheckpointError(f"its total scaled norm {size:.3g} is outside ({low:g}, {high:g}]")
        return size


def fit_names(adapter: Adapter, stack: Stack) -> Adapter:
    """Rename the modules of an adapter to the model's own names; updates of the head are dropped.

    Checkpoints of one model differ in the prefix before ``layers.``, so only the names after it are compared.

    Args:
        adapter: the adapter.
        stack: the model.

    Raises:
        CheckpointError: if nothing remains.
    """
    head, _, last = stack.architecture.prefix.rstrip(".").rpartition(".")
    names = {}
    for name in adapter.modules:
        _, found, inside = f".{name}".rpartition(f".{last}.")
        if found:
            names[f"{head}.{last}.{inside}" if head else f"{last}.{inside}"] = name
        elif not name.endswith(("lm_head", "embed_out")):
            raise CheckpointError(f"{name} is not a module in the layers of {stack.name}")
    if not names:
        raise CheckpointError("it only adapts the head")
    scales = {ours: adapter.scales[name] for ours, name in names.items()}
    return replace(adapter, pairs=LazyPairs(names, adapter.pairs.__getitem__), scales=scales)


def _from_folder(places: Mapping[str, Path], name: str, stack: Stack) -> Adapter:
    path = places[name]
    if not (path / TENSORS).is_file() and (path / PICKLED).is_file():
        raise CheckpointError(f"{PICKLED} is pickled and may run code: only {TENSORS} is read")
    adapter = Adapter.open(path)
    task = parse_json((path / CONFIG).read_bytes()).get("task_type")
    if task not in TASKS:
        raise CheckpointError(f"{path / CONFIG}: task_type is {task} instead of CAUSAL_LM")
    return adapter


def _random(name: str, stack: Stack, *, rank: int) -> Adapter:
    """A random adapter in all layers with |D_m|^2 of about its rank in each module."""
    number = int(name.rpartition("-")[2])
    shapes, transposed = {}, False
    for module, each in stack.model.named_modules():
        if module.startswith(stack.architecture.prefix) and isinstance(each, nn.Linear | Conv1D):
            transposed = isinstance(each, Conv1D)
            outs, ins = reversed(each.weight.shape) if transposed else each.weight.shape
            shapes[module] = (module_seed(number, module), outs, ins)

    def draw(entry: tuple[int, int, int]) -> Pair:
        seed, outs, ins = entry
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, ins, generator=generator) / ins**0.5
        return a, torch.randn(outs, rank, generator=generator) / outs**0.5

    return Adapter(LazyPairs(shapes, draw), dict.fromkeys(shapes, 1.0), transposed)


def _size(path: Path) -> int:
    file = path / TENSORS
    return file.stat().st_size if file.is_file() else 0
