"""Tensors without values: models that hold them, and what stands for a value that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lamella.stack import share

LARGE = 1 << 26  # bytes of a new tensor from which on it has no values
SHAPES = FakeTensorMode(allow_non_fake_inputs=True)
aten = torch.ops.aten


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values."""
    return not isinstance(tensor, FakeTensor)


def empty(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
    """Return a tensor without values on the CPU.

    Args:
        shape: its shape.
        dtype: its precision.
        stride: its strides; contiguous by default.
    """
    with SHAPES:
        if stride is None:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype)


def without_values(model: nn.Module) -> Any:
    """Return a copy of a model whose parameters have no values; buffers on the meta device have none either.

    Args:
        model: the model; it may have parameters on the meta device.
    """
    keep: dict[int, Any] = {}
    for each in filter(has_values, model.parameters()):
        keep[id(each)] = nn.Parameter(empty(each.shape, each.dtype, each.stride()), requires_grad=each.requires_grad)
    for buffer in model.buffers():
        if buffer.device.type == "meta":
            keep[id(buffer)] = empty(buffer.shape, buffer.dtype, buffer.stride())
    return share(model, keep=keep)


@contextmanager
def read_as_ones() -> Iterator[None]:
    """Let NumPy and Python read tensors without values: each of their numbers is 1."""
    names: dict[str, Callable[..., Any]] = {
        "numpy": lambda tensor, **_: _ones(tensor),
        "tolist": lambda tensor: _ones(tensor).tolist(),
        "__array__": lambda tensor, dtype=None, copy=None: _ones(tensor).astype(dtype or _ones(tensor).dtype),
    }
    own = {name: FakeTensor.__dict__[name] for name in names if name in FakeTensor.__dict__}
    for name, read in names.items():
        setattr(FakeTensor, name, read)
    swap = torch.utils.swap_tensors
    torch.utils.swap_tensors = _moved
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap
        for name in names:
            if name in own:
                setattr(FakeTensor, name, own[name])
            else:
                delattr(FakeTensor, name)


def _moved(parameter: Tensor, converted: Tensor) -> None:
    """Convert a parameter in place, as moving a module to another precision does."""
    if parameter.dtype != converted.dtype:
        parameter.data = converted.detach()


def _ones(tensor: Tensor) -> Any:
    dtype = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    return np.ones(tuple(tensor.shape), dtype=torch.empty(0, dtype=dtype).numpy().dtype)


def placeholder(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what stands for the result of an operation whose shape, or whose number, depends on values.

    A mask without values selects everything, and a number is 1.

    Args:
        operation: an operator of PyTorch.
        args: its arguments.
        kwargs: its keyword arguments.

    Raises:
        NotImplementedError: for any other operation.
    """
    packet, first = operation._overloadpacket, args[0]
    if packet is aten._local_scalar_dense:
        return True if first.dtype == torch.bool else 1.0 if first.dtype.is_floating_point else 1
    if packet in (aten.equal, aten.is_nonzero, aten.allclose):
        return True
    if packet is aten.nonzero:
        return empty((first.numel(), first.dim()), torch.int64)
    if packet is aten.masked_select:
        return empty((first.numel(),), first.dtype)
    if packet in (aten._unique2, aten.unique_dim, aten.unique_consecutive):
        count = first.numel() if packet is aten._unique2 else first.shape[0]
        shape = (count,) if packet is aten._unique2 else first.shape
        return empty(shape, first.dtype), empty((first.numel(),), torch.int64), empty((count,), torch.int64)
    if packet is aten.bincount:
        return empty((kwargs.get("minlength") or (args[2] if len(args) > 2 else first.numel()),), torch.int64)
    raise NotImplementedError(f"{operation} on tensors without values")


def masks_as_indices(operation: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Return the arguments of an operation with masks as indices: known ones exactly, others select everything.

    Args:
        operation: an operator of PyTorch.
        args: its arguments.
    """
    if operation._overloadpacket not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return args
    indices: list[Tensor | None] = []
    for each in args[1]:
        if each is None or each.dtype not in (torch.bool, torch.uint8):
            indices.append(each)
        elif has_values(each):
            indices += each.nonzero().unbind(1)
        else:
            indices += [empty((each.numel(),), torch.int64)] * each.dim()
    return args[0], indices, *args[2:]


def grouped_product(operation: Any, args: Sequence[Any]) -> Tensor | None:
    """Return the result of a product of groups of rows with a matrix each, which PyTorch knows for bfloat16 only.

    Args:
        operation: an operator of PyTorch; None is returned for any other.
        args: its arguments.
    """
    if operation._overloadpacket is not aten._grouped_mm:
        return None
    return empty((args[0].shape[0], args[1].shape[-1]), args[0].dtype)


def new_large_tensor(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the result of an operation that creates a large tensor, without values; None for a small one.

    Args:
        operation: an operator of PyTorch that reads no tensor.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    with SHAPES:
        found = operation(*args, **kwargs)
    is_large = isinstance(found, Tensor) and found.numel() * found.element_size() >= LARGE
    return found if is_large else None
