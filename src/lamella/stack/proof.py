"""The proof of a derived stack: its sublayers, composed, are its layers, to the bit.

One short forward pass of the model itself is watched, in which one layer of every kind runs, and the one before it.
Of every kind of layer one is then run twice, as its own ``forward`` and as its sublayers one after the other, with an
empty cache, without a cache, and in a continuation; and the stream behind the last layer must give the model's own
logits. An architecture that passes may be remembered by :func:`digest_of_proof`, since nothing in the proof depends on
the weights.
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
PLACES = ("layer_idx", "layer_id", "layer_number", "block_idx", "training", "gradient_checkpointing")  # not a kind


def digest_of_proof(stack: Stack) -> str:
    """What the proof of a derived stack depends on: derivation, config, version of transformers, and itself."""
    model: Any = stack.model
    said = {
        "config": model.config.to_dict(),
        "text": [source.text for source in stack.architecture.sources],
        "readout": getattr(stack.architecture.readout, "__doc__", None),
        "places": [stack.architecture.prefix, stack.architecture.norm, stack.architecture.head],
        "version": transformers.__version__,
        "proof": Path(__file__).read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def prove(stack: Stack) -> None:
    """Check a stack against its model; the model is not changed.

    Raises:
        ArchitectureError: when they differ, naming the layer.
    """
    training = stack.model.training
    stack.model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            _prove(stack)
    except ArchitectureError:
        raise
    except Exception as error:  # of code that is not the library's, anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ArchitectureError(f"{stack.name}: its layers cannot be run apart ({reason}){_add(stack)}") from error
    finally:
        stack.model.train(training)


def _prove(stack: Stack) -> None:
    """Prove it with few layers; with all of them where those are not enough, since some read what others left."""
    chosen = sorted({kind_of(layer): index for index, layer in reversed(list(enumerate(stack.layers)))}.values())
    every = set(range(len(stack)))
    few = every & {1, *chosen, *(index - 1 for index in chosen)}
    try:
        _prove_kinds(stack, chosen, few)
    except Exception:
        if few == every:
            raise
        _prove_kinds(stack, chosen, every)


def _prove_kinds(stack: Stack, chosen: list[int], running: set[int]) -> None:
    """Compare the layers ``chosen`` with their sublayers, in a pass of the model through the layers ``running``."""
    vocabulary = stack.base.get_submodule(stack.architecture.embedding).weight.shape[0]
    ids = 3 + torch.arange(ROWS * TOKENS, device=stack.device).view(ROWS, TOKENS) * 7 % max(vocabulary - 3, 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    model = _passing_by(stack, set(range(len(stack))) - running)
    noted = {*chosen, len(stack) - 1} | ({1} & running)
    with _watched(stack, model, noted) as seen, _heard(stack) as head:
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
        raise ArchitectureError(f"{stack.name}: what is derived of its readout does not give its logits{_add(stack)}")
    if (cache := output.get("cache")) is None:
        raise ArchitectureError(f"{stack.name}: it hands out no cache, without which nothing can be decoded")
    longer = {"input_ids": ids[:, -1:], "attention_mask": torch.cat([mask, mask[:, -1:]], dim=1)}
    more: dict[str, Any] = {**longer, "cache": copy.deepcopy(cache), "use_cache": True}
    further = stack.context(more)
    for index in chosen:
        out = _own(stack, index, further.h, further.calls[index])
        _compare(stack, index, further.h, further.calls[index], out, "in a continuation")


def _passing_by(stack: Stack, passed: set[int]) -> Any:
    """The model, but that the stream passes by some layers; all others are the model's own."""
    architecture = stack.architecture
    layers = {id(layer): layer for layer in stack.layers}
    for index in passed:
        layer = layers[id(stack.layers[index])] = copy.copy(stack.layers[index])
        nothing = dict.fromkeys(architecture.names)
        replace_forward(
            layer, PartialLayer(nothing, index, architecture.cache, architecture.complete_call, architecture.result)
        )
    head = {} if stack.unembedding is None else {id(stack.unembedding): stack.unembedding}
    return share(stack.model, layers | head)


