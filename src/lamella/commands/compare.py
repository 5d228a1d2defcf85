"""What methods learn of the same new text with the same tokens, and what each forgets for it."""

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
    """Check that each method learns from a text alone."""
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
    """What methods that adapt a model learn of one text by the same tokens, and what each forgets.

    Every method trains from the original for some fractions of the steps, with one batch in each step, and its own
    recipe otherwise. Learning is the loss on the test split of the new text; forgetting is how far the loss on old
    texts has risen, and the divergence from the original there. An interrupted comparison goes on.

    Example: lamella compare smollm2 --new manual.txt --old pydoc --method lora,layra,smora -o compared

    Args:
        stack: a decoder; it is not changed.
        new: the text to learn.
        old: texts like those that the model knows; nothing trains on them.
        method: methods; all that adapt a model to a text when left out.
        steps: optimizer steps of the longest run.
        batch: windows in a step.
        lr: learning rates to try for all steps; of each method the one with the lowest loss on further windows of the
            new text is reported. Its own rate when left out.
        at: fractions of the steps at which each method is trained from the start.
        work: where an interrupted run goes on from.
        seed: of all random draws.

    Returns:
        The points of each method.

    Raises:
        MethodError: for a method that does not learn from a text. Of methods that were not named, those that refuse the
            model are left out, and a note says why.
        CalibrationError: for a text that is too short.
    """
    entries = [_learner(get_method(name)) for name in method] if method else learners()
    length = new.tokens.shape[1]
    bench = Bench(stack, new, old, windows=steps * batch, length=length, least=batch, seed=seed)
    texts = {"new": new.source.name, "old": [each.source.name for each in old]}
    given = texts | {"steps": steps, "batch": batch, "length": length, "lr": list(lr), "at": list(at)}
    depends = {**given, "seed": seed, "model": ModelReference.of(stack).model_dump(mode="json")}
    finished = Finished(work.directory() / "points.jsonl", depends)

    counts = sorted({max(1, round(part * steps)) for part in at})

    def point(entry: Method, rate: float | None, count: int) -> dict[str, Any]:
        """What a method has learnt and lost after so many steps, with one rate."""
        asked = {"steps": count, "batch": batch, "accumulate": 1} | ({} if rate is None else {"lr": rate})
        name = f"{entry.slug}-{rate or 'own'}-{count}"
        found = finished.once(name, partial(bench.run, entry, asked, work.within(name)))
        return {"lr": rate, "steps": count, **found}

    def way(entry: Method) -> list[dict[str, Any]]:
        """The points of a method, with the rate that is best at the end."""
        *before, last = counts
        end = min((point(entry, rate, last) for rate in lr or (None,)), key=lambda each: each["choose"])
        return [*(point(entry, end["lr"], count) for count in before), end]

    points: dict[str, list[dict[str, Any]]] = {}
    left_out = []
    for entry in track(entries, "comparing methods"):
        try:
            points[entry.slug] = way(entry)
        except LamellaError as error:
            if method:  # it was asked for
                raise
            left_out.append(f"{entry.slug} is left out: {error}.")
    if not points:
        raise MethodError(f"no method can be compared on {stack.name}. {' '.join(left_out)}")
    findings = {"before": bench.judged(stack.model), "points": points}
    return Study(findings=findings, data=bench.data, notes=[*_notes(findings), *left_out])


class Bench:
    """The original, what is learnt, and the texts by which methods are judged.

    Args:
        stack: the original.
        new, old: texts.
        windows: how many of the new text are learnt, where it has so many; longer training sees them again.
        length: tokens in each.
        least: how many of the new text there must be.
        seed: of what is drawn.
    """

    def __init__(
        self, stack: Stack, new: Text, old: Sequence[Text], *, windows: int, length: int, least: int, seed: int
    ) -> None:
        self.stack, self.tokenizer, self.new = stack, new.tokenizer, new.source.name
        count = min(windows, available(self.tokenizer, self.new, length, least))
        self.given = {"sequences": count, "length": length, "seed": seed}
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

    def run(self, entry: Method, asked: dict[str, Any], work: Work) -> dict[str, Any]:
        """Train one method, count the tokens that it has read, and judge it."""
        given = {"stack": self.stack, **_texts(entry, self.new, next(iter(self.old))), **self.given}
        opening = Opening(entry, given)
        opening.known_tokenizer = self.tokenizer
        inputs = [opening(each) for each in entry.signature.inputs.values()]
        torch.manual_seed(self.given["seed"])
        result = entry(*inputs, **entry.signature.fill(asked, work, seed=self.given["seed"]))
        judged = self.judged(result.view if isinstance(result, Edit) else result.stack.model)
        return {"tokens": sum(log.samples for log in _logs(result)) * self.given["length"], **judged}

    @torch.no_grad()
    def judged(self, model: Any) -> dict[str, Any]:
        """The loss on the new text, to choose a rate by and to report, and what has become of the old ones."""
        old = {}
        for name, test in self.old.items():
            found = test.of(model)
            rise = math.log(found.perplexity.mean / found.base_perplexity.mean)
            old[name] = {"rise": rise, "kl": found.kl.mean, "error": found.kl.error}
        return {"choose": mean_loss(model, self.choose), "new": mean_loss(model, self.test), "old": old}


