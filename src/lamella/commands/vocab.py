"""Choose the tokens that a smaller vocabulary keeps: those that a text uses, and those that encode every other text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen

from lamella.data import ImageText, Text
from lamella.errors import MethodError, PlanError
from lamella.evaluate import ByteLoss, cost
from lamella.formatting import counted, number, percent
from lamella.plan import ModelReference, Plan, PlanSeries, Point, SeriesEvidence
from lamella.plan.tokenizer import Merges, cut_tokenizer, settings_of
from lamella.registry import command
from lamella.result import Evidence, Summary, Table
from lamella.runtime import apply
from lamella.signature import Settings, Split
from lamella.stack import Stack


@command("vocab", verb="vocab", brief={"sequences": 2, "length": 16})
def vocab(
    stack: Stack,
    calibration: Annotated[Text, Settings(sequences=8)],
    test: Annotated[Text | ImageText, Split("test")],
    *,
    coverage: Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], MinLen(1)] = (0.999,),
    keep: tuple[Annotated[int, Ge(1)], ...] = (),
) -> PlanSeries:
    """Choose the tokens that a smaller vocabulary keeps, by how often a text uses them.

    The result encodes every text: bytes and special tokens are always kept, and so are the parts from which kept tokens
    are merged. A text without removed tokens is encoded as before, and predicted as before among the kept tokens; any
    other text needs more tokens. As the tokens differ, models are compared by their loss per byte of a text.

    Example: lamella vocab smollm2 --calibration general --coverage 1,0.999,0.99 -o tokens
    lamella apply tokens/plan.json smollm2 -o smaller

    Args:
        stack: a decoder with a BPE tokenizer; it is not changed.
        calibration: the text whose tokens are counted, as a whole; give one like those that the model is for.
        test: another text, for evaluation.
        coverage: fractions of the text's tokens that are kept, one plan for each, from the highest.
        keep: numbers of tokens to keep at most, one plan for each, from the highest; instead of coverage.

    Returns:
        One plan for each coverage or number, after the whole model.

    Raises:
        PlanError: for a tokenizer that is not BPE on bytes or with all bytes to fall back to, or for fewer tokens than
            every text needs.
        MethodError: for a test on images.
    """
    if not isinstance(test, Text):
        raise MethodError("vocab compares losses per byte of a text: give a text as test, not images")
    tokenizer = calibration.tokenizer
    merges, reference = Merges(settings_of(tokenizer)), ModelReference.of(stack)
    counts = count_tokens(calibration)
    order = sorted(set(tokenizer.get_vocab().values()), key=lambda token: (-counts[token], token))
    if keep:
        vocabularies = [within(merges, order, size) for size in sorted(keep, reverse=True)]
    else:
        vocabularies = [covering(merges, order, counts, share) for share in sorted(coverage, reverse=True)]
    plans = [Plan(model=reference), *(Plan(model=reference, width={"vocab": kept}) for kept in vocabularies)]
    points = [Point(width=plan.width, scores=_scores(stack, plan, calibration, test, counts)) for plan in plans]
    findings = {"counted": counts.total(), "distinct": len(counts), "always": len(merges.always)}
    data = {"calibration": calibration.describe(), "test": test.describe()}
    return PlanSeries(model=reference, points=points, findings=findings, data=data)


def count_tokens(text: Text) -> Counter[int]:
    """Count the tokens of a whole text, not only of its windows.

    Args:
        text: the text.
    """
    parts = text.source.apart(text.tokenizer)
    return Counter(
        token for part in parts for token in text.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    )


def within(merges: Merges, order: Sequence[int], size: int) -> list[int]:
    """Return a vocabulary of at most this many tokens, ascending.

    Args:
        merges: the tokenizer.
        order: its tokens, the most important first.
        size: the maximum number of tokens.

    Raises:
        PlanError: if every text needs more.
    """
    kept = set(merges.always)
    if size < len(kept):
        raise PlanError(f"keep {size}: bytes and special tokens alone are {len(kept)} tokens: keep more")
    for token in order:
        parts = merges.parts(token) - kept
        if len(kept) + len(parts) > size:
            break
        kept |= parts
    return sorted(kept)


def covering(merges: Merges, order: Sequence[int], counts: Counter[int], share: float) -> list[int]:
    """Return the vocabulary of the most frequent tokens that are this share of a text, ascending.

    Args:
        merges: the tokenizer.
        order: its tokens, the most frequent first.
        counts: how often the text uses each.
        share: the share of the text's tokens.
    """
    kept = set(merges.always)
    covered = sum(counts[token] for token in kept)
    for token in order:
        if covered >= share * counts.total():
            break
        parts = merges.parts(token) - kept
        covered += sum(counts[part] for part in parts)
        kept |= parts
    return sorted(kept)


def _scores(stack: Stack, plan: Plan, calibration: Text, test: Text, counts: Counter[int]) -> dict[str, float]:
    """Return the measurements of a plan: the loss per byte of both texts, and what is kept."""
    view, tokenizer = stack.model, calibration.tokenizer
    kept: Sequence[int] = range(stack.config.vocab_size)
    if plan.vocab is not None:
        view, tokenizer, kept = apply(stack, plan), cut_tokenizer(tokenizer, plan.vocab), plan.vocab
    own, other = (ByteLoss.of(view, tokenizer, text.strings) for text in (calibration, test))
    return {
        "loss": own.loss.mean,
        "loss on the test": other.loss.mean,
        "tokens per byte": own.length,
        "tokens per byte of the test": other.length,
        "tokens": len(kept),
        "coverage": sum(counts[token] for token in kept) / counts.total(),
        "parameters": cost(stack, plan).parameters / cost(stack).parameters,
    }


def summary(evidence: Evidence) -> Summary:
    """Summarise the sizes of the vocabulary and what they cost.

    Args:
        evidence: the evidence of the series.
    """
    assert isinstance(evidence, SeriesEvidence)
    found, scores = evidence.findings, [point["scores"] for point in evidence.points]
    rows = [
        [
            index,
            f"{each['tokens']:,.0f}",
            percent(each["coverage"], 2),
            percent(each["parameters"]),
            number(each["loss"]),
            number(each["loss on the test"]),
            number(each["tokens per byte of the test"]),
        ]
        for index, each in enumerate(scores)
    ]
    verdict = f"{evidence.method} has made {counted(len(scores), 'plan')}, starting with the whole model"
    if scores:
        kept = counted(round(scores[-1]["tokens"]), "token")
        verdict += f"; the last keeps {kept} and {percent(scores[-1]['parameters'])} of the parameters"
    title = f"{counted(found['counted'], 'token')} counted, {found['distinct']:,} distinct; losses in nats per byte"
    columns = ["plan", "tokens", "coverage", "parameters", "loss", "loss on the test", "tokens per byte there"]
    return Summary(f"{verdict}.", [Table(title, columns, rows)])
