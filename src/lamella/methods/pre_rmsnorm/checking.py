"""Checks of a model and of its rewritten form, by running them on random inputs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.stack import Model, Stack, join, open_model, share

ROWS, TOKENS = 2, 12
LARGEST = 10**9  # parameters of a model that is copied in float64 as a whole
ROUNDING = 1e-9  # relative, in float64, with a margin


def precise(model: Model) -> Iterator[Model]:
    """Yield a copy in float64, in which exact identities can be distinguished from approximate ones.

    A copy of a large model would not fit into memory. It is yielded in parts, each with one layer of every stack and
    all that is outside of the layers: what is changed in a layer depends on that layer alone, so a form that is exact
    for each of them is exact for all.
    """
    if sum(each.numel() for each in model.model.parameters()) <= LARGEST:
        yield open_model(copy.deepcopy(model.model).double(), name=model.name)
        return
    for index in range(max(map(len, model.stacks.values()))):
        part = share(model.model)
        for stack in model.stacks.values():
            path = stack.architecture.prefix.removesuffix(".")
            layers = part.get_submodule(path)
            part.set_submodule(path, nn.ModuleList([layers[index % len(layers)]]))
        yield open_model(copy.deepcopy(part).double(), name=model.name)
        gc.collect()  # models refer to themselves, so the weights of this part would stay beside those of the next


def is_tied(model: Any) -> bool:
    """Return whether the head of a transformers model shares its weight with the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def probe(model: Model, seed: int) -> dict[str, Tensor]:
    """Return random inputs of a model: tokens, pixels or audio features, and tokens to decode.

    Args:
        model: the model.
        seed: random seed.

    Raises:
        MethodError: for a model with both image and text inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    first, *others = model.stacks.values()
    whole: Any = model.model
    config, dtype = first.config, whole.dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=generator).to(model.device, dtype)

    def ids() -> Tensor:
        return torch.randint(len(whole.get_input_embeddings().weight), (ROWS, TOKENS), generator=generator).to(
            model.device
        )

    if first.architecture.modality == "image" and others:
        raise MethodError(
            f"{model.name} takes images with text, and the modules that use the image states are unknown: only a "
            "vision tower or a decoder by itself can be rewritten"
        )
    if first.architecture.modality == "image":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs = {"pixel_values": noise(config.num_channels, height, width)}
    elif first.architecture.modality == "audio":
        inputs = {"input_features": noise(config.num_mel_bins, 2 * config.max_source_positions)}
    else:
        inputs = {"input_ids": ids()}
    return inputs | ({"decoder_input_ids": ids()} if others else {})


@torch.no_grad()
def check_ignores_mean(model: Model, stack: Stack, seed: int) -> None:
    """Check, by running one layer, that its norms remove the mean of the residual stream.

    A Pre-LN layer passes a constant through: F(x + k 1) = F(x) + k 1. The output size of a Post-LN layer does not
    depend on the size of its input, since a norm follows the addition.

    Args:
        model: the model in float64.
        stack: one of its stacks.
        seed: random seed of the inputs.

    Raises:
        MethodError: for a stack whose layers behave differently.
    """
    context = stack.context(probe(model, seed))
    x = context.h
    size = float(x.square().mean().sqrt())
    out, moved, larger = (join(stack.run(h, 0, 1, context)) for h in (x, x + 3 * size, 1000 * x))
    if float(larger.square().mean()) < 100 * float(out.square().mean()):
        raise MethodError(
            f"{model.name} is Post-LN: in its {stack.stack} norms follow the additions, so their output is the "
            "residual stream itself, and its mean cannot be removed beforehand; only Pre-LN models can be rewritten"
        )
    constant = torch.full_like(out, 3 * size)
    if not torch.allclose(moved - out, constant, atol=ROUNDING * float(moved.abs().max()), rtol=0):
        raise MethodError(
            f"the layers of {model.name} depend on the mean of the residual stream, as with RMSNorm: only models "
            "that normalise it by LayerNorm alone can be rewritten"
        )


def output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the final output of a model: logits, or pooled features.

    Args:
        model: a model of transformers.
        inputs: keyword arguments of its forward pass, such as token ids `[batch, time]`.
    """
    out = model(**inputs)
    return out.logits if "logits" in out else out.pooler_output


@torch.no_grad()
def means(model: Model, inputs: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return, by stack and layer, the largest |mean(x)| / rms(x) of the hidden states before it.

    Args:
        model: a model with its stacks; it is not changed.
        inputs: keyword arguments of its forward pass, such as token ids `[batch, time]`.
    """
    found: dict[str, list[float]] = {name: [] for name in model.stacks}
    view = share(model.model)

    def record(name: str) -> Any:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).double()
            found[name].append(float((x.mean(-1).abs() / x.square().mean(-1).sqrt()).max()))

        return hook

    for name, stack in model.stacks.items():
        for layer in view.get_submodule(stack.architecture.prefix.removesuffix(".")):
            layer.register_forward_pre_hook(record(name), with_kwargs=True)
    view(**inputs)
    return found
