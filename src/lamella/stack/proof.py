"""The proof of a derived stack: its sublayers, composed, are bitwise equal to its layers.

One short forward pass of the model itself is recorded, in which one layer of every kind runs, and the one before it.
One layer of every kind is then run twice, with its own ``forward`` and as its sublayers in order, with an empty cache,
without a cache, and in a continuation; and the hidden states after the last layer must yield the model's own logits. An
architecture that passes may be remembered by :func:`digest_of_proof`, since nothing in the proof depends on the
weights.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lamella.errors import ArchitectureError
from lamella.stack.sharing import replace_forward, share
from lamella.stack.stack import Hidden, Stack
from lamella.stack.sublayers import PartialLayer, join

ROWS, TOKENS = 2, 6
INDICES = ("layer_idx", "layer_id", "layer_number", "block_idx", "training", "gradient_checkpointing")  # ignored


def digest_of_proof(stack: Stack) -> str:
    """Return a digest of what the proof of a derived stack depends on.

    It covers the derivation, the config, the version of transformers, and the code of the proof.
    """
    model: Any = stack.model
    depends = {
        "config": model.config.to_dict(),
        "text": [source.text for source in stack.architecture.sources],
        "readout": getattr(stack.architecture.readout, "__doc__", None),
        "paths": [stack.architecture.prefix, stack.architecture.norm, stack.architecture.head],
        "version": transformers.__version__,
        "proof": Path(__file__).read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def prove(stack: Stack) -> None:
    """Check a derived stack against its model; the model is not changed.

    Args:
        stack: the stack.

    Raises:
        ArchitectureError: if they differ, naming the layer.
    """
    training = stack.model.training
    stack.model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            _prove(stack)
    except ArchitectureError:
        raise
    except Exception as error:  # foreign code raises errors of many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ArchitectureError(f"{stack.name}: its layers cannot be run separately ({reason}){_add(stack)}") from error
    finally:
        stack.model.train(training)


def _prove(stack: Stack) -> None:
    """Prove a stack with few layers, or with all of them if some layers depend on results of others."""
    chosen = sorted({kind_of(layer): index for index, layer in reversed(list(enumerate(stack.layers)))}.values())
    every = set(range(len(stack)))
    needed = every & {1, *chosen, *(index - 1 for index in chosen)}
    try:
        _prove_kinds(stack, chosen, needed)
    except Exception:
        if needed == every:
            raise
        _prove_kinds(stack, chosen, every)


def _prove_kinds(stack: Stack, chosen: list[int], running: set[int]) -> None:
    """Compare the layers ``chosen`` with their sublayers, in a pass of the model through the layers ``running``."""
    vocabulary = stack.base.get_submodule(stack.architecture.embedding).weight.shape[0]
    ids = 3 + torch.arange(ROWS * TOKENS, device=stack.device).view(ROWS, TOKENS) * 7 % max(vocabulary - 3, 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    model = _skip_layers(stack, set(range(len(stack))) - running)
    noted = {*chosen, len(stack) - 1} | ({1} & running)
    with _recorded(stack, model, noted) as seen, _reused_head(stack) as head:
        output = model(**given, use_cache=True)
    alone = stack.context(given).calls
    for index in noted:
        _check_alike(stack, index, seen[index][1], alone[index])
    for index in chosen:
        h, call, out = seen[index]
        _compare(stack, index, h, call, out, "with an empty cache")
        out = _own(stack, index, h, alone[index])
        _compare(stack, index, h, alone[index], out, "without a cache")
        _check_causal(stack, index, h, alone[index], out)
    normed = stack.normed(seen[len(stack) - 1][2])
    if not torch.equal(stack.logits(normed, head), output.logits):
        raise ArchitectureError(f"{stack.name}: the derived readout does not yield its logits{_add(stack)}")
    if (cache := output.get("cache")) is None:
        raise ArchitectureError(f"{stack.name}: it returns no cache, without which nothing can be decoded")
    longer = {"input_ids": ids[:, -1:], "attention_mask": torch.cat([mask, mask[:, -1:]], dim=1)}
    more: dict[str, Any] = {**longer, "cache": copy.deepcopy(cache), "use_cache": True}
    continued = stack.context(more)
    for index in chosen:
        out = _own(stack, index, continued.h, continued.calls[index])
        _compare(stack, index, continued.h, continued.calls[index], out, "in a continuation")


def _skip_layers(stack: Stack, passed: set[int]) -> Any:
    """Return the model with some layers replaced by the identity; all others are the model's own."""
    architecture = stack.architecture
    layers = {id(layer): layer for layer in stack.layers}
    for index in passed:
        layer = layers[id(stack.layers[index])] = copy.copy(stack.layers[index])
        none = dict.fromkeys(architecture.names)
        replace_forward(
            layer, PartialLayer(none, index, architecture.cache, architecture.complete_call, architecture.result)
        )
    head = {} if stack.unembedding is None else {id(stack.unembedding): stack.unembedding}
    return share(stack.model, layers | head)


