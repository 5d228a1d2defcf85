"""Gradient checkpointing: blocks keep their inputs only, and are computed again in the backward pass.

It works for every model that repeats blocks, and for views whose layers run under a plan. Dropout draws the same
numbers twice, and the statistics of batch norms are updated once, so the result is bit-exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Compute the blocks of a model again in backward passes, instead of keeping what they have computed.

    Args:
        model: a model or a view; its blocks run as usual after the context.
        enabled: whether to do anything.
    """
    blocks = repeated_blocks(model) if enabled else []
    own = {block: block.__dict__.get("forward") for block in blocks}
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward, _UnchangedStatistics(block))
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: the members of its outermost lists of modules of the same class.

    Args:
        model: the model.
    """
    found: list[nn.Module] = []
    for child in model.children():
        parts = [each for each in child.children() if any(True for _ in each.children())]
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and parts and max(Counter(map(type, parts)).values()) > 1:
            found += parts
        else:
            found += repeated_blocks(child)
    return list(dict.fromkeys(found))


def _checkpointed(forward: Callable[..., Any], again: AbstractContextManager[None], *args: Any, **kwargs: Any) -> Any:
    """Run a block; its computation is repeated in the backward pass, in a context that may be entered again."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


class _UnchangedStatistics(AbstractContextManager[None]):
    """Restore the statistics of batch norms, which a second computation of a block would update again.

    A loss with several backward passes enters it several times.
    """

    def __init__(self, block: nn.Module) -> None:
        norms = [each for each in block.modules() if isinstance(each, _NormBase)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]

    def __enter__(self) -> None:
        self._before = [each.clone() for each in self._buffers]

    def __exit__(self, *_: object) -> None:
        for buffer, values in zip(self._buffers, self._before, strict=True):
            buffer.copy_(values)
