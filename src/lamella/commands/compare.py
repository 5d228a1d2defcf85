"""Compare methods that adapt a model to a text: what each learns from the same tokens, and what it forgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, MinLen, Predicate

from lamella.commands.heal.training import available
from lamella.data import Text, load_text
from lamella.data import windows as cut
from lamella.errors import LamellaError, MethodError
from lamella.evaluate import FidelityTest
from lamella.files import Finished, Work
from lamella.formatting import counted
from lamella.inputs import Opening
from lamella.plan import ModelReference
from lamella.progress import track
from lamella.registry import Method, command, get_method, methods
from lamella.report.figures import Figure, Scatter
from lamella.result import Evidence, Summary, Table
from lamella.results import Edit, Study
from lamella.signature import EMPTY, Parameter, Settings, kind_of
from lamella.stack import Stack
from lamella.train import TrainingLog, blocks, mean_loss

TESTED = 8  # windows of each text


def _learn(names: Sequence[str]) -> bool:
    """Check that each method learns from a text only."""
    return all(_learner(get_method(name)) for name in names)


@command(
    "compare",
    verb="compare",
    brief={"new": "pydoc", "old": ["pydoc"], "method": ("lora",), "steps": 2, "batch": 2, "length": 16, "at": (1.0,)},
)
def compare(
    stack: Stack,
    new: Annotated[Text, Settings(sequences=1)],
    old: Annotated[tuple[Text, ...], Settings(sequences=1)],
    *,
    method: Annotated[tuple[str, ...], Predicate(_learn)] = (),
    steps: Annotated[int, Ge(1)] = 64,
    batch: Annotated[int, Ge(1)] = 4,
    lr: tuple[Annotated[float, Gt(0)], ...] = (),
    at: Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], MinLen(1)] = (0.25, 0.5, 1.0),
    work: Work = Work(),
    seed: int = 0,
) -> Study:
    """Compare methods that adapt a model to a text: what each learns from the same tokens, and what it forgets.

    Every method trains from the original for several fractions of the steps, with one batch per step, and otherwise by
    its own recipe. Learning is the loss on the test split of the new text; forgetting is the increase of the loss on
    old texts, and the divergence from the original there. An interrupted comparison resumes.

    Example: lamella compare smollm2 --new manual.txt --old pydoc --method lora,layra,smora -o compared

    Args:
        stack: a decoder; it is not changed.
        new: the text to learn.
        old: texts like those that the model knows; they are not trained on.
        method: methods; defaults to all that adapt a model to a text.
        steps: optimizer steps of the longest run.
        batch: windows in a step.
        lr: learning rates to try for all steps; for each method the one with the lowest loss on validation windows of
            the new text is reported. Defaults to the method's own rate.
        at: fractions of the steps at which each method is evaluated, each trained from the start.
        work: folder from which an interrupted run resumes.
        seed: random seed.

    Returns:
        The points of each method.

    Raises:
        MethodError: for a method that does not learn from a text. If no methods are named, those that refuse the model
            are skipped with a note.
        CalibrationError: if a text is too short.
    """
    entries = [_learner(get_method(name)) for name in method] if method else learners()
    length = new.tokens.shape[1]
    bench = Bench(stack, new, old, windows=steps * batch, length=length, least=batch, seed=seed)
    texts = {"new": new.source.name, "old": [each.source.name for each in old]}
    settings = texts | {"steps": steps, "batch": batch, "length": length, "lr": list(lr), "at": list(at)}
    depends = {**settings, "seed": seed, "model": ModelReference.of(stack).model_dump(mode="json")}
    finished = Finished(work.directory() / "points.jsonl", depends)

    counts = sorted({max(1, round(part * steps)) for part in at})

    def point(entry: Method, rate: float | None, count: int) -> dict[str, Any]:
        """Train a method for a number of steps with one learning rate, and evaluate it."""
        options = {"steps": count, "batch": batch, "accumulate": 1} | ({} if rate is None else {"lr": rate})
        name = f"{entry.slug}-{rate or 'own'}-{count}"
        found = finished.once(name, partial(bench.run, entry, options, work.within(name)))
        return {"lr": rate, "steps": count, **found}

    def points_of(entry: Method) -> list[dict[str, Any]]:
        """Return the points of a method, with the learning rate that is best at the end."""
        *before, last = counts
        end = min((point(entry, rate, last) for rate in lr or (None,)), key=lambda each: each["choose"])
        return [*(point(entry, end["lr"], count) for count in before), end]

    points: dict[str, list[dict[str, Any]]] = {}
    skipped = []
    for entry in track(entries, "comparing methods"):
        try:
            points[entry.slug] = points_of(entry)
        except LamellaError as error:
            if method:  # it was named
                raise
            skipped.append(f"{entry.slug} is skipped: {error}.")
    if not points:
        raise MethodError(f"no method can be compared on {stack.name}. {' '.join(skipped)}")
    findings = {"before": bench.evaluated(stack.model), "points": points}
    return Study(findings=findings, data=bench.data, notes=[*_notes(findings), *skipped])


class Bench:
    """The original, the texts to learn, and the texts for evaluation.

    Args:
        stack: the original.
        new: the text to learn.
        old: texts for measuring forgetting.
        windows: number of windows of the new text to train on, if there are that many; longer training repeats them.
        length: tokens in each.
        least: minimum number of windows of the new text.
        seed: random seed.
    """

    def __init__(
        self, stack: Stack, new: Text, old: Sequence[Text], *, windows: int, length: int, least: int, seed: int
    ) -> None:
        self.stack, self.tokenizer, self.new = stack, new.tokenizer, new.source.name
        count = min(windows, available(self.tokenizer, self.new, length, least))
        self.settings = {"sequences": count, "length": length, "seed": seed}
        source = load_text(self.new, "test")
        tokens = cut(self.tokenizer, source, 2 * TESTED, length, seed)
        self.data = {"new": source.provenance(tokens)}
        self.choose, self.test = (blocks(part, loss_on="all") for part in tokens.split(TESTED))
        self.old = {}
        for name in (each.source.name for each in old):
            source = load_text(name, "test")
            tokens = cut(self.tokenizer, source, TESTED, length, seed)
            self.old[name] = FidelityTest(stack, tokens)
            self.data[f"old: {name}"] = source.provenance(tokens)

    def run(self, entry: Method, options: dict[str, Any], work: Work) -> dict[str, Any]:
        """Train one method, count the tokens that it has seen, and evaluate it.

        Args:
            entry: the method.
            options: options of the method.
            work: folder of the training.
        """
        given = {"stack": self.stack, **_texts(entry, self.new, next(iter(self.old))), **self.settings}
        opening = Opening(entry, given)
        opening.known_tokenizer = self.tokenizer
        inputs = [opening(each) for each in entry.signature.inputs.values()]
        torch.manual_seed(self.settings["seed"])
        result = entry(*inputs, **entry.signature.fill(options, work, seed=self.settings["seed"]))
        scores = self.evaluated(result.view if isinstance(result, Edit) else result.stack.model)
        return {"tokens": sum(log.samples for log in _logs(result)) * self.settings["length"], **scores}

    @torch.no_grad()
    def evaluated(self, model: Any) -> dict[str, Any]:
        """Return the loss on validation and test windows of the new text, and the changes on the old texts.

        Args:
            model: the model.
        """
        old = {}
        for name, test in self.old.items():
            found = test.of(model)
            rise = math.log(found.perplexity.mean / found.base_perplexity.mean)
            old[name] = {"rise": rise, "kl": found.kl.mean, "error": found.kl.error}
        return {"choose": mean_loss(model, self.choose), "new": mean_loss(model, self.test), "old": old}


def learners() -> list[Method]:
    """Return all methods that adapt a model to a text, and need no other inputs."""
    return [each for each in methods().values() if _is_learner(each)]


def _is_learner(entry: Method) -> bool:
    if entry.purpose != "adapt":
        return False
    required = [each for each in entry.signature.inputs.values() if each.default is EMPTY]
    return [each.name for each in required[:1]] == ["stack"] and len(required) > 1 and all(map(_is_text, required[1:]))


def _is_text(parameter: Parameter) -> bool:
    """Return whether an input can be opened from any text, as its type declares by ``reads_text``."""
    return bool(getattr(kind_of(parameter), "reads_text", False))


def _texts(entry: Method, new: str, old: str) -> dict[str, Any]:
    """Return the inputs of a method: its first required text is the new text, and another stands for known text."""
    _, first, *others = [each for each in entry.signature.inputs.values() if each.default is EMPTY]
    return {first.name: {"new": new} if first.is_mapping else new} | {each.name: old for each in others}


def _logs(result: Any) -> Iterable[TrainingLog]:
    """Return the training logs of a result."""
    return result.logs.values() if hasattr(result, "logs") else [result.log]


def _learner(entry: Method) -> Method:
    if not _is_learner(entry):
        known = ", ".join(each.slug for each in learners())
        raise MethodError(f"{entry.slug} does not learn from a text only; these do: {known}")
    return entry


def rise(point: dict[str, Any]) -> float:
    """Return the mean increase of the loss on old texts, in nats.

    Args:
        point: a point of a method.
    """
    return fmean(each["rise"] for each in point["old"].values())


def _notes(findings: dict[str, Any]) -> list[str]:
    """Say which method learns most, and which forgets least."""
    before, points = findings["before"]["new"], findings["points"]
    ends = {name: run[-1] for name, run in points.items()}
    most = min(ends, key=lambda name: ends[name]["new"])
    least = min(ends, key=lambda name: rise(ends[name]))
    if most == least:
        return [f"{most} learns most and forgets least."]

    def described(name: str) -> str:
        learnt = before - ends[name]["new"]
        return (
            f"the loss on the new text falls by {learnt:.3f} nats, that on old texts changes by {rise(ends[name]):+.3f}"
        )

    return [f"{most} learns most: {described(most)}.", f"{least} forgets least: {described(least)}."]


def summary(evidence: Evidence) -> Summary:
    """Summarise the points of each method in a table.

    Args:
        evidence: the evidence of the comparison.
    """
    before, points = evidence.findings["before"], evidence.findings["points"]
    rows = [["before", "", "", before["new"], 0.0, 0.0]]
    for name, run in points.items():
        for point in run:
            kl = fmean(each["kl"] for each in point["old"].values())
            rows.append([name, point["lr"] or "default", point["tokens"], point["new"], rise(point), kl])
    columns = [
        "method",
        "learning rate",
        "tokens",
        "loss on the new text, nats",
        "increase on old texts, nats",
        "KL from the original on old texts, nats",
    ]
    name = (evidence.model or {}).get("name", "the model")
    verdict = f"{name} was trained on the same text by {counted(len(points), 'method')}."
    return Summary(verdict, [Table("Learnt and forgotten", columns, rows)])


def figures(evidence: Evidence) -> list[Figure]:
    """Plot each method from start to end: points to the left have learnt more, lower points have forgotten less.

    Args:
        evidence: the evidence of the comparison.
    """
    before, points = evidence.findings["before"], evidence.findings["points"]
    curves = {
        name: [(before["new"], 0.0), *((each["new"], rise(each)) for each in run)] for name, run in points.items()
    }
    return [Scatter("loss on the new text, nats", "increase of the loss on old texts, nats", curves, joined=True)]
