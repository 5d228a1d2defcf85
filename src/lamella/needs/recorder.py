"""Counts what tensors without values would take, operation by operation."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import GenerationMixin

from lamella.needs.generation import record_generation
from lamella.needs.machine import MachineSpeed, free_memory, used_memory
from lamella.needs.result import Needs, StageNeeds
from lamella.needs.tensors import (
    empty,
    grouped_product,
    has_values,
    masks_as_indices,
    new_large_tensor,
    placeholder,
    read_as_ones,
)
from lamella.progress import report_to

Item = TypeVar("Item")
LIMIT = 60.0  # seconds of a recording, after which the stage that runs is extrapolated
ROWS_ONLY = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)
REST = "the rest"


class TimeLimit(Exception):
    """The time limit of a recording."""


class Recorder(TorchDispatchMode):
    """Counts memory, arithmetic and time of all operations, and replays modules that it has seen.

    It takes the place of a progress display, from which it knows the stages.

    Args:
        machine: whose speed the predictions are for.
    """

    def __init__(self, machine: MachineSpeed) -> None:
        super().__init__()
        self.machine, self.needs = machine, Needs(libraries=used_memory(), free=free_memory())
        self.held, self.seconds, self.multiplications = 0, 0.0, 0.0
        self.console = Console(stderr=True)  # of messages that are printed at once
        self._end = time.monotonic() + LIMIT
        self._sizes: dict[int, int] = {}
        self._open: list[StageNeeds] = []
        self._factor = 1.0
        self._calls: dict[Any, _ModuleCall] = {}
        self._kinds: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    # The stages, as a display of progress

    def add_task(self, what: str, total: int | None, note: str) -> int:
        """Start a stage."""
        stage = self.needs.stages.setdefault(what, StageNeeds(what)) if not self._open else StageNeeds(what)
        stage.total = (stage.total or 0) + total if total is not None else stage.total
        self._open.append(stage)
        return len(self._open)

    def update(self, number: int, advance: int, note: str) -> None:
        """Count units of work that are done."""
        if number <= len(self._open):
            self._open[number - 1].done += advance

    def remove_task(self, number: int) -> None:
        """End a stage."""
        del self._open[number - 1 :]

    @property
    def stage(self) -> StageNeeds:
        """The outermost stage that runs."""
        return self._open[0] if self._open else self.needs.stages.setdefault(REST, StageNeeds(REST))

    @contextmanager
    def times(self, count: float) -> Iterator[None]:
        """Count the work inside this block several times, but its memory once.

        Args:
            count: how often.
        """
        before, self._factor = self._factor, self._factor * count
        try:
            yield
        finally:
            self._factor = before

    def cut(self) -> None:
        """End the recording in the stage that runs, which is extrapolated from what is done of it."""
        stage = self.stage
        share = stage.done / stage.total if stage.total and stage.done else 1.0
        stage.seconds, stage.multiplications = stage.seconds / share, stage.multiplications / share
        self.needs.cut = stage.name

    # The operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes, and count it."""
        kwargs = kwargs or {}
        if time.monotonic() > self._end:
            raise TimeLimit
        leaves = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if all(map(has_values, leaves)):
            found = None if leaves else new_large_tensor(func, args, kwargs)
            found = func(*args, **kwargs) if found is None else found
            return self._counted(func, args, kwargs, found, leaves)
        args = masks_as_indices(func, args)
        try:
            known = grouped_product(func, args)
            found = func(*args, **kwargs) if known is None else known
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            found = placeholder(func, args, kwargs)
        return self._counted(func, args, kwargs, found, leaves)

    def _counted(self, func: Any, args: Any, kwargs: Any, found: Any, leaves: list[Tensor]) -> Any:
        results = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        for each in results:
            self.hold(each)
        if not func.is_view:
            packet = func._overloadpacket
            count = flop_registry[packet](*args, **kwargs, out_val=found) / 2 if packet in flop_registry else 0
            read = leaves[1:] if packet in ROWS_ONLY else leaves
            moved = sum(each.numel() * each.element_size() for each in (*read, *results))
            self._add(count, self.machine.seconds(count, moved, (leaves or results or [torch.empty(0)])[0].dtype))
        return found

    def _add(self, multiplications: float, seconds: float) -> None:
        stage = self.stage
        for each in (self, stage):
            each.seconds += seconds * self._factor
            each.multiplications += multiplications * self._factor

    def open(self, model: nn.Module) -> None:
        """Count the weights and buffers of a model.

        Args:
            model: the model.
        """
        tensors = [*model.parameters(), *model.buffers()]
        for each in tensors:
            self.hold(each)
        sizes = {_place(each): each.untyped_storage().nbytes() for each in tensors}
        self.needs.weights += sum(sizes.values())

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor for as long as it is alive.

        Args:
            tensor: the tensor; what shares its memory counts once.
        """
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = _place(tensor), storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self.held += size
            self._rise(self.held)
            weakref.finalize(storage, self._release, key)

    def uncounted(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape that takes no memory, since it is read from disk.

        Args:
            tensor: the tensor.
        """
        held, peak, stage = self.held, self.needs.peak, self.stage.peak
        found = empty(tensor.shape, tensor.dtype)
        self._sizes[_place(found)] = 0
        self.held, self.needs.peak, self.stage.peak = held, peak, stage
        return found

    def _release(self, key: int) -> None:
        self.held -= self._sizes.pop(key, 0)

    def _rise(self, held: int) -> None:
        self.needs.peak = max(self.needs.peak, held)
        self.stage.peak = max(self.stage.peak, held)

    # Modules that are called again

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a module, or replay an earlier call of one of the same shape on inputs of the same shapes.

        Args:
            original: the call of PyTorch.
            module: the module.
            args: its arguments.
            kwargs: its keyword arguments.
        """
        key = self._key(module, args, kwargs)
        if key is None:
            return original(module, *args, **kwargs)
        known = self._calls.get(key)
        if known is not None:
            self._rise(self.held + known.extra)
            self._add(known.multiplications, known.seconds)
            found = [None if each is None else empty(*each) for each in known.results]
            return tuple(found) if known.is_tuple else found[0]
        outer, stage = (self.needs.peak, self.stage.peak), self.stage
        held, seconds, count, factor = self.held, self.seconds, self.multiplications, self._factor
        self.needs.peak = stage.peak = held
        found = original(module, *args, **kwargs)
        extra = self.needs.peak - held
        self.needs.peak, stage.peak = max(outer[0], self.needs.peak), max(outer[1], stage.peak)
        parts = found if isinstance(found, tuple) else (found,)
        given = {_place(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        if all(each is None or (isinstance(each, FakeTensor) and _place(each) not in given) for each in parts):
            results = [None if each is None else (each.shape, each.dtype, each.stride()) for each in parts]
            spent = (self.seconds - seconds) / factor, (self.multiplications - count) / factor
            self._calls[key] = _ModuleCall(results, isinstance(found, tuple), *spent, extra)
        return found

    def _key(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return what a call depends on, without values; None if it may depend on more, or does more than compute."""
        if torch.is_grad_enabled() or next(iter(module.parameters()), None) is None:
            return None
        leaves = tree_leaves((args, kwargs))
        shapes: list[Any] = []
        for each in leaves:
            if isinstance(each, Tensor):
                shapes.append((each.shape, each.dtype, each.stride(), has_values(each)))
            elif each is None or isinstance(each, bool | int | float | str):
                shapes.append(each)
            else:
                return None
        if all(each[3] for each in shapes if isinstance(each, tuple)):
            return None
        kind = self._kind(module)
        return None if kind is None else (kind, tuple(kwargs), tuple(shapes))

    def _kind(self, module: nn.Module) -> Any:
        """Return what modules of one kind have in common; None for one that is observed or altered inside."""
        for each in module.modules():
            if each._forward_hooks or each._forward_pre_hooks or "forward" in each.__dict__:
                return None
        if module not in self._kinds:
            parts = [(type(each), each.extra_repr()) for each in module.modules()]
            tensors = [(each.shape, each.dtype) for each in module.parameters()]
            self._kinds[module] = hash((tuple(parts), tuple(tensors)))
        return self._kinds[module]


