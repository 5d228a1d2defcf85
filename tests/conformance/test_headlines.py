"""The headline of every result and the lines beside it: on what a run has found, on nothing, on one, on negatives.

A command is run once; the numbers of its evidence are then replaced, so that every count is 0 or 1, or every measured
value negative. Whatever the numbers are, the sentences must be sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from worlds import COMMANDS, made

from lamella.formatting import MINUS, MISSING
from lamella.registry import submodule
from lamella.result import Summary
from lamella.results import PlanSeries, SeriesEvidence

Number = Callable[[Any], Any]
WRITTEN = ("findings", "points", "curve", "held_out", "fidelity", "before", "removed")  # what runs measure
CASES: dict[str, Number] = {
    "typical": lambda value: value,
    "empty": lambda value: type(value)(0),
    "one": lambda value: type(value)(1),
    "negative": lambda value: -abs(value) if isinstance(value, float) else value,
}
NONSENSE = {
    "a number that is not there": rf"{MISSING}|\b(None|nan|inf)\b",
    "a plural of one": r"(?<![\d.,])1 (?!is\b|was\b|has\b|less\b|nats\b)[a-z]+[^s\W]s\b",
    "a minus that is a hyphen": r"(?<![\w.)-])-\d",
    "a negative zero": rf"[-{MINUS}]0(\.0+)?(?![\d.])",
    "more than four digits": r"(?<![\d.,])(?=\d*\.\d)[0.]*(?:[1-9]\.?(?:\d\.?){4,})(?![\d,]*,)",
    "a negative number of things": rf"(?<!\w)[-{MINUS}][\d.,]+ of ",
    "a change to the same": r"(\d[\d.,]* %), not \1",
    "a range of one": r"s (\d+) to \1\b",
    "nothing between commas or before a stop": r" [,.;:]|, ,|\(\)|  ",
}


def replaced(value: Any, number: Number) -> Any:
    """The same document with other numbers; lists of numbers, such as layers, stay what they are."""
    if isinstance(value, dict):
        return {name: replaced(each, number) for name, each in value.items()}
    if isinstance(value, list):
        return [replaced(each, number) if isinstance(each, dict | list) else each for each in value]
    return value if value is None or isinstance(value, bool | str) else number(value)


def summary_of(command: str, case: str) -> Summary:
    """What a command says where its evidence has other numbers."""
    entry, kind = COMMANDS[command], COMMANDS[command].signature.result
    evidence = kind.evidence.read(made(command).out)
    for name in set(WRITTEN) & set(evidence.__dict__):
        setattr(evidence, name, replaced(getattr(evidence, name), CASES[case]))
    summary: Summary = getattr(submodule(entry.slug, "page"), "summary", kind.summary)(evidence)
    return summary


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_headline_is_a_sentence_whatever_was_found(command: str, case: str) -> None:
    summary = summary_of(command, case)
    assert summary.verdict.endswith(".") and summary.verdict == summary.verdict.strip()
    for text in (summary.verdict, *summary.lines):
        wrong = [f"{what}: {text}" for what, pattern in NONSENSE.items() if re.search(pattern, text)]
        assert not wrong


@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_headline_of_fewer_plans_sites_and_steps_is_a_sentence(command: str, points: int) -> None:
    entry, kind = COMMANDS[command], COMMANDS[command].signature.result
    evidence = kind.evidence.read(made(command).out)
    for name in {"points", "curve", "held_out", "sites"} & set(evidence.__dict__):
        setattr(evidence, name, getattr(evidence, name)[:points])
    summary = getattr(submodule(entry.slug, "page"), "summary", kind.summary)(evidence)
    for text in (summary.verdict, *summary.lines):
        assert not [what for what, pattern in NONSENSE.items() if re.search(pattern, text)], text


# What single headlines said that was wrong.


def said(command: str, **changes: Any) -> str:
    """Verdict and lines of a command with some of its findings changed; a change may be a function of the finding."""
    entry, kind = COMMANDS[command], COMMANDS[command].signature.result
    evidence = kind.evidence.read(made(command).out)
    for name, change in changes.items():
        evidence.findings[name] = change(evidence.findings[name]) if callable(change) else change
    summary = getattr(submodule(entry.slug, "page"), "summary", kind.summary)(evidence)
    return " | ".join([summary.verdict, *summary.lines])


def test_an_iou_is_in_percent_as_the_headline_says() -> None:
    ious = {"iou": {"1": 0.0093}, "clicks": {}}
    assert "the mean IoU is 0.9 %, over 1 scene." in said("agile3d judge", **{"agile3d": ious, "nearest click": ious})


def test_folded_norms_are_a_change() -> None:
    folded = made("slab fold").outcome.evidence.findings["norms"]
    assert sum(each["folded"] for each in folded) == 3
    assert f"Folded into the next layers: 3 of {len(folded)} norms" in said("slab fold")
    assert "nothing" not in said("slab fold")


def test_layers_below_a_threshold_are_not_called_above_it() -> None:
    model = made("dllm-skip study").outcome.evidence.findings["model"]
    assert "every layer changes the residual stream (no cosine of input and output is above 0.950)" in said(
        "dllm-skip study", model=model | {"plateau": [0, 0]}
    )
    assert "layer 2 hardly changes the residual stream (cosine above 0.950)" in said(
        "dllm-skip study", model=model | {"plateau": [2, 3]}
    )


def test_what_has_not_changed_is_as_before() -> None:
    same = {"preferred": 0.0, "habit": None}
    before, after = (made("irepair").outcome.evidence.findings[when] | same for when in ("before", "after"))
    assert "prefers the good continuation in 0.0 % of pairs, as before" in said("irepair", before=before, after=after)
    assert "prefers the good continuation in 50.0 % of pairs, previously 0.0 %" in said(
        "irepair", before=before, after=after | {"preferred": 0.5}
    )


def test_what_was_not_measured_has_no_line() -> None:
    near = {"own": None, "another": None, "halves": None}
    assert "osine" not in said("wrap", similarity=lambda found: found | near)
    assert "a rephrase and its own passage 0.500." in said("wrap", similarity=lambda found: found | near | {"own": 0.5})
    assert "|" not in said("rewire", sets=lambda found: found | {"overlap": None, "spearman": None})


@pytest.mark.parametrize(
    ("mean", "headline"),
    [
        (-20.8, "no lost information is recovered (restoration −20.8, interval −30.0 to 0.100)"),  # noqa: RUF001
        (0.25, "25.0 % of the lost information is recovered (−3000.0 % to 10.0 %)"),  # noqa: RUF001
        (None, "no information is lost with this schedule"),
    ],
)
def test_a_loss_that_grows_does_not_come_back(mean: float | None, headline: str) -> None:
    restored = {"mean": mean, "low": -30.0, "high": 0.1}
    tasks = made("dmllm-token-redundancy").outcome.evidence.findings["tasks"]
    changed = {name: each | {"restoration": restored} for name, each in tasks.items()}
    assert headline in said("dmllm-token-redundancy", tasks=changed)


def test_a_series_of_one_plan_has_one() -> None:
    evidence = SeriesEvidence(kind="series", provenance={"method": "it"}, environment={}, points=[])
    evidence.points = [{"removed": 0, "masked": 0, "scores": {}}]
    assert PlanSeries.summary(evidence).verdict == "it has made 1 plan, starting with the whole model."
