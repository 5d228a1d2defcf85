"""What must be true of a model, and of what it is rewritten to, found by running them on random inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.stack import Model, Stack, join, open_model, share

ROWS, TOKENS = 2, 12
ROUNDING = 1e-9  # of a float64 layer, generously


def precise(model: Model) -> Model:
    """A copy in float64, on which identities are told from what is nearly one."""
    return open_model(copy.deepcopy(model.model).double(), name=model.name)


def is_tied(model: Any) -> bool:
    """Whether an embedding is also the weight of a transformers model's head."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def probe(model: Model, seed: int) -> dict[str, Tensor]:
    """Random inputs of a model: tokens, pixels or sound, and tokens to decode.

    Args:
        seed: of the numbers.

    Raises:
        MethodError: for a model that reads images beside text.
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
            f"{model.name} reads images beside text, and what reads their states in it is not known: only a tower or a "
            "decoder by itself can be rewritten"
        )
    if first.architecture.modality == "image":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        given = {"pixel_values": noise(config.num_channels, height, width)}
    elif first.architecture.modality == "audio":
        given = {"input_features": noise(config.num_mel_bins, 2 * config.max_source_positions)}
    else:
        given = {"input_ids": ids()}
    return given | ({"decoder_input_ids": ids()} if others else {})


@torch.no_grad()
def check_sees_no_mean(model: Model, stack: Stack, seed: int) -> None:
    """Check by what a layer does that it reads its stream through norms that take the mean away.

    A Pre-LN layer hands a constant on: F(x + k 1) = F(x) + k 1. The size of what a Post-LN layer gives does not depend
    on what it is given, since a norm stands behind the addition.

    Args:
        model: in float64.
        stack: one of its stacks.
        seed: of random inputs.

    Raises:
        MethodError: for a stack whose layers do otherwise.
    """
    context = stack.context(probe(model, seed))
    x = context.h
    size = float(x.square().mean().sqrt())
    out, moved, larger = (join(stack.run(given, 0, 1, context)) for given in (x, x + 3 * size, 1000 * x))
    if float(larger.square().mean()) < 100 * float(out.square().mean()):
        raise MethodError(
            f"{model.name} is Post-LN: in its {stack.stack} norms stand behind the additions, so what they give is the "
            "stream itself, and its mean cannot be taken away beforehand; only Pre-LN models can be rewritten"
        )
    constant = torch.full_like(out, 3 * size)
    if not torch.allclose(moved - out, constant, atol=ROUNDING * float(moved.abs().max()), rtol=0):
        raise MethodError(
            f"the layers of {model.name} see the mean of their stream, which carries information then, as in models "
            "with RMSNorm: only those that read it through LayerNorms alone can be rewritten"
        )


def output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model gives in the end: logits, or pooled features."""
    out = model(**inputs)
    return out.logits if "logits" in out else out.pooler_output


@torch.no_grad()
def means(model: Model, inputs: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """By stack and layer, the largest |mean(x)| / rms(x) of the stream that enters it."""
    found: dict[str, list[float]] = {name: [] for name in model.stacks}
    view = share(model.model)

    def note(name: str) -> Any:
        def hook(layer: Any, given: Any, kwargs: Any) -> None:
            x = (given[0] if given else kwargs["hidden_states"]).double()
            found[name].append(float((x.mean(-1).abs() / x.square().mean(-1).sqrt()).max()))

        return hook

    for name, stack in model.stacks.items():
        for layer in view.get_submodule(stack.architecture.prefix.removesuffix(".")):
            layer.register_forward_pre_hook(note(name), with_kwargs=True)
    view(**inputs)
    return found
