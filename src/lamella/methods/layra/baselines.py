"""Baselines of LayRA: the same training in other layers, with other sizes, and of all weights.

Every method has its own best learning rate, so each is trained with several. The fair comparison is how much a method
has forgotten *when it has learned as much as the others* (:func:`at_equal_loss`), in addition to its end point
(:func:`lamella.search.pareto`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lamella.errors import MethodError
from lamella.methods.layra.edges import Edges, sites_of_layers
from lamella.methods.layra.languages import Language, measure
from lamella.methods.layra.recipe import AdapterShape, learn, with_adapters
from lamella.stack import Stack, share
from lamella.train import (
    Feed,
    Replay,
    Sample,
    Task,
    TrainConfig,
    TrainingLog,
    choose,
    fit,
    merge,
    own,
    response_loss,
    with_weights_of,
)

Curve = Sequence[float]


@dataclass(frozen=True)
class LanguageArm:
    """One way of learning a language.

    Attributes:
        name: name of the arm.
        layers: layers to train; None for every weight of the model.
        r: rank of the adapters; None trains the weights themselves.
        replay: fraction of each batch that is old text, if available; an upper bound for methods without it.
    """

    name: str
    layers: tuple[int, ...] | None
    r: int | None
    replay: float = 0.0


def arms(edges: Edges, r: int = 8, replay: float = 0.0) -> dict[str, LanguageArm]:
    """LayRA and its baselines: other layers with the same size, all layers, and full rank.

    Args:
        edges: S.
        r: rank of LayRA.
        replay: fraction of old text in the upper bound with replay; 0 omits it.
    """
    size, whole = len(edges.indices), tuple(range(edges.layers))
    middle = (edges.layers - size) // 2
    known = [
        LanguageArm("full", None, None),
        LanguageArm("full, same layers", edges.indices, None),
        LanguageArm("lora", whole, r),
        LanguageArm("lora, same parameters", whole, max(1, round(r * size / edges.layers))),
        LanguageArm("layra", edges.indices, r),
        LanguageArm("lora, middle", whole[middle : middle + size], r),
        LanguageArm("lora, first", whole[:size], r),
        LanguageArm("lora, last", whole[-size:], r),
    ]
    if replay:
        known.append(LanguageArm("layra, replay", edges.indices, r, replay))
    return {arm.name: arm for arm in known}


@dataclass(frozen=True)
class ArmResult:
    """Results of one arm with one learning rate, language by language.

    Attributes:
        arm: its name.
        lr: the highest learning rate.
        trainable: number of trained parameters.
        rows: bits per byte of every language: before, and after each language was learned.
        curve: bits per byte while the first language was learned, by language.
    """

    arm: str
    lr: float
    trainable: int
    rows: list[dict[str, float]]
    curve: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON values; ``ArmResult(**...)`` restores it."""
        return asdict(self)


def follow(
    stack: Stack,
    arm: LanguageArm,
    languages: Mapping[str, Language],
    watched: Mapping[str, Language],
    config: TrainConfig,
    *,
    work: Path,
    curves: Sequence[str] = (),
    old: Sequence[Sample] = (),
    alpha: int = 16,
) -> tuple[ArmResult, Stack]:
    """Learn languages one after the other, each from the end of the previous one.

    Args:
        stack: the model; it is not changed.
        arm: the arm.
        languages: languages to learn, in order.
        watched: languages whose held-out text is measured, including these.
        config: learning rate, length and seed, as for :func:`lamella.methods.layra.layra`.
        work: folder for checkpoints, from which a repeated call resumes, also with further languages appended.
        curves: which of ``watched`` are also measured every ``config.eval_every`` steps of the first language.
        old: old text, for an arm with replay.
        alpha: scale of the adapters.

    Returns:
        The results, and the model.
    """
    if arm.replay and not old:
        raise MethodError(f"'{arm.name}' replays old text: give old text, or omit this arm")
    rows, curve, trainable, current = [measure(stack.model, watched, config.batch)], {}, 0, stack
    for number, (name, language) in enumerate(languages.items()):
        held_out = {} if number else {each: watched[each].held_out for each in curves}
        replay = Replay({"old": old}, arm.replay, seed=config.seed + number) if arm.replay else None
        job = {"out": Path(work) / f"{number + 1}-{name}", "replay": replay, "held_out": held_out}
        step = replace(config, seed=config.seed + number)
        current, trainable, log = _step(current, arm, language.samples, step, alpha, job)
        rows.append(measure(current.model, watched, config.batch))
        if number == 0:
            curve = {each: [watched[each].bits(point.parts[each]) for point in log.held_out] for each in held_out}
    return ArmResult(arm.name, config.lr or 0.0, trainable, rows, curve), current


def _step(
    stack: Stack, arm: LanguageArm, samples: Sequence[Sample], config: TrainConfig, alpha: int, job: dict[str, Any]
) -> tuple[Stack, int, TrainingLog]:
    """Learn one language: the model after it, the number of trained parameters, and the log."""
    if arm.r is not None:
        sites = sites_of_layers(arm.layers or tuple(range(len(stack))))
        view, lora = with_adapters(stack, sites, AdapterShape(arm.r, alpha), config.seed)
        adapter, log = learn(view, lora, samples, config, **job)
        return merge(stack, adapter), adapter.parameters, log
    view = share(stack.model)
    inside = ("",) if arm.layers is None else tuple(f"{stack.architecture.prefix}{layer}." for layer in arm.layers)

    def trains(name: str) -> bool:
        return name.startswith(inside)

    own(view, trains)
    feed = Feed(samples, replay=job.pop("replay"))
    log = fit(view, feed, Task(response_loss), config, trainable=trains, **job)
    return with_weights_of(stack, view), sum(each.numel() for each in choose(view, trains).values()), log


# Forgetting at equal learning


def at_equal_loss(new: Curve, old: Curve, target: float) -> float | None:
    """The loss on old text at the moment when that on the new language first reached ``target``.

    Both losses are interpolated linearly between two points of a curve.

    Args:
        new: loss on the new language at each evaluation, starting before the first step.
        old: loss on old text at the same steps.
        target: a loss on the new language.

    Returns:
        The loss on old text; None if the target was never reached.

    >>> at_equal_loss([4.0, 2.0, 1.0], [1.0, 3.0, 4.0], 1.5)
    3.5
    """
    for index, loss in enumerate(new):
        if loss <= target:
            if index == 0:
                return old[0]
            part = (new[index - 1] - target) / (new[index - 1] - loss)
            return old[index - 1] + part * (old[index] - old[index - 1])
    return None


def common_loss(curves: Mapping[str, Sequence[Curve]]) -> float:
    """The lowest loss on the new language that every arm reaches with one of its learning rates.

    Args:
        curves: the curves of each arm, one per learning rate.
    """
    return max(min(min(curve) for curve in curves) for curves in curves.values())
