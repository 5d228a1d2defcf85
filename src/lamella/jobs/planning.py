"""Planning by name: one method, one model, one series; and the point of a series that answers a target."""

from __future__ import annotations

from typing import Any

from lamella.data import ImageText, Reader, Text
from lamella.errors import BudgetError, MethodError
from lamella.evaluate import StepTimes
from lamella.measure import Tokens, sequences
from lamella.plan import PlanSeries
from lamella.registry import check_takes, get_method
from lamella.stack import Stack
from lamella.train import Sample, blocks
from lamella.zoo import open_for

PLANS = "PlanSeries"  # what a planning method returns


def make_plan(slug: str, model: Any, calibration: Tokens | None = None, **options: Any) -> PlanSeries:
    """Run one planning method.

    Args:
        slug: a method of kind plan or policy; see :func:`lamella.methods`.
        model: anything that :func:`lamella.open` takes. Of several stacks, the only one that the method works on.
        calibration: token ids [sequences, time], or images with text, for the methods that need them.
        options: the method's own options.

    Raises:
        MethodError: for an unknown method or option, or one that makes no plans.
    """
    entry = get_method(slug)
    if entry.result != PLANS:
        raise MethodError(f"{slug} returns a {entry.result} and makes no plan; `lamella methods` says what does")
    stack = open_for(entry, model)
    check_takes(slug, entry.on, stack)
    if not entry.text and not entry.samples:
        return entry(stack, **options)
    if calibration is None:
        raise MethodError(f"{slug} needs calibration tokens [sequences, time]: make them with lamella.windows")
    if isinstance(calibration, ImageText) and not entry.reads_images:
        raise MethodError(f"{slug} plans on text, not on images: give a text")
    if entry.samples:
        return entry(stack, **{entry.samples: continuations(calibration)}, **options)
    return entry(stack, **{entry.text: calibration}, **options)


def planned_on(stack: Stack, reader: Reader, name: str, *, sequences: int, length: int, rows: int) -> Text | ImageText:
    """What a plan is made on: windows of a text, or rows of images with text where the source holds such.

    Args:
        name: of the source.
        sequences, length: windows of a text, and tokens in each.
        rows: of images with text.
    """
    if ImageText.fits(stack, name):
        return ImageText.open(name, reader, rows=rows)
    return Text.open(name, reader, sequences=sequences, length=length)


def continuations(calibration: Tokens) -> list[Sample]:
    """Sequences as samples: the first quarter of each is the prompt, the rest its answer; padding is left out."""
    rows = []
    for row in sequences(calibration):
        ids = row["input_ids"][0]
        rows.append(ids[row["attention_mask"][0].bool()] if "attention_mask" in row else ids)
    return [sample for ids in rows for sample in blocks(ids[None].cpu(), max(len(ids) // 4, 1))]


def first_reaching(series: PlanSeries, times: StepTimes, speedup: float) -> int:
    """The point of the series with the fewest sublayers removed whose predicted decode speed-up reaches the target.

    Raises:
        BudgetError: when none does; the message says the highest that can be reached.
    """
    predicted = [times.speedup(plan) for plan in series]
    reaching = [index for index, value in enumerate(predicted) if value >= speedup]
    if not reaching:
        name = series.provenance.get("method", "this series")
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached by {name}: {max(predicted):.2f} is the highest it can"
        )
    return min(reaching, key=lambda index: series[index].removed)


def ceiling(stack: Stack, times: StepTimes) -> float:
    """The decode speed-up with a single MLP sublayer left: more than any plan can bring."""
    return times.speedup_without(stack.positions[:-1], len(stack))
