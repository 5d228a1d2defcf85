"""Healing at the end of a compression, within a time budget, and evaluated on kinds of text that it never saw.

A model that was planned on images with text is healed on rows of the same kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from lamella.commands.heal.training import TextOnly, Training, available
from lamella.data import ImageText, InputContext, Text
from lamella.errors import DownloadError, MethodError
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.needs import now
from lamella.plan import Plan
from lamella.stack import Stack
from lamella.train import Healed, TooLittleTime, refit
from lamella.train.losses import CHUNK
from lamella.zoo import computes_well

MINUTES = 8.0
TEXT = "general"
UNSEEN = ("gsm8k", "humaneval")  # kinds of text that TEXT does not contain
UNSEEN_SECONDS = 45.0  # time limit for measuring them; the first is always measured
TOKENS = 256  # in a block
BATCH = 4  # rows of images, or blocks for a narrower model, in a step; else one block, as in benchmarks/ways.py
ROWS = 256  # maximum number of rows of images with text
FITTED = 8  # blocks or rows for a refit, as in benchmarks/ways.py
RECIPE = 64  # blocks or rows for a method's own recipe
# Chosen by trials on SmolLM2: adapters beat full training in the same number of steps at the same cost, and need no
# memory for gradients and optimizer state of the frozen weights.
ADAPTERS: dict[str, Any] = {"lora": 128, "vocabulary": False}
LR = 1e-3  # of adapters with one block in a step; in proportion to the square root of the batch size
WHOLE: dict[str, Any] = {"lr": 5e-4}  # for a narrower model, in which all weights have moved
SCHEDULE: dict[str, Any] = {"warmup": 0.1, "schedule": "linear"}
SHARE = 0.8  # of the free memory that training may use


@dataclass(frozen=True)
class Heal:
    """How a compression heals the pruned model.

    Attributes:
        way: auto: distillation from the original, or the recipe of the plan's method if the plan is dynamic;
            distillation starts from a refit if the plan has no narrower sublayers. recipe: the method's own recipe, or
            continual pre-training on the text if it has none. refit: no training, but a correction of the linear layers
            in front of the removed ones by least squares, which takes seconds.
        minutes: duration of distillation in minutes; 8 by default.
        steps: number of optimizer steps, instead of minutes or the number of the recipe; the result is bit-exact.
        train: training text, or rows of images; defaults to built-in text of many kinds (general), or to the
            calibration data for a recipe or if these have images.

    Raises:
        MethodError: for minutes that would not be used.
    """

    way: Literal["auto", "recipe", "refit"] = "auto"
    minutes: Annotated[float, Gt(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    train: str | None = None

    prefixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.way == "refit" and self.steps is not None:
            raise MethodError("heal: way refit takes no optimizer steps: leave steps out")
        if self.minutes is not None and (self.steps is not None or self.way != "auto"):
            other = "steps" if self.steps is not None else f"way {self.way}"
            raise MethodError(
                f"heal: minutes apply to distillation, but {other} determines the duration: give one of them"
            )


def heal_cut(
    stack: Stack, plan: Plan, context: InputContext, how: Heal, work: Work, calibration: Text | ImageText
) -> tuple[Healed | None, dict[str, Any]]:
    """Heal a pruned model.

    Args:
        stack: the original.
        plan: the plan.
        context: the context of the data.
        how: see :class:`Heal`.
        work: the folder from which an interrupted run resumes.
        calibration: the calibration data of the plan.

    Returns:
        The healed model, and its record for evidence, with a ``note`` if it was refitted only; None and a ``note`` if
        training does not fit the memory, a recipe takes no images, or the plan or the model cannot be refitted.
    """
    source = how.train or _usual(calibration)
    if how.way == "refit":
        return _refitted(stack, plan, material(stack, context, source, FITTED, FITTED))
    if how.way == "recipe" or not plan.is_static or plan.weights:  # distillation does not train policies
        given = {} if how.steps is None else {"steps": how.steps}
        train = material(stack, context, how.train or calibration, RECIPE, RECIPE)
        try:
            return Training.prepared(stack, plan, context, train, options=given).run(work)
        except TextOnly as error:
            return None, {"note": f"Not healed: {error}."}
    return _distilled(stack, plan, context, how, work, material(stack, context, source))


def _distilled(
    stack: Stack, plan: Plan, context: InputContext, how: Heal, work: Work, train: Text | ImageText
) -> tuple[Healed | None, dict[str, Any]]:
    """Distil the original into a pruned model, starting from a refit where one is possible; see :func:`heal_cut`.

    If no training fits the memory or the time, the model is refitted only.
    """
    begin = now()
    is_single = isinstance(train, ImageText) and len(train) < 2  # cannot be split into fitted and held-out rows
    fitted, record = (None, {}) if plan.width or is_single else _refitted(stack, plan, _first(train))
    start, teacher, failure = stack, None, "Not healed"
    if fitted is not None:
        assert isinstance(fitted.stack, Stack)
        start, teacher, failure = fitted.stack, stack, "Refitted by least squares only"
    free = SHARE * _free(stack.device)
    fitting = [each for each in _options(plan, train) if _needed(stack, each, _length(train)) < free]
    if not fitting:
        return fitted, record | {"note": f"{failure}: training needs more memory than is free."}
    minutes = how.minutes or MINUTES
    left = max(minutes - (now() - begin) / 60, minutes / 2)
    options: dict[str, Any] = {
        **fitting[0],
        **({"minutes": left} if how.steps is None else {"steps": how.steps}),
        "bf16": computes_well(torch.bfloat16, stack.device),
        "log_every": 1,
    }
    training = Training.prepared(start, plan, context, train, teacher=teacher, loss="kd", options=options)
    try:
        healed, trained = training.run(work)
    except TooLittleTime as error:
        return fitted, record | {"note": f"{failure}: {error}."}
    return healed, trained | ({} if fitted is None else fitted.findings)


def _first(train: Text | ImageText) -> Text | ImageText:
    """Return the first blocks or rows of training data, for a refit."""
    if isinstance(train, ImageText):
        return train.part("calibration", rows=FITTED)
    count, length = train.tokens.shape
    return train.cut(min(FITTED, count), length)


def _usual(calibration: Text | ImageText) -> str | ImageText:
    """Return the default training data: built-in text of many kinds, or rows of images if these were planned on."""
    return calibration if isinstance(calibration, ImageText) else TEXT


def _refitted(stack: Stack, plan: Plan, train: Text | ImageText) -> tuple[Healed | None, dict[str, Any]]:
    """Correct a pruned model in closed form; see :func:`heal_cut`."""
    try:
        healed = refit(stack, plan, train)
    except MethodError as error:
        return None, {"note": f"Not healed: {error}."}
    body = {name: healed.body()[name] for name in ("settings", "curve", "held_out")}
    return healed, {"method": "refit", "data": {"training": train.describe()}, **body, **healed.findings}


def material(
    stack: Stack, context: InputContext, source: str | Text | ImageText, rows: int = ROWS, blocks: int | None = None
) -> Text | ImageText:
    """Load the training data of healing: blocks of a text, or rows of images with text.

    Args:
        stack: the model.
        context: the context of the data.
        source: the name of the data, or calibration data to take more of.
        rows: maximum number of rows of images with text.
        blocks: number of blocks of a text; as many as it has if None.

    Raises:
        CalibrationError: if the source is missing, or a text is too short for one step.
    """
    if isinstance(source, ImageText):
        return source.part("calibration", rows=rows)
    name = source if isinstance(source, str) else source.source.name
    if ImageText.fits(stack, name):
        return ImageText.open(name, context, rows=rows)
    count = available(context.tokenizer, name, TOKENS, BATCH) if blocks is None else blocks
    return Text.open(name, context, sequences=count, length=TOKENS)


def _length(train: Text | ImageText) -> int:
    """Return the approximate number of tokens in the longest block or row."""
    if isinstance(train, Text):
        return train.tokens.shape[1]
    return train.batch(train[:BATCH])["input_ids"].shape[1]


def unseen(stack: Stack, judge: Callable[[str], Text], models: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure fidelity to the original on kinds of text that healing never saw, as far as time permits.

    Args:
        stack: the original.
        judge: opens a text for evaluation.
        models: models by name.

    Returns:
        For each text its provenance and the fidelity of every model.
    """
    found: list[dict[str, Any]] = []
    begin = now()
    for name in UNSEEN:
        if found and now() - begin > UNSEEN_SECONDS / len(UNSEEN):
            break
        try:
            text = judge(name)
        except DownloadError:
            continue
        test = FidelityTest(stack, text.tokens)
        fidelity = {key: test.of(model).as_dict() for key, model in models.items()}
        found.append({"text": text.describe(), "fidelity": fidelity})
    return found


