"""Copies of a model that share its tensors: own modules, own config, the same parameters and buffers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn


def share(model: nn.Module, keep: dict[int, Any] | None = None) -> Any:
    """Return a deep copy of ``model`` that shares every parameter and buffer with it.

    Modules, config, hooks and plain attributes belong to the copy, so changing them does not affect ``model``.

    Args:
        model: the model.
        keep: replacements for other objects, by their ``id``.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    memo |= {id(tensor): tensor for tensor in model.buffers()}
    return copy.deepcopy(model, memo | (keep or {}))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make a module run ``forward(module, h, call)`` instead of its own forward.

    ``call`` holds all arguments but the first by name, however they were passed (GPT-2 passes the cache and the mask by
    position, others by keyword).

    Args:
        module: the module, which is changed.
        forward: the new forward.
    """
    names = list(inspect.signature(type(module).forward).parameters)[2:]

    def by_name(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, dict(zip(names, args, strict=False)) | kwargs if args else kwargs)

    module.forward = MethodType(by_name, module)
