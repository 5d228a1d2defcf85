"""Visual tokens of masked-diffusion models: whether, where and when they can be left out (arXiv 2511.15098).

Li et al., "A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal Large Language
Models", CVPR 2026 Findings.

    [ question | image | answer, partly masks ]  all of it, in every layer of every denoising step

Image tokens leave between the attention and the MLP of one layer in one step, and stay away. The paper's finding:
models that learnt to denoise from the start lose what the image said and get it back in later steps, if their answers
are long; models that predicted the next token first do not, and had better let image tokens skip layers. So the study
measures, on your model and your questions, what is lost and what comes back, and says which schedule to take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from lamella.data import ImageText
from lamella.data.processing import Conversation
from lamella.errors import MethodError
from lamella.measure.image_tokens import CriterionName
from lamella.methods.dmllm_token_redundancy.probe import attention_mass, follow, information_loss, restoration
from lamella.methods.dmllm_token_redundancy.schedule import Lengths, VisualTokenSchedule, Widths, flops, running
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import command, method
from lamella.results import Study
from lamella.runtime import Sampler, apply
from lamella.runtime.denoising import CacheKind
from lamella.stack import Model, Stack

SLUG = "dmllm-token-redundancy"
OF_LAYERS = 0.6  # l* of layer-skipping: 17 of 28 in the authors' code
LONG = 12  # tokens of an answer, from which on it has late steps
STAIRS = ((0.5, 0.5), (0.75, 0.25))  # of the progressive schedule that is recommended: none before half of the steps
Provenance = Literal["auto", "scratch", "ar2diff"]
Kind = Literal["one-shot", "progressive", "withdraw"]


@dataclass(frozen=True)
class Leaving:
    """Which image tokens leave, where and when.

    Attributes:
        layer: l*, between whose attention and MLP tokens leave.
        step: s*, as a share of all steps.
        keep: r, the share of image tokens that stays.
        criterion: which: fastv, sparsevlm, divprune, trim, tome, signal, random or withdraw. The first two look at the
            attention of l*; before the first layer there is none, and divprune stands for them.
        positions: of what stands behind a gap: moved up, as in the authors' code, or as it was.
        order: of what stays; the authors' code leaves it by score.
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
    leaving: Leaving = Leaving(),
    provenance: Provenance = "auto",
    length: Annotated[int, Ge(1)] | None = None,
    cache: CacheKind = "none",
    batch: Annotated[int, Ge(1)] = 8,
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Study what is lost when image tokens leave, what comes back in later steps, and which schedule follows.

    Args:
        model: a masked-diffusion model that reads images; it is not changed.
        questions: about images, with answers; each task is studied by itself.
        leaving: which image tokens leave, where and when.
        provenance: of the model: ``scratch``, ``ar2diff``; left to the study, whatever comes back decides.
        length: of answers, in tokens, one for each step; as many as the longest answer with its end if left out.
        cache: ``prompt`` for models that encode image and question once (LaViDa).
        batch: questions at a time.
        seed: of the random criterion and the intervals.

    Returns:
        By task: ``kl`` by step and ``loss`` by step and layer, ``restoration`` with its interval, ``mass`` (the share
        of attention that goes to the image) by step and layer, ``agreement`` of the answers with those of the whole
        model, ``flops`` of the schedule and of the whole, with and without a cache; and what is ``recommended``, with
        the settings of its plan.

    Raises:
        MethodError: for a model that reads no images, predicts the next token, or does not have the layer; for a task
            without a question about an image.
    """
    stack = text_of(model)
    schedule, criterion = VisualTokenSchedule.one_shot(leaving.layer, leaving.step, leaving.keep), leaving.criterion
    schedule.check_fits(len(stack))
    how: dict[str, Any] = {"criterion": criterion, "positions": leaving.positions, "order": leaving.order}
    plan = planned(model, schedule, **how, seed=seed)
    view = apply(model, plan)
    asked = _by_task(questions)
    tasks = {}
    for task, rows in asked.items():
        tasks[task] = _studied(stack, view, questions, rows, schedule, length, cache, batch, seed)
        answer = tasks[task]["lengths"]["answer"]
        label = provenance if provenance != "auto" else recovers(tasks[task]["restoration"])
        tasks[task]["provenance"] = label
        advice = recommend(label, answer, len(stack))
        tasks[task]["recommended"] = None if advice is None else settings(advice, criterion=criterion)
    said = {"name": model.name, "layers": len(stack), "schedule": settings(schedule, criterion=criterion)}
    return Study(findings=said | {"cache": cache, "tasks": tasks})


@command("dmllm-token-redundancy", "plan", on="masked tokens", brief={"rows": 3})
def plan(
    model: Model,
    questions: ImageText,
    *,
    kind: Kind = "one-shot",
    leaving: Leaving = Leaving(),
    seed: Annotated[int, Ge(0)] = 0,
) -> PlanSeries:
    """Write a schedule down as a plan, such as the one that the study recommends.

    Args:
        model: a masked-diffusion model that reads images; it is not changed.
        questions: about images, with answers, whose lengths say what the plan saves.
        kind: ``one-shot``: all leave at once, at layer and step; ``progressive``: the first part at the step, down to
            the root of the share, the rest halfway from there to the end; ``withdraw``: image tokens run no layer
            behind ``layer``, in any step, and if ``step`` is not 0 none at all from then on.
        leaving: which image tokens leave, where and when; a withdrawal keeps none, whatever the share.
        seed: of the random criterion.

    Returns:
        The whole model and the plan, with the ``FLOPs`` that are left of its layers, as a share, and the same with a
        cache of the prompt (``cached``).

    Raises:
        MethodError: for a model that reads no images, predicts the next token, or does not have the layer; for
            questions without images.
    """
    stack, schedule = text_of(model), scheduled(kind, leaving)
    schedule.check_fits(len(stack))
    _by_task(questions)
    lengths = _lengths(stack, questions)
    how: dict[str, Any] = {"criterion": leaving.criterion, "positions": leaving.positions, "order": leaving.order}
    made = planned(model, schedule, lengths, **how, seed=seed)
    apply(model, made)  # refuses what the policy does not take
    costs = _costs(stack, schedule, lengths, lengths.answer)
    scores = {said: ours / whole for said, (ours, whole) in zip(("FLOPs", "cached"), costs.values(), strict=True)}
    points = [Point(scores=dict.fromkeys(scores, 1.0)), Point(policies=made.policies, scores=scores)]
    return PlanSeries(model=ModelReference.of(model), points=points, provenance={"method": SLUG})


def _lengths(stack: Stack, questions: ImageText, answer: int | None = None) -> Lengths:
    """The most tokens of an image, of what else is asked, and of an answer with its end."""
    mark, image, prompt = getattr(stack.model.config, stack.architecture.images), 0, 0
    for row in questions:
        ids = questions.prompts([row])["input_ids"]
        marks = int((ids == mark).sum())
        image, prompt = max(image, marks), max(prompt, ids.numel() - marks)
    told = questions.processing.tokenizer([row.answer for row in questions], add_special_tokens=False)["input_ids"]
    return Lengths(image, prompt, answer or max(map(len, told)) + 1)


def _costs(stack: Stack, schedule: VisualTokenSchedule, lengths: Lengths, steps: int) -> dict[str, list[int]]:
    """FLOPs of all steps with a schedule and without one, by whether the prompt is computed once."""
    both, widths = (schedule, VisualTokenSchedule()), Widths.of(stack)
    return {
        name: [flops(each, widths, len(stack), steps, lengths, cached) for each in both]
        for name, cached in (("uncached", False), ("cached", True))
    }


def scheduled(kind: Kind, leaving: Leaving) -> VisualTokenSchedule:
    """The schedule of a kind; see :func:`plan`."""
    layer, step, keep = leaving.layer, leaving.step, leaving.keep
    if kind == "withdraw":
        return VisualTokenSchedule.withdraw(layer, step or None)
    if kind == "progressive":
        return VisualTokenSchedule.progressive((step, (1 + step) / 2), (keep**0.5, keep), layer)
    return VisualTokenSchedule.one_shot(layer, step, keep)


def text_of(model: Model) -> Stack:
    """The text of a masked-diffusion model that reads images.

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
        raise MethodError(f"{SLUG} works on models that read images; {model.name} reads text alone")
    return stack


