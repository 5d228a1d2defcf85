"""The experts of a derived stack: found by watching an MLP, and proved by computing with a token's own experts alone.

Transformers 5 holds all experts of a layer in one module, and calls it so::

    ids, weights = router(h)            [tokens, used]
    out = experts(h, ids, weights)      its parameters are [count, ...]

Which modules these are is seen when a layer runs, whatever they are called. What is found so counts only when a module
that has no more than the experts of one token gives that token the same output, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lamella.stack.entry import Experts
from lamella.stack.sharing import share

if TYPE_CHECKING:
    from lamella.stack.stack import Stack

TOKENS = 4


@torch.no_grad()
def find_experts(stack: Stack) -> Experts | None:
    """Where the experts of a stack are, how many there are and a token uses; None where that is not proved."""
    if "mlp" not in stack.architecture.names:
        return None
    layers = [index for index in range(len(stack)) if (index, "mlp") not in stack.dropped]
    holding = [index for index in layers if any(_holders(stack, index))]
    if not holding:
        return None
    try:
        first, last = (_found_in(stack, index) for index in (holding[0], holding[-1]))
    except Exception:  # of code that is not the library's, anything
        return None
    return first if first == last else None


def _holders(stack: Stack, index: int) -> Iterator[tuple[str, int]]:
    """What may hold experts in the MLP of a layer, with their number: by the first dimension of all that it has."""
    for path, module in stack.layers[index].named_modules():
        own = list(module.parameters(recurse=False))
        counts = {len(each) for each in own if each.ndim}
        serves = path.partition(".")[0] in stack.architecture["mlp"].modules
        if serves and len(counts) == 1 and any(each.ndim == 3 for each in own):
            yield path, counts.pop()


@dataclass(frozen=True)
class _Call:
    """What a module was called with, and the tensors that it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor)]


def _found_in(stack: Stack, index: int) -> Experts | None:
    """The experts of one layer."""
    layer, calls = stack.layers[index], _watched(stack, index)
    found = []
    for path, count in _holders(stack, index):
        if len(calls.get(path, ())) != 1:
            continue
        [call] = calls[path]
        ids = next((each for each in call.tensors if each.ndim == 2 and _is_whole(each)), None)
        if ids is None or not _chosen_among(ids, count):
            continue
        routers = [name for name, each in calls.items() if any(_is_same(ids, out) for one in each for out in one.out)]
        if routers and all(_alone(layer.get_submodule(path), call, ids, count, token) for token in range(len(ids))):
            found.append(Experts(routers[0], path, count, ids.shape[1]))
    return found[0] if len(found) == 1 else None


def _watched(stack: Stack, index: int) -> dict[str, list[_Call]]:
    """The calls of the modules of a layer while its MLP runs, in the order in which they first end."""
    ids = 3 + torch.arange(TOKENS, device=stack.device)[None]
    context, layer = stack.context(ids), stack.layers[index]
    stream = stack.architecture["attn"].run(layer, context.h, context.calls[index])
    calls: dict[str, list[_Call]] = {}

    def note(path: str) -> Any:
        def ends(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            outs = out if isinstance(out, tuple) else (out,)
            given = tuple(each for each in outs if isinstance(each, Tensor))
            calls.setdefault(path, []).append(_Call(args, kwargs, given))

        return ends

    hooks = [
        module.register_forward_hook(note(path), with_kwargs=True) for path, module in layer.named_modules() if path
    ]
    try:
        stack.architecture["mlp"].run(layer, stream, context.calls[index])
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _is_whole(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _chosen_among(ids: Tensor, count: int) -> bool:
    """Whether every row of ids [tokens, used] names as many different experts."""
    ordered = ids.sort(dim=1).values
    return bool((ids >= 0).all() and (ids < count).all() and (ordered.diff(dim=1) > 0).all())


def _is_same(ids: Tensor, other: Tensor) -> bool:
    return _is_whole(other) and other.shape == ids.shape and torch.equal(other, ids)


def _alone(module: nn.Module, call: _Call, ids: Tensor, count: int, token: int) -> bool:
    """Whether a token's output is that of a module which has its experts and no others."""
    chosen, places = ids[token].unique(return_inverse=True)
    few: Any = share(module)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(few, name, nn.Parameter(parameter[chosen] if parameter.ndim else parameter, requires_grad=False))
    for name, value in vars(module).items():
        if type(value) is int and value == count:
            setattr(few, name, len(chosen))

    def run(experts: Any, own: Tensor) -> Tensor:
        def of_token(each: Any) -> Any:
            if each is ids:
                return own[None]
            is_of_tokens = isinstance(each, Tensor) and each.shape[:1] == ids.shape[:1]
            return each[token : token + 1] if is_of_tokens else each

        out = experts(*map(of_token, call.args), **{name: of_token(each) for name, each in call.kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    return torch.equal(run(few, places), run(module, ids[token]))
