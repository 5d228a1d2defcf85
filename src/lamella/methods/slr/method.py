"""SLR, Selective Layer Restoration: pre-trained weights back in one range of layers, and diversity with them.

Zhang, Wang and Soh, "Not All Layers Need Tuning: Selective Layer Restoration Recovers Diversity", arXiv 2602.06665.

    theta(R)_l = theta_l^pre  for l in R = [i, j),  theta_l^post elsewhere; embedding, final norm and head stay post

    proxy      Constrained Random Character: Q(R) mass on valid answers, D(R) entropy among them, one token each
    search     every contiguous range of whole layers
    rule       of those with Q(R) >= 0.9 Q(post), the largest D(R)

Nothing is trained, and the result costs what the post-trained model costs. The floor is a promise about the proxy
alone: look at the task that matters afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from lamella.files import Work
from lamella.methods.slr.answers import answer
from lamella.methods.slr.baselines import compared, soups_of
from lamella.methods.slr.diversity import diversity
from lamella.methods.slr.open_ended import open_questions
from lamella.methods.slr.pair import check_pair, check_same_tokens
from lamella.methods.slr.questions import Questions
from lamella.methods.slr.search import EMPTY, Blends, said, search
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
    """Bring diversity back to a model that always says the same: pre-trained weights in one range of its layers.

    Nothing is trained, and the result runs at the same cost. Questions with many right answers, such as "a random
    vowel", are answered by one forward pass each. Every range of layers gets two figures: Q, the mass on right answers,
    and D, how evenly it is spread over them. The range of the highest D is taken whose Q stays above the floor, and
    reported on other questions, beside soups of the two models and other ranges of the same length.

    The folder gets an ordinary checkpoint with plan.json, evidence.json and report.html. Killed, the same command goes
    on where it was. The floor holds for these questions: check your own task before you use the result.

    Example: lamella restore org/model-instruct --base org/model -o diverse
    lamella restore instruct --base base --data questions.jsonl --stride 4 -o diverse

    Args:
        stack: the post-trained model.
        base: the model that it was trained from, before instructions or preferences.
        questions: what to ask.
        min_quality: floor of Q, the mass on valid answers, as a share of the post-trained model's.
        min_validity: leave out questions that the post-trained model answers with less valid mass.
        stride: look at every n-th layer first, then around the best; 1 looks at every interval.
        samples: answers to sample to each of 12 open questions, before and after; 0: none.
        work: where an interrupted search goes on from, and for the restored tensors where the base is no folder.
        seed: of random intervals and sampled answers.

    Returns:
        The plan, without weights where nothing is more diverse than the post-trained model, and all that was measured.

    Raises:
        ArchitectureError, PlanError: when layers of one cannot stand in the other, field by field, tensor by tensor.
        CalibrationError: for questions that cannot be answered with one token.
        MethodError: for a stride of more than all layers, or questions that the model does not answer.
    """
    check_pair(stack, base)
    if questions.tokenizer is not None:
        check_same_tokens(questions.tokenizer, open_tokenizer(base.path or base.name))
    began = time.perf_counter()
    asked = {"min_quality": min_quality, "min_validity": min_validity}
    found = search(stack, base, questions.search, stride=stride, journal=work.journal("intervals"), **asked)
    seconds = time.perf_counter() - began
    plan = plan_of(stack, base, found, work.directory())
    edit = Edit(stack=stack, plan=plan)
    if found.chosen.what == EMPTY:
        edit.notes.append("No interval that keeps the floor is more diverse than the post-trained model.")
    soups = soups_of(stack, base, found.asked)
    report = []
    if questions.report is not None:
        quality = answer(stack, questions.report).quality.tolist()
        kept = [x for x, q in enumerate(quality) if q >= min_validity]
        report = compared(stack, base, found, soups, questions.report.some(kept), seed) if kept else []
        edit.notes += _doubts(report, min_quality)
    edit.findings |= {
        "base": base.name,
        "interval": plan.provenance["interval"],
        "search": {
            "post": said(found.post),
            "chosen": said(found.chosen),
            "points": [said(point) | {"feasible": found.feasible(point)} for point in found.points],
            "soups": {name: [said(point) for point in points] for name, points in soups.items()},
            "dropped": list(found.dropped),
            "questions": len(found.asked),
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


def plan_of(stack: Stack, base: Stack, found: Blends, folder: Path) -> Plan:
    """The plan that restores the chosen interval: whole layers, with their norms.

    Args:
        folder: for a side file, where ``base`` is no folder that can be named.
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
            "questions": len(found.asked),
            "dropped": list(found.dropped),
            "table": [[*point.what, point.quality, point.diversity] for point in found.points],  # type: ignore[misc]
        },
    )


def _doubts(report: list[dict[str, Any]], min_quality: float) -> list[str]:
    """What the reader must know of the report."""
    if not report:
        return ["The post-trained model answers none of the questions to report on."]
    rows = {row["name"]: row for row in report}
    kept = rows["slr"]["quality"] / rows["post"]["quality"]
    if kept < min_quality:
        return [f"On questions that nothing was chosen on, {kept:.1%} of the validity is left: less than the floor."]
    return []