def _own(stack: Stack, index: int, h: Tensor, call: dict[str, Any]) -> Tensor:
    """The stream behind a layer, as its own forward computes it."""
    layer = stack.layers[index]
    return _stream(type(layer).forward(layer, h.clone(), **copy.deepcopy(call)))


def _compare(stack: Stack, index: int, h: Tensor, call: dict[str, Any], out: Tensor, when: str) -> None:
    """Compare what a layer's sublayers give with what the layer gave."""
    stream: Hidden = h.clone()
    call = copy.deepcopy(call)
    for name in stack.architecture.names:
        stream = stack.architecture[name].run(stack.layers[index], stream, call)
    if not torch.equal(join(stream), out):
        raise ArchitectureError(
            f"{stack.name}: the derived sublayers of layers.{index} differ from it {when}{_add(stack)}"
        )


def _check_causal(stack: Stack, index: int, h: Tensor, call: dict[str, Any], out: Tensor) -> None:
    """Tokens must not see those behind them: encoders have causal classes, too."""
    other = h.clone()
    other[:, -1] = -3 * other[:, -1].flip(-1)
    # Of the row without padding, which may see anything.
    before, after = (each[1:, :-1] for each in (out, _own(stack, index, other, call)))
    noise = 16 * torch.finfo(before.dtype).eps  # experts and chunks may add up in another order
    if not torch.allclose(before, after, rtol=noise, atol=noise * float(before.abs().max())):
        raise ArchitectureError(f"{stack.name}: its tokens see those behind them, so it is no decoder as it is set up")


def _check_alike(stack: Stack, index: int, call: dict[str, Any], alone: dict[str, Any]) -> None:
    """Layers must be called alike when those before them do not run, else they hand on more than the stream."""
    for name, value in call.items():
        if not isinstance(value, Tensor) or name == "attention_mask":
            continue
        other = alone.get(name)
        if other is None or not torch.equal(value, other):
            raise ArchitectureError(f"{stack.name}: its layers hand on '{name}' beside the stream{_add(stack)}")


def _add(stack: Stack) -> str:
    return (
        f": add an entry with lamella.stack.register_architecture(Architecture(name='{stack.architecture.name}', "
        "sublayers=...)) (see the documentation page 'Add an architecture')"
    )


@contextmanager
def _watched(stack: Stack, model: Any, chosen: set[int]) -> Iterator[dict[int, tuple[Tensor, dict[str, Any], Tensor]]]:
    """Note of some layers the stream before, what they are called with (and the cache as it is), the stream after."""
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
            seen[index] = (*before[index], _stream(out).clone())

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
def _heard(stack: Stack) -> Iterator[nn.Module]:
    """An output projection that need not compute again what the model's own has answered meanwhile.

    It is as large as some layers, and gives the same answer to the same states, to the bit.
    """
    asked: list[tuple[Tensor, Tensor]] = []

    def hear(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if len(args) == 1:
            asked.append((args[0].clone(), out.clone()))  # what is behind may write into them

    def answer(_: nn.Module, states: Tensor, call: dict[str, Any]) -> Tensor:
        known = (out.clone() for given, out in asked if not call and torch.equal(given, states))
        found = next(known, None)
        return stack.unembedding(states, **call) if found is None else found

    hook = stack.unembedding.register_forward_hook(hear)

    head = share(stack.unembedding)
    replace_forward(head, answer)
    try:
        yield head
    finally:
        hook.remove()


def _stream(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What tells layers apart that are not built alike: their modules, shapes, and switches."""
    built = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    shapes = tuple(tuple(each.shape) for each in layer.parameters())
    return built, shapes, _attributes(layer, bool | str)


def numeric_attributes(layer: nn.Module) -> tuple[Any, ...]:
    """The numbers that a layer and its modules hold, but what they call their own place."""
    return _attributes(layer, int | float)


def _attributes(layer: nn.Module, kind: Any) -> tuple[Any, ...]:
    found = ((path, name, value) for path, module in layer.named_modules() for name, value in vars(module).items())
    return tuple(each for each in found if isinstance(each[2], kind) and each[1] not in PLACES and each[1][0] != "_")
