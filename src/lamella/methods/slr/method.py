"""SLR, Selective Layer Restoration: restore the pre-trained weights of one range of layers to regain diversity.

Zhang, Wang and Soh, "Not All Layers Need Tuning: Selective Layer Restoration Recovers Diversity", arXiv 2602.06665.

    theta(R)_l = theta_l^pre  for l in R = [i, j),  theta_l^post elsewhere; embedding, final norm and head stay post

    proxy      Constrained Random Character: Q(R) mass on valid answers, D(R) entropy among them, one token each
    search     all contiguous ranges of whole layers
    rule       among those with Q(R) >= 0.9 Q(post), the largest D(R)

Nothing is trained, and the result costs as much as the post-trained model. The floor only holds for the proxy: evaluate
your own task afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from lamella.files import Work
from lamella.methods.slr.answers import answer
from lamella.methods.slr.baselines import compare_models, measure_soups
from lamella.methods.slr.diversity import diversity
from lamella.methods.slr.open_ended import open_questions
from lamella.methods.slr.pair import check_pair, check_same_tokens
from lamella.methods.slr.questions import Questions
from lamella.methods.slr.search import EMPTY, SearchResult, as_row, search
from lamella.plan import ModelReference, Plan, restore_edit
from lamella.registry import method
from lamella.results import Edit
from lamella.signature import Named
from lamella.stack import Stack
from lamella.zoo import open_tokenizer


@method(
    "slr",
    paper="2602.06665",
    purpose="repair",
    verb="restore",
    brief={"min_validity": 0.0, "min_quality": 0.0, "samples": 0},
)
def slr(
    stack: Stack,
    base: Stack,
    questions: Annotated[Questions, Named("data")],
    *,
    min_quality: Annotated[float, Ge(0), Le(1)] = 0.9,
    min_validity: Annotated[float, Ge(0), Le(1)] = 0.2,
    stride: Annotated[int, Ge(1)] = 1,
    samples: Annotated[int, Ge(0)] = 32,
    work: Work = Work(),
    seed: int = 0,
) -> Edit:
    """Restore the diversity of a post-trained model with the pre-trained weights of one range of its layers.

    Nothing is trained, and the result runs at the same cost. Questions with many correct answers, such as "a random
    vowel", are answered with one forward pass each. Every range of layers gets two scores: Q, the probability mass on
    correct answers, and D, how evenly it is spread over them. The range with the highest D whose Q is above the floor
    is selected, and reported on held-out questions together with soups of the two models and other ranges of the same
    length.

    The output folder contains an ordinary checkpoint with plan.json, evidence.json and report.html. An interrupted run
    of the same command resumes. The floor only holds for these questions: evaluate your own task before you use the
    result.

    Example: lamella restore org/model-instruct --base org/model -o diverse
    lamella restore instruct --base base --data questions.jsonl --stride 4 -o diverse

    Args:
        stack: the post-trained model.
        base: the model that it was trained from, before instruction or preference tuning.
        questions: the questions.
        min_quality: floor of Q, the mass on valid answers, as a fraction of the post-trained model's.
        min_validity: skip questions for which the post-trained model has less valid mass.
        stride: evaluate interval ends at every n-th layer first, then around the best; 1 evaluates every interval.
        samples: sampled answers to each of 12 open questions, before and after; 0 for none.
        work: the directory from which an interrupted search resumes, also for the restored tensors if the base is no
            folder.
        seed: random seed of random intervals and sampled answers.

    Returns:
        The plan, without weights if nothing is more diverse than the post-trained model, and all measurements.

    Raises:
        ArchitectureError, PlanError: if layers of one model cannot replace those of the other, by field or by tensor.
        CalibrationError: for questions that cannot be answered with one token.
        MethodError: for a stride larger than the number of layers, or questions that the model does not answer.
    """
    check_pair(stack, base)
    if questions.tokenizer is not None:
        check_same_tokens(questions.tokenizer, open_tokenizer(base.path or base.name))
    started = time.perf_counter()
    limits = {"min_quality": min_quality, "min_validity": min_validity}
    found = search(stack, base, questions.search, stride=stride, journal=work.journal("intervals"), **limits)
    seconds = time.perf_counter() - started
    plan = plan_of(stack, base, found, work.directory())
    edit = Edit(stack=stack, plan=plan)
    if found.chosen.what == EMPTY:
        edit.notes.append("No interval above the floor is more diverse than the post-trained model.")
    soups = measure_soups(stack, base, found.questions)
    report = []
    if questions.report is not None:
        quality = answer(stack, questions.report).quality.tolist()
        valid = [x for x, q in enumerate(quality) if q >= min_validity]
        report = compare_models(stack, base, found, soups, questions.report.select(valid), seed) if valid else []
        edit.notes += _warnings(report, min_quality)
    edit.findings |= {
        "base": base.name,
        "interval": plan.provenance["interval"],
        "search": {
            "post": as_row(found.post),
            "chosen": as_row(found.chosen),
            "points": [as_row(point) | {"feasible": found.feasible(point)} for point in found.points],
            "soups": {name: [as_row(point) for point in points] for name, points in soups.items()},
            "dropped": list(found.dropped),
            "questions": len(found.questions),
            "evaluations": len(found.points),
            "seconds": seconds,
        },
        "report": report,
    }
    if samples and questions.tokenizer is not None:
        edit.findings["open"] = {
            when: diversity(each, questions.tokenizer, open_questions(), samples=samples, seed=seed).as_dict()
            for when, each in (("before", stack.model), ("after", edit.view))
        }
    return edit


def plan_of(stack: Stack, base: Stack, found: SearchResult, folder: Path) -> Plan:
    """Create the plan that restores the chosen interval: whole layers, including their norms.

    Args:
        stack: the post-trained model.
        base: the pre-trained model.
        found: the result of the search.
        folder: the directory for a side file, if ``base`` is no folder that can be referenced.
    """
    i, j = found.chosen.what  # type: ignore[misc]
    edits = [restore_edit(stack, base, [f"layers.{layer}" for layer in range(i, j)], folder)] if i < j else []
    return Plan(
        model=ModelReference.of(stack),
        weights=edits,
        provenance={
            "interval": [i, j],
            "base": base.name,
            "q": found.chosen.quality,
            "d": found.chosen.diversity,
            "q_post": found.post.quality,
            "d_post": found.post.diversity,
            "min_quality": found.min_quality,
            "questions": len(found.questions),
            "dropped": list(found.dropped),
            "table": [[*point.what, point.quality, point.diversity] for point in found.points],  # type: ignore[misc]
        },
    )


def _warnings(report: list[dict[str, Any]], min_quality: float) -> list[str]:
    """Return warnings about the report."""
    if not report:
        return ["The post-trained model answers none of the held-out questions."]
    rows = {row["name"]: row for row in report}
    valid = rows["slr"]["quality"] / rows["post"]["quality"]
    if valid < min_quality:
        return [f"On held-out questions only {valid:.1%} of the validity remains, which is less than the floor."]
    return []
