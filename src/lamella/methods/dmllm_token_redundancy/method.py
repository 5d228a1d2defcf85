"""Visual token redundancy of masked-diffusion models: whether, where and when image tokens can be dropped.

Li et al., "A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal Large Language
Models", CVPR 2026 Findings, arXiv 2511.15098.

    [ question | image | answer, partly masked ]  all of it, in every layer of every denoising step

Image tokens are dropped between the attention and the MLP of one layer in one step, permanently. The paper's finding:
models trained to denoise from scratch lose image information and recover it in later steps, if their answers are long;
models adapted from autoregressive ones do not, and should rather let image tokens skip layers. The study measures what
is lost and recovered for a given model and questions, and recommends a schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from lamella.data import ImageText
from lamella.data.processing import ImageTextRow
from lamella.errors import MethodError
from lamella.measure.image_tokens import CriterionName
from lamella.methods.dmllm_token_redundancy.probe import attention_mass, follow, information_loss, restoration
from lamella.methods.dmllm_token_redundancy.schedule import (
    LayerWidths,
    RequestLengths,
    VisualTokenSchedule,
    flops,
    running,
)
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import command, method
from lamella.results import Study
from lamella.runtime import Sampler, apply
from lamella.runtime.denoising import CacheKind
from lamella.stack import Model, Stack

SLUG = "dmllm-token-redundancy"
OF_LAYERS = 0.6  # l* of layer skipping, as a fraction of the layers: 17 of 28 in the authors' code
LONG = 12  # minimum number of answer tokens for which there are late steps
STAIRS = ((0.5, 0.5), (0.75, 0.25))  # the recommended progressive schedule: (step, keep), from half of the steps on
Provenance = Literal["auto", "scratch", "ar2diff"]
Kind = Literal["one-shot", "progressive", "withdraw"]


@dataclass(frozen=True)
class TokenPruning:
    """Which image tokens are dropped, where and when.

    Attributes:
        layer: l*; tokens are dropped between its attention and its MLP.
        step: s*, as a fraction of all steps.
        keep: r, the fraction of image tokens that is kept.
        criterion: how tokens are ranked: fastv, sparsevlm, divprune, trim, tome, signal, random or withdraw. The first
            two need the attention of l*; before the first layer there is none, and divprune replaces them.
        positions: position ids after dropped tokens: ``compact`` closes the gaps, as in the authors' code; ``original``
            keeps them.
        order: order of the kept tokens: by ``position``, or by ``score`` as in the authors' code.
    """

    layer: Annotated[int, Ge(-1)] = 1
    step: Annotated[float, Ge(0), Lt(1)] = 0.0
    keep: Annotated[float, Ge(0), Le(1)] = 0.25
    criterion: CriterionName = "fastv"
    positions: Literal["compact", "original"] = "compact"
    order: Literal["position", "score"] = "position"


@method(
    "dmllm-token-redundancy",
    paper="2511.15098",
    purpose="skip",
    on="masked tokens",
    brief={"rows": 3, "length": 4, "batch": 2},
)
def dmllm_token_redundancy(
    model: Model,
    questions: ImageText,
    *,
    pruning: TokenPruning = TokenPruning(),
    provenance: Provenance = "auto",
    length: Annotated[int, Ge(1)] | None = None,
    cache: CacheKind = "none",
    batch: Annotated[int, Ge(1)] = 8,
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Study what is lost when image tokens are dropped and recovered in later steps, and recommend a schedule.

    Args:
        model: a masked-diffusion vision-language model; it is not changed.
        questions: questions about images, with answers; each task is studied separately.
        pruning: which image tokens are dropped, where and when.
        provenance: origin of the model: ``scratch``, ``ar2diff`` (adapted from an autoregressive model), or ``auto``,
            which is decided by the measured recovery.
        length: length of answers in tokens, with one step per token; if None, that of the longest answer with its end.
        cache: ``prompt`` for models that encode image and question once (LaViDa).
        batch: batch size.
        seed: random seed of the random criterion and of the intervals.

    Returns:
        By task: ``kl`` by step and ``loss`` by step and layer, ``restoration`` with its interval, ``mass`` (fraction of
        attention on the image) by step and layer, ``agreement`` of the answers with those of the whole model, ``flops``
        of the schedule and of the whole model, with and without a cache; and the ``recommended`` schedule as settings
        of its plan.

    Raises:
        MethodError: for a model that takes no images, is autoregressive, or does not have the layer; for a task without
            a question about an image.
    """
    stack = text_of(model)
    schedule, criterion = VisualTokenSchedule.one_shot(pruning.layer, pruning.step, pruning.keep), pruning.criterion
    schedule.check_fits(len(stack))
    how: dict[str, Any] = {"criterion": criterion, "positions": pruning.positions, "order": pruning.order}
    plan = plan_of(model, schedule, **how, seed=seed)
    view = apply(model, plan)
    by_task = _by_task(questions)
    tasks = {}
    for task, rows in by_task.items():
        tasks[task] = _study_task(stack, view, questions, rows, schedule, length, cache, batch, seed)
        answer = tasks[task]["lengths"]["answer"]
        label = provenance if provenance != "auto" else recovers(tasks[task]["restoration"])
        tasks[task]["provenance"] = label
        advice = recommend(label, answer, len(stack))
        tasks[task]["recommended"] = None if advice is None else settings(advice, criterion=criterion)
    metadata = {"name": model.name, "layers": len(stack), "schedule": settings(schedule, criterion=criterion)}
    return Study(findings=metadata | {"cache": cache, "tasks": tasks})