def _place(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor while it is alive."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class _ModuleCall:
    """A call of a module: shapes, precisions and strides of its results, and what it needed."""

    results: list[Any]
    is_tuple: bool
    seconds: float
    multiplications: float
    extra: int


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def current_recorder() -> Recorder | None:
    """Return what records the needs of the work that runs; None where it is done for real."""
    return _recorder.get()


def now() -> float:
    """Return the time in seconds, from some moment on; in a recording, the predicted time."""
    recorder = current_recorder()
    return time.perf_counter() if recorder is None else recorder.seconds


def extrapolate(items: Iterable[Item], keep: int = 1) -> Iterator[Item]:
    """Iterate; in a recording only over the first items, of which the last counts for all that are left out.

    Args:
        items: the items, such as rounds of a measurement.
        keep: number of items in a recording.
    """
    recorder = current_recorder()
    if recorder is None:
        yield from items
        return
    every = list(items)
    for index, item in enumerate(every[:keep], 1):
        with recorder.times(len(every) - keep + 1 if index == keep else 1):
            yield item


@contextmanager
def recording() -> Iterator[Needs]:
    """Record what the work inside this block needs, on models without values; see :mod:`lamella.needs`.

    If it takes longer than a minute, the block ends early: the stage that runs is extrapolated, and named in ``cut``.
    """
    recorder = Recorder(MachineSpeed.measured())
    call, generate = nn.Module.__call__, GenerationMixin.generate

    def continued(model: Any, *args: Any, **kwargs: Any) -> Any:
        return record_generation(recorder, model, *args, **kwargs)

    def replayed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(call, module, args, kwargs)

    token = _recorder.set(recorder)
    nn.Module.__call__ = replayed  # type: ignore[method-assign]
    GenerationMixin.generate = torch.no_grad()(continued)  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(), read_as_ones(), report_to(recorder), recorder:
            warnings.simplefilter("ignore")  # of what values say
            yield recorder.needs
    except TimeLimit:
        recorder.cut()
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
        GenerationMixin.generate = generate  # type: ignore[method-assign]
        _recorder.reset(token)