def learners() -> list[Method]:
    """All methods that adapt a model to a text, and need nothing but texts."""
    return [each for each in methods().values() if _is_learner(each)]


def _is_learner(entry: Method) -> bool:
    if entry.purpose != "adapt":
        return False
    wanted = [each for each in entry.signature.inputs.values() if each.default is EMPTY]
    return [each.name for each in wanted[:1]] == ["stack"] and len(wanted) > 1 and all(map(_is_text, wanted[1:]))


def _is_text(parameter: Parameter) -> bool:
    """Whether an input can be opened from any text, as its type says by ``reads_text``."""
    return bool(getattr(kind_of(parameter), "reads_text", False))


def _texts(entry: Method, new: str, old: str) -> dict[str, Any]:
    """What a method reads: the first text that it must be given is new, and one beside it stands for what is known."""
    _, first, *others = [each for each in entry.signature.inputs.values() if each.default is EMPTY]
    return {first.name: {"new": new} if first.is_mapping else new} | {each.name: old for each in others}


def _logs(result: Any) -> Iterable[TrainingLog]:
    """Of the training run of a result, or of several."""
    return result.logs.values() if hasattr(result, "logs") else [result.log]


def _learner(entry: Method) -> Method:
    if not _is_learner(entry):
        known = ", ".join(each.slug for each in learners())
        raise MethodError(f"{entry.slug} does not learn from a text alone; these do: {known}")
    return entry


def rise(point: dict[str, Any]) -> float:
    """By how much the loss on old texts has risen, the mean over them, in nats."""
    return fmean(each["rise"] for each in point["old"].values())


def _notes(findings: dict[str, Any]) -> list[str]:
    """Who learns most, and who forgets least."""
    before, points = findings["before"]["new"], findings["points"]
    ends = {name: run[-1] for name, run in points.items()}
    most = min(ends, key=lambda name: ends[name]["new"])
    least = min(ends, key=lambda name: rise(ends[name]))
    if most == least:
        return [f"{most} learns most and forgets least."]

    def said(name: str) -> str:
        learnt = before - ends[name]["new"]
        return f"{learnt:.3f} nats of the new text are learnt, and old ones cost {rise(ends[name]):+.3f}"

    return [f"{most} learns most: {said(most)}.", f"{least} forgets least: {said(least)}."]


def summary(evidence: Evidence) -> Summary:
    """Where each method ends, in words and a table."""
    before, points = evidence.findings["before"], evidence.findings["points"]
    rows = [["before", "", "", before["new"], 0.0, 0.0]]
    for name, run in points.items():
        for point in run:
            kl = fmean(each["kl"] for each in point["old"].values())
            rows.append([name, point["lr"] or "its own", point["tokens"], point["new"], rise(point), kl])
    columns = ["method", "rate", "tokens", "new text, nats", "old texts, rise in nats", "KL from the original there"]
    name = (evidence.model or {}).get("name", "the model")
    verdict = f"{name} was taught the same text by {counted(len(points), 'method')}."
    return Summary(verdict, [Table("Learnt and forgotten", columns, rows)])


def figures(evidence: Evidence) -> list[Figure]:
    """Each method's way: to the left has learnt more, below has forgotten less."""
    before, points = evidence.findings["before"], evidence.findings["points"]
    ways = {name: [(before["new"], 0.0), *((each["new"], rise(each)) for each in run)] for name, run in points.items()}
    return [Scatter("loss on the new text, nats", "rise on old texts, nats", ways, joined=True)]
