"""The experts of a derived stack: found by observing an MLP, and proved by running a token with its own experts only.

Transformers 5 holds all experts of a layer in one module, and calls it as follows::

    ids, weights = router(h)            [tokens, used]
    out = experts(h, ids, weights)      its parameters are [count, ...]

These modules are identified when a layer runs, whatever their names are. They are accepted only if a module that has
just the experts of one token computes a bitwise equal output for that token.
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
    """Return the experts of a stack, their number and the number per token; None if this cannot be proved.

    Args:
        stack: the stack.
    """
    if "mlp" not in stack.architecture.names:
        return None
    layers = [index for index in range(len(stack)) if (index, "mlp") not in stack.dropped]
    holding = [index for index in layers if any(_candidates(stack, index))]
    if not holding:
        return None
    try:
        first, last = (_experts_of(stack, index) for index in (holding[0], holding[-1]))
    except Exception:  # foreign code raises errors of many types
        return None
    return first if first == last else None


def _candidates(stack: Stack, index: int) -> Iterator[tuple[str, int]]:
    """Yield modules in the MLP of a layer that may hold experts, with the number of experts."""
    for path, module in stack.layers[index].named_modules():
        own = list(module.parameters(recurse=False))
        counts = {len(each) for each in own if each.ndim}
        serves = path.partition(".")[0] in stack.architecture["mlp"].modules
        if serves and len(counts) == 1 and any(each.ndim == 3 for each in own):
            yield path, counts.pop()


@dataclass(frozen=True)
class _Call:
    """A call of a module.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        out: tensors of the output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor)]


def _experts_of(stack: Stack, index: int) -> Experts | None:
    """Return the experts of one layer, or None."""
    layer, calls = stack.layers[index], _record_calls(stack, index)
    found = []
    for path, count in _candidates(stack, index):
        if len(calls.get(path, ())) != 1:
            continue
        [call] = calls[path]
        ids = next((each for each in call.tensors if each.ndim == 2 and _is_whole(each)), None)
        if ids is None or not _are_choices(ids, count):
            continue
        routers = [name for name, each in calls.items() if any(_is_same(ids, out) for one in each for out in one.out)]
        if routers and all(_alone(layer.get_submodule(path), call, ids, count, token) for token in range(len(ids))):
            found.append(Experts(routers[0], path, count, ids.shape[1]))
    return found[0] if len(found) == 1 else None


def _record_calls(stack: Stack, index: int) -> dict[str, list[_Call]]:
    """Return the calls of the modules of a layer while its MLP runs, in the order in which the modules first return."""
    ids = 3 + torch.arange(TOKENS, device=stack.device)[None]
    context, layer = stack.context(ids), stack.layers[index]
    hidden = stack.architecture["attn"].run(layer, context.h, context.calls[index])
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
        stack.architecture["mlp"].run(layer, hidden, context.calls[index])
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _is_whole(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _are_choices(ids: Tensor, count: int) -> bool:
    """Return whether every row of ids [tokens, used] contains distinct valid experts."""
    ordered = ids.sort(dim=1).values
    return bool((ids >= 0).all() and (ids < count).all() and (ordered.diff(dim=1) > 0).all())


def _is_same(ids: Tensor, other: Tensor) -> bool:
    return _is_whole(other) and other.shape == ids.shape and torch.equal(other, ids)


def _alone(module: nn.Module, call: _Call, ids: Tensor, count: int, token: int) -> bool:
    """Return whether a token's output equals that of a module which has only this token's experts.

    Both modules have copies of the weights: results of a matrix product depend on where weights are aligned in memory,
    and in a file they may begin anywhere.
    """
    chosen, indices = ids[token].unique(return_inverse=True)
    reduced, whole = (_copied(module, those, count) for those in (chosen, torch.arange(count, device=ids.device)))

    def run(experts: Any, own: Tensor) -> Tensor:
        def of_token(each: Any) -> Any:
            if each is ids:
                return own[None]
            is_of_tokens = isinstance(each, Tensor) and each.shape[:1] == ids.shape[:1]
            return each[token : token + 1] if is_of_tokens else each

        out = experts(*map(of_token, call.args), **{name: of_token(each) for name, each in call.kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    return torch.equal(run(reduced, indices), run(whole, ids[token]))


def _copied(module: nn.Module, chosen: Tensor, count: int) -> Any:
    """Return the module with copies of the weights of some of its experts."""
    copied: Any = share(module)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(copied, name, nn.Parameter(parameter[chosen] if parameter.ndim else parameter, requires_grad=False))
    for name, value in vars(module).items():
        if type(value) is int and value == count:
            setattr(copied, name, len(chosen))
    return copied