@command("dmllm-token-redundancy", "plan", on="masked tokens", brief={"rows": 3})
def plan(
    model: Model,
    questions: ImageText,
    *,
    kind: Kind = "one-shot",
    pruning: TokenPruning = TokenPruning(),
    seed: Annotated[int, Ge(0)] = 0,
) -> PlanSeries:
    """Write a schedule as a plan, such as the one that the study recommends.

    Args:
        model: a masked-diffusion vision-language model; it is not changed.
        questions: questions about images, with answers, whose lengths determine the savings.
        kind: ``one-shot``: all tokens are dropped at once, at layer and step; ``progressive``: down to the square root
            of ``keep`` at the step, and to ``keep`` halfway from there to the end; ``withdraw``: image tokens skip all
            layers after ``layer``, in every step, and if ``step`` is not 0 they are dropped entirely from then on.
        pruning: which image tokens are dropped, where and when; ``withdraw`` ignores ``keep``.
        seed: random seed of the random criterion.

    Returns:
        The plan series of the whole model and the plan, with the remaining fraction of the layers' ``FLOPs``, and the
        same with a cache of the prompt (``cached``).

    Raises:
        MethodError: for a model that takes no images, is autoregressive, or does not have the layer; for questions
            without images.
    """
    stack, schedule = text_of(model), schedule_of(kind, pruning)
    schedule.check_fits(len(stack))
    _by_task(questions)
    lengths = _lengths(stack, questions)
    how: dict[str, Any] = {"criterion": pruning.criterion, "positions": pruning.positions, "order": pruning.order}
    made = plan_of(model, schedule, lengths, **how, seed=seed)
    apply(model, made)  # raises if the policy does not accept the settings
    costs = _costs(stack, schedule, lengths, lengths.answer)
    scores = {label: ours / whole for label, (ours, whole) in zip(("FLOPs", "cached"), costs.values(), strict=True)}
    points = [Point(scores=dict.fromkeys(scores, 1.0)), Point(policies=made.policies, scores=scores)]
    return PlanSeries(model=ModelReference.of(model), points=points, provenance={"method": SLUG})


def _lengths(stack: Stack, questions: ImageText, answer: int | None = None) -> RequestLengths:
    """Return the maximum number of image tokens, other prompt tokens, and answer tokens with the end."""
    mark, image, prompt = getattr(stack.model.config, stack.architecture.images), 0, 0
    for row in questions:
        ids = questions.prompts([row])["input_ids"]
        marks = int((ids == mark).sum())
        image, prompt = max(image, marks), max(prompt, ids.numel() - marks)
    answers = questions.processing.tokenizer([row.answer for row in questions], add_special_tokens=False)["input_ids"]
    return RequestLengths(image, prompt, answer or max(map(len, answers)) + 1)


def _costs(stack: Stack, schedule: VisualTokenSchedule, lengths: RequestLengths, steps: int) -> dict[str, list[int]]:
    """Return the FLOPs of all steps with and without the schedule, uncached and with a cached prompt."""
    both, widths = (schedule, VisualTokenSchedule()), LayerWidths.of(stack)
    return {
        name: [flops(each, widths, len(stack), steps, lengths, cached) for each in both]
        for name, cached in (("uncached", False), ("cached", True))
    }


def schedule_of(kind: Kind, pruning: TokenPruning) -> VisualTokenSchedule:
    """Return the schedule of a kind; see :func:`plan`.

    Args:
        kind: the kind.
        pruning: which image tokens are dropped, where and when.
    """
    layer, step, keep = pruning.layer, pruning.step, pruning.keep
    if kind == "withdraw":
        return VisualTokenSchedule.withdraw(layer, step or None)
    if kind == "progressive":
        return VisualTokenSchedule.progressive((step, (1 + step) / 2), (keep**0.5, keep), layer)
    return VisualTokenSchedule.one_shot(layer, step, keep)


def text_of(model: Model) -> Stack:
    """Return the language model of a masked-diffusion vision-language model.

    Raises:
        MethodError: for any other model.
    """
    stack = list(model.stacks.values())[-1]
    if not stack.architecture.denoises:
        raise MethodError(
            f"{SLUG} works on models that predict masked tokens; {model.name} is a {stack.architecture.name}, which "
            f"predicts {stack.architecture.objective}"
        )
    if not stack.architecture.images:
        raise MethodError(f"{SLUG} works on models that take images; {model.name} takes text only")
    return stack