def _own(stack: Stack, index: int, h: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the hidden states after a layer, computed by its own forward."""
    layer = stack.layers[index]
    return _hidden(type(layer).forward(layer, h.clone(), **copy.deepcopy(call)))


def _compare(stack: Stack, index: int, h: Tensor, call: dict[str, Any], out: Tensor, when: str) -> None:
    """Compare the result of a layer's sublayers with that of the layer."""
    hidden: Hidden = h.clone()
    call = copy.deepcopy(call)
    for name in stack.architecture.names:
        hidden = stack.architecture[name].run(stack.layers[index], hidden, call)
    if not torch.equal(join(hidden), out):
        raise ArchitectureError(
            f"{stack.name}: the derived sublayers of layers.{index} differ from the layer {when}{_add(stack)}"
        )


def _check_causal(stack: Stack, index: int, h: Tensor, call: dict[str, Any], out: Tensor) -> None:
    """Check that tokens do not see later tokens, since encoders have causal classes as well."""
    other = h.clone()
    other[:, -1] = -3 * other[:, -1].flip(-1)
    # Only the row without padding: padding may see anything.
    before, after = (each[1:, :-1] for each in (out, _own(stack, index, other, call)))
    noise = 16 * torch.finfo(before.dtype).eps  # experts and chunks may be summed in another order
    if not torch.allclose(before, after, rtol=noise, atol=noise * float(before.abs().max())):
        raise ArchitectureError(f"{stack.name}: its tokens see later tokens, so with this config it is not a decoder")


def _check_alike(stack: Stack, index: int, call: dict[str, Any], alone: dict[str, Any]) -> None:
    """Check that a layer is called with the same arguments when earlier layers do not run."""
    for name, value in call.items():
        if not isinstance(value, Tensor) or name == "attention_mask":
            continue
        other = alone.get(name)
        if other is None or not torch.equal(value, other):
            raise ArchitectureError(
                f"{stack.name}: its layers pass on '{name}' besides the residual stream{_add(stack)}"
            )


def _add(stack: Stack) -> str:
    return (
        f": add an entry with lamella.stack.register_architecture(Architecture(name='{stack.architecture.name}', "
        "sublayers=...)) (see the documentation page 'Add an architecture')"
    )


@contextmanager
def _recorded(stack: Stack, model: Any, chosen: set[int]) -> Iterator[dict[int, tuple[Tensor, dict[str, Any], Tensor]]]:
    """Record for some layers the hidden states before and after, and the arguments with a copy of the cache."""
    before: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    seen: dict[int, tuple[Tensor, dict[str, Any], Tensor]] = {}
    layers: Any = model.get_submodule(stack.architecture.prefix.removesuffix("."))
    hooks = []

    def note(index: int, names: list[str]) -> None:
        def begins(layer: Any, args: Any, kwargs: Any) -> None:
            call = dict(zip(names, args, strict=False)) | kwargs
            h = call.pop(names[0])
            before[index] = h.clone(), copy.deepcopy(call)

        def ends(layer: Any, args: Any, out: Any) -> None:
            seen[index] = (*before[index], _hidden(out).clone())

        layer = layers[index]
        hooks.append(layer.register_forward_pre_hook(begins, with_kwargs=True))
        hooks.append(layer.register_forward_hook(ends))

    for index in chosen:
        note(index, list(inspect.signature(type(layers[index]).forward).parameters)[1:])
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _reused_head(stack: Stack) -> Iterator[nn.Module]:
    """Return an output projection that reuses results that the model's own projection has computed in this context.

    It is as large as some layers, and its results for the same states are bitwise equal.
    """
    known: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if len(args) == 1:
            known.append((args[0].clone(), out.clone()))  # later code may write into them

    def answer(_: nn.Module, states: Tensor, call: dict[str, Any]) -> Tensor:
        matches = (out.clone() for given, out in known if not call and torch.equal(given, states))
        found = next(matches, None)
        return stack.unembedding(states, **call) if found is None else found

    hook = stack.unembedding.register_forward_hook(record)

    head = share(stack.unembedding)
    replace_forward(head, answer)
    try:
        yield head
    finally:
        hook.remove()


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return what distinguishes layers that are not built alike: their modules, shapes, and switches."""
    built = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    shapes = tuple(tuple(each.shape) for each in layer.parameters())
    return built, shapes, _attributes(layer, bool | str)


def numeric_attributes(layer: nn.Module) -> tuple[Any, ...]:
    """Return the numeric attributes of a layer and its modules, except for their own index."""
    return _attributes(layer, int | float)


def _attributes(layer: nn.Module, kind: Any) -> tuple[Any, ...]:
    found = ((path, name, value) for path, module in layer.named_modules() for name, value in vars(module).items())
    return tuple(each for each in found if isinstance(each[2], kind) and each[1] not in INDICES and each[1][0] != "_")
