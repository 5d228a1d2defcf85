"""What trains: adapters at some sites, on the text of one language (steps 2 to 4 of the paper's recipe).

The rate is the paper's 3e-4, for models of 7 and 8 billion parameters, falling linearly to 0 over one pass; AdamW,
clipping at 1, the short warm-up and no weight decay are ours.
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
class Shape:
    """What an adapter is like.

    Attributes:
        r: rank; the paper's 8.
        alpha: its output is scaled by alpha / r; the paper's 16.
        targets: names of linear modules, such as ``q_proj``; all in the adapted layers when left out (ours): the seven
            projections of a Llama. Norms, embedding and head are never adapted.
    """

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[int, Ge(1)] = 16
    targets: Annotated[tuple[str, ...], MinLen(1)] | None = None


def adapted(stack: Stack, sites: Sequence[str], shape: Shape, seed: int) -> tuple[Any, Lora]:
    """A view with fresh adapters at some sites: A random, B zero, so that it computes what the model does."""
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
    """min over A, B of the cross-entropy of all tokens; all else is frozen.

    Args:
        view, lora: what :func:`adapted` made; trained in place.
        samples: of the new language.
        config: how; its seed is that of the order of samples.
        out: a folder for checkpoints, from which an interrupted run goes on.
        held_out: samples of all languages, for curves.
        replay: old text to mix in, where there is some; not LayRA's, whose point is to do without.
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