def plan_of(model: Model, schedule: VisualTokenSchedule, lengths: RequestLengths | None = None, **options: Any) -> Plan:
    """Return the plan that carries out a schedule.

    Args:
        model: a masked-diffusion vision-language model.
        schedule: the schedule.
        lengths: lengths of a request, with one step per answer token, for the expected work of the plan.
        **options: ``criterion``, ``positions``, ``order`` and ``seed`` of the policy.
    """
    stack = text_of(model)
    work = [] if lengths is None else running(schedule, len(stack), lengths.answer, lengths)
    policy = PolicyReference(name=SLUG, params=settings(schedule, **options), work=work)
    return Plan(model=ModelReference.of(model), policies={stack.stack: policy})


def settings(schedule: VisualTokenSchedule, **options: Any) -> dict[str, Any]:
    """Return a schedule as settings of its policy.

    Args:
        schedule: the schedule.
        **options: further settings of the policy.
    """
    drops = [list(each) for each in schedule.drops]
    if options.get("criterion") in ("fastv", "sparsevlm") and schedule.layer < 0 and any(keep for _, keep in drops):
        options["criterion"] = "divprune"  # there is no attention before the first layer
    return {"drops": drops, "layer": schedule.layer, "withdrawn": schedule.withdrawn, **options}


def recovers(restored: Mapping[str, float | None]) -> Literal["scratch", "ar2diff"]:
    """Classify a model by its recovery: ``scratch`` if the whole interval is above 0, otherwise ``ar2diff``.

    Args:
        restored: restoration with its interval.
    """
    low = restored["low"]
    return "scratch" if low is not None and low > 0 else "ar2diff"


def recommend(provenance: str, answer: int, layers: int) -> VisualTokenSchedule | None:
    """Return the schedule that the paper's rule recommends, or None to drop nothing.

    Args:
        provenance: ``scratch`` or ``ar2diff``.
        answer: number of answer tokens.
        layers: number of layers of the model.
    """
    if answer < LONG:
        return None
    if provenance == "ar2diff":
        return VisualTokenSchedule.withdraw(int(OF_LAYERS * layers))
    steps, keeps = zip(*STAIRS, strict=True)
    return VisualTokenSchedule.progressive(steps, keeps)


def _by_task(questions: ImageText) -> dict[str, list[ImageTextRow]]:
    """Group the rows by task; each task needs at least one row with an image."""
    found: dict[str, list[ImageTextRow]] = {}
    for row in questions:
        found.setdefault(row.task or "all", []).append(row)
    for task, rows in found.items():
        if not any(row.images for row in rows):
            raise MethodError(f"{SLUG} needs questions about images; the {len(rows)} of '{task}' have none")
    return found


@torch.no_grad()
def _study_task(
    stack: Stack,
    view: Any,
    questions: ImageText,
    rows: list[ImageTextRow],
    schedule: VisualTokenSchedule,
    length: int | None,
    cache: CacheKind,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Study one task."""
    lengths = _lengths(stack, ImageText(rows, questions.processing), length)
    sampler = Sampler(length=lengths.answer, cache=cache, seed=seed)
    steps, layers = sampler.in_all, len(stack)
    lost, looked = torch.zeros(2, steps, layers, dtype=torch.float64)
    kls, seeing, agreed = [], 0, 0.0
    for start in range(0, len(rows), batch):
        inputs = {name: each.to(stack.device) for name, each in questions.prompts(rows[start : start + batch]).items()}
        marks = (inputs["input_ids"] == getattr(stack.model.config, stack.architecture.images)).sum(dim=1)
        full = follow(stack.model, inputs, sampler)
        pruned = follow(view, inputs, sampler, forced=full.tokens)
        loss, kl = information_loss(full, pruned)
        kls.append(kl)
        lost += len(kl) * loss  # batches count by their rows
        if with_images := int((marks > 0).sum()):
            seeing += with_images
            looked += with_images * attention_mass(stack, full, inputs)
        answers = _answers(view, inputs, sampler)
        agreed += float((answers == full.request.answers).all(dim=1).sum())
    kl = torch.cat(kls)
    begins = schedule.begins(schedule.drops[0], steps)
    middle, low, high = (None if each != each else each for each in restoration(kl, begins, seed))
    return {
        "rows": len(rows),
        "lengths": asdict(lengths),
        "steps": steps,
        "keep": schedule.table(layers, steps),
        "kl": kl.mean(dim=0).tolist(),
        "loss": (lost / len(rows)).tolist(),
        "restoration": {"mean": middle, "low": low, "high": high},
        "mass": (looked / seeing).tolist(),
        "agreement": agreed / len(rows),
        "flops": _costs(stack, schedule, lengths, steps),
    }


def _answers(view: Any, inputs: Mapping[str, Tensor], sampler: Sampler) -> Tensor:
    """Return the answers of a view that denoises freely [rows, length]."""
    return follow(view, inputs, sampler).request.answers
