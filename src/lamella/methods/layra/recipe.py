"""Training of adapters at some sites, on the text of one language (steps 2 to 4 of the paper's recipe).

The learning rate is the paper's 3e-4, for models of 7 and 8 billion parameters, decreasing linearly to 0 over one
epoch; AdamW, clipping at 1, the short warm-up and no weight decay are Lamella's choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from lamella.errors import MethodError
from lamella.stack import Stack, share
from lamella.train import (
    Adapter,
    Feed,
    Lora,
    Replay,
    Sample,
    Task,
    TrainConfig,
    TrainingLog,
    add_lora,
    fit,
    response_loss,
)

TRAINING = TrainConfig(lr=3e-4, schedule="linear")


@dataclass(frozen=True)
class AdapterShape:
    """Rank, scale and targets of an adapter.

    Attributes:
        r: rank; the paper's 8.
        alpha: its output is scaled by alpha / r; the paper's 16.
        targets: names of linear modules, such as ``q_proj``; defaults to all in the adapted layers (Lamella's choice):
            the seven projections of a Llama. Norms, embedding and head are never adapted.
    """

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[int, Ge(1)] = 16
    targets: Annotated[tuple[str, ...], MinLen(1)] | None = None


def with_adapters(stack: Stack, sites: Sequence[str], shape: AdapterShape, seed: int) -> tuple[Any, Lora]:
    """Create a view with new adapters at some sites: A random, B zero, so that its output is unchanged.

    Args:
        stack: the model.
        sites: sites to adapt.
        shape: rank, scale and targets.
        seed: random seed.
    """
    if not stack.architecture.causal:
        raise MethodError(f"layra works on decoders; {stack.name} is a {stack.architecture.name}")
    view = share(stack.model)
    return view, add_lora(view, shape.r, shape.alpha, targets=shape.targets, sites=sites, seed=seed)


def learn(
    view: Any,
    lora: Lora,
    samples: Sequence[Sample],
    config: TrainConfig,
    *,
    out: Path,
    held_out: Mapping[str, Sequence[Sample]] | None = None,
    replay: Replay | None = None,
) -> tuple[Adapter, TrainingLog]:
    """Minimise the cross-entropy of all tokens over A and B; everything else is frozen.

    Args:
        view: the view from :func:`with_adapters`; trained in place.
        lora: its adapters.
        samples: samples of the new language.
        config: training settings; the seed determines the order of samples.
        out: folder for checkpoints, from which an interrupted run resumes.
        held_out: samples of all languages, for curves.
        replay: old text to mix in, if available; not part of LayRA, which does without.

    Returns:
        The adapter and the training log.
    """
    log = fit(
        view,
        Feed(samples, replay=replay),
        Task(response_loss),
        config,
        out=out,
        trainable=lora.trains,
        held_out=held_out or {},
        settings={"lora": [lora.scale, list(lora.modules)], "base": lora.base},
    )
    return lora.adapter(), log