def _options(plan: Plan, train: Text | ImageText) -> list[dict[str, Any]]:
    """Return training configurations, the best first; each needs less memory than the one before."""
    batch = BATCH if plan.width or isinstance(train, ImageText) else 1
    adapters = ADAPTERS | {"lr": LR * batch**0.5}
    ways = [WHOLE, adapters] if plan.width else [adapters]
    sizes = sorted({1, batch}, reverse=True)
    return [
        way | SCHEDULE | {"batch": size, "accumulate": batch // size} | more
        for way in ways
        for size in sizes
        for more in ({}, {"gradient_checkpointing": True})
    ]


def _needed(stack: Stack, options: dict[str, Any], length: int) -> float:
    """Estimate the bytes that training needs in addition to the models: trained parameters, activations and logits."""
    sizes = stack.architecture.sizes_of(stack.config)
    trained = 0 if "lora" in options else 4 * 4 * sum(each.numel() for each in stack.model.parameters())
    layers = 1 if "gradient_checkpointing" in options else len(stack)
    inner = layers * (12 * sizes.hidden + 4 * sizes.channels)
    activations = options["batch"] * length * (len(stack) * sizes.hidden + inner) * 4
    copies = 2 * 2 * sum(each.numel() for each in stack.model.parameters())  # both models in bfloat16
    return copies + trained + activations + 4 * CHUNK * stack.config.vocab_size * 4


def _free(device: torch.device) -> float:
    """Return the bytes of free memory on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # includes reclaimable memory, unlike sysconf
        return 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