def planned(model: Model, schedule: VisualTokenSchedule, lengths: Lengths | None = None, **options: Any) -> Plan:
    """The plan that carries a schedule out.

    Args:
        model: a masked-diffusion model that reads images.
        schedule: when and where.
        lengths: of a request, with a step for each token of its answer, by which the plan says what layers run.
        options: ``criterion``, ``positions``, ``order`` and ``seed`` of the policy.
    """
    stack = text_of(model)
    work = [] if lengths is None else running(schedule, len(stack), lengths.answer, lengths)
    policy = PolicyReference(name=SLUG, params=settings(schedule, **options), work=work)
    return Plan(model=ModelReference.of(model), policies={stack.stack: policy})


def settings(schedule: VisualTokenSchedule, **options: Any) -> dict[str, Any]:
    """A schedule as the settings of its policy."""
    drops = [list(each) for each in schedule.drops]
    if options.get("criterion") in ("fastv", "sparsevlm") and schedule.layer < 0 and any(keep for _, keep in drops):
        options["criterion"] = "divprune"  # no layer's attention is known before the first one
    return {"drops": drops, "layer": schedule.layer, "withdrawn": schedule.withdrawn, **options}


def recovers(restored: Mapping[str, float | None]) -> Literal["scratch", "ar2diff"]:
    """Which kind a model behaves like: what was lost comes back, by the whole interval, or it does not."""
    low = restored["low"]
    return "scratch" if low is not None and low > 0 else "ar2diff"


def recommend(provenance: str, answer: int, layers: int) -> VisualTokenSchedule | None:
    """The paper's rule; None: do not leave anything out.

    Args:
        provenance: ``scratch`` or ``ar2diff``.
        answer: tokens of an answer.
        layers: of the model.
    """
    if answer < LONG:
        return None
    if provenance == "ar2diff":
        return VisualTokenSchedule.withdraw(int(OF_LAYERS * layers))
    steps, keeps = zip(*STAIRS, strict=True)
    return VisualTokenSchedule.progressive(steps, keeps)


def _by_task(questions: ImageText) -> dict[str, list[Conversation]]:
    """The rows of each task; some of them may have no image, but not all."""
    found: dict[str, list[Conversation]] = {}
    for row in questions:
        found.setdefault(row.task or "all", []).append(row)
    for task, rows in found.items():
        if not any(row.images for row in rows):
            raise MethodError(f"{SLUG} needs questions about images; the {len(rows)} of '{task}' have none")
    return found


@torch.no_grad()
def _studied(
    stack: Stack,
    view: Any,
    questions: ImageText,
    rows: list[Conversation],
    schedule: VisualTokenSchedule,
    length: int | None,
    cache: CacheKind,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """What one task shows."""
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
        said = _answers(view, inputs, sampler)
        agreed += float((said == full.request.answers).all(dim=1).sum())
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
    """What a view says when it is left to itself [rows, length]."""
    return follow(view, inputs, sampler).request.answers
