"""Copies of a model that share its tensors: own modules, own config, the same parameters and buffers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn


def share(model: nn.Module, keep: dict[int, Any] | None = None) -> Any:
    """A deep copy of ``model`` that shares every parameter and buffer with it.

    Modules, config, hooks and plain attributes are the copy's own, so changing them leaves ``model`` as it was.

    Args:
        keep: what to put in the place of further objects, by their ``id``.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    memo |= {id(tensor): tensor for tensor in model.buffers()}
    return copy.deepcopy(model, memo | (keep or {}))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``forward(module, h, call)`` run instead of the module's own forward.

    ``call`` holds everything the module is called with beside its first argument, by name, however it was passed
    (GPT-2 passes the cache and the mask by position, others by keyword).
    """
    names = list(inspect.signature(type(module).forward).parameters)[2:]

    def by_name(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, dict(zip(names, args, strict=False)) | kwargs if args else kwargs)

    module.forward = MethodType(by_name, module)
