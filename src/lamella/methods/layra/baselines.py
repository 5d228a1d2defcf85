"""What LayRA must be compared with: the same training in other places, of other sizes, and of all weights.

Every method has a rate of its own, so each is trained with several, and the fair question is what a method has
forgotten *when it has learnt as much as the others* (:func:`at_equal_loss`), beside where it ends
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
from lamella.methods.layra.recipe import Shape, adapted, learn
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
class Arm:
    """One way of learning a language.

    Attributes:
        name: of the arm.
        layers: which of them train; None: every weight of the model.
        r: rank of the adapters; None trains the weights themselves.
        replay: share of each batch that is old text, where there is some; an upper bound for methods without.
    """

    name: str
    layers: tuple[int, ...] | None
    r: int | None
    replay: float = 0.0


def arms(edges: Edges, r: int = 8, replay: float = 0.0) -> dict[str, Arm]:
    """LayRA and its controls: other places of the same size, all layers, and full rank.

    Args:
        edges: S.
        r: of LayRA.
        replay: alpha of the upper bound with old text; 0 leaves it out.
    """
    size, whole = len(edges.indices), tuple(range(edges.layers))
    middle = (edges.layers - size) // 2
    known = [
        Arm("full", None, None),
        Arm("full, same layers", edges.indices, None),
        Arm("lora", whole, r),
        Arm("lora, same parameters", whole, max(1, round(r * size / edges.layers))),
        Arm("layra", edges.indices, r),
        Arm("lora, middle", whole[middle : middle + size], r),
        Arm("lora, first", whole[:size], r),
        Arm("lora, last", whole[-size:], r),
    ]
    if replay:
        known.append(Arm("layra, replay", edges.indices, r, replay))
    return {arm.name: arm for arm in known}


@dataclass(frozen=True)
class Course:
    """What one arm did with one rate, language by language.

    Attributes:
        arm: its name.
        lr: the highest rate.
        trainable: how many numbers trained.
        rows: bits per byte of every language: before, and after each language was learnt.
        curve: the same while the first of them was learnt, by language.
    """

    arm: str
    lr: float
    trainable: int
    rows: list[dict[str, float]]
    curve: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; ``Course(**...)`` makes it again."""
        return asdict(self)


def follow(
    stack: Stack,
    arm: Arm,
    languages: Mapping[str, Language],
    watched: Mapping[str, Language],
    config: TrainConfig,
    *,
    work: Path,
    curves: Sequence[str] = (),
    old: Sequence[Sample] = (),
    alpha: int = 16,
) -> tuple[Course, Stack]:
    """Learn languages one after the other, each from where the one before ended.

    Args:
        stack: the model; it is not changed.
        arm: how.
        languages: what to learn, in this order.
        watched: whose held-out text is measured, these languages among them.
        curves: for which of them it is also measured on the way, every ``config.eval_every`` steps of the first.
        config: rate, length and seed, as of :func:`lamella.methods.layra.layra`.
        work: a folder for checkpoints; called again, also with more languages behind these, it goes on.
        old: old text, for an arm that replays.
        alpha: of adapters.
    """
    if arm.replay and not old:
        raise MethodError(f"'{arm.name}' replays old text: give some, or leave it out")
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
    return Course(arm.name, config.lr or 0.0, trainable, rows, curve), current


def _step(
    stack: Stack, arm: Arm, samples: Sequence[Sample], config: TrainConfig, alpha: int, job: dict[str, Any]
) -> tuple[Stack, int, TrainingLog]:
    """One language: the model after it, how many numbers trained, and the log."""
    if arm.r is not None:
        sites = sites_of_layers(arm.layers or tuple(range(len(stack))))
        view, lora = adapted(stack, sites, Shape(arm.r, alpha), config.seed)
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


# What was forgotten when as much was learnt


def at_equal_loss(new: Curve, old: Curve, target: float) -> float | None:
    """The loss on old text at the moment when that on the new language first reached ``target``.

    Between two points of a curve both losses are taken to move in a straight line.

    Args:
        new, old: the two losses at the same steps, from before the first.
        target: a loss on the new language.

    Returns:
        None when the target was never reached.

    >>> at_equal_loss([4.0, 2.0, 1.0], [1.0, 3.0, 4.0], 1.5)
    3.5
    """
    for place, loss in enumerate(new):
        if loss <= target:
            if place == 0:
                return old[0]
            part = (new[place - 1] - target) / (new[place - 1] - loss)
            return old[place - 1] + part * (old[place] - old[place - 1])
    return None


def common_loss(courses: Mapping[str, Sequence[Curve]]) -> float:
    """The lowest loss on the new language that every arm reaches with one of its rates.

    Args:
        courses: the curves of each arm, one for each rate.
    """
    return max(min(min(curve) for curve in curves) for curves in courses.values())
