"""Healing at the end of a compression: within a budget of minutes, and judged on text of kinds that it never saw.

A model that was planned on images with text is healed on rows of the same kind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from lamella.commands.heal.training import TextAlone, Training, available
from lamella.data import ImageText, InputContext, Text
from lamella.errors import DownloadError, MethodError
from lamella.evaluate import FidelityTest
from lamella.files import Work
from lamella.plan import Plan
from lamella.stack import Stack
from lamella.train import Healed, TooLittleTime
from lamella.train.losses import CHUNK
from lamella.zoo import computes_well

MINUTES = 8.0
TEXT = "general"
UNSEEN = ("gsm8k", "humaneval")  # kinds of text that are not in TEXT
UNSEEN_SECONDS = 45.0  # for which they may be measured; the first always is
TOKENS = 256  # in a block
BATCH = 4  # blocks in a step
ROWS = 256  # of images with text, at most
RECIPE = 64  # blocks or rows for a method's own recipe
# What trials on SmolLM2 chose: adapters beat all weights in as many steps, which cost the same, and need no memory for
# gradients and optimizer state of what they stand beside.
ADAPTERS: dict[str, Any] = {"lora": 128, "lr": 2e-3, "vocabulary": False}
WHOLE: dict[str, Any] = {"lr": 5e-4}  # of a narrower model, whose weights all stand elsewhere
SCHEDULE: dict[str, Any] = {"warmup": 0.1, "schedule": "linear"}
SHARE = 0.8  # of the free memory that training may take


@dataclass(frozen=True)
class Heal:
    """How a compression heals what it cuts.

    Attributes:
        way: auto: distillation from the original, or the recipe of the plan's method where it decides while the model
            runs. recipe: the method's own, or continual pre-training on the text where it has none.
        minutes: how long distillation may train; 8 when left out.
        steps: optimizer steps, in place of the minutes or of the recipe's own number: bit-exact repeats.
        train: text to train on, or rows of images; when left out, built-in text of many kinds (general), or what was
            planned on for a recipe or where that holds images.

    Raises:
        MethodError: for minutes that nothing would use.
    """

    way: Literal["auto", "recipe"] = "auto"
    minutes: Annotated[float, Gt(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    train: str | None = None

    prefixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.minutes is not None and (self.steps is not None or self.way == "recipe"):
            other = "steps" if self.steps is not None else "way recipe"
            raise MethodError(f"heal: minutes are for distillation, and {other} says how long to train: leave one out")


def heal_cut(
    stack: Stack, plan: Plan, context: InputContext, how: Heal, work: Work, calibration: Text | ImageText
) -> tuple[Healed | None, dict[str, Any]]:
    """Train a cut model back.

    Args:
        stack: the original.
        plan: what was cut.
        context: what reads for the model.
        how: see :class:`Heal`.
        work: the folder with which an interrupted run goes on.
        calibration: what was planned on.

    Returns:
        What came out, and what evidence says of it; nothing, and a ``note``, where the model does not fit the memory
        beside what training takes, or a recipe takes no images.
    """
    if how.way == "recipe" or not plan.is_static or plan.weights:  # distillation knows nothing of what a plan decides
        given = {} if how.steps is None else {"steps": how.steps}
        train = material(stack, context, how.train or calibration, RECIPE, RECIPE)
        try:
            return Training.prepared(stack, plan, context, train, options=given).run(work)
        except TextAlone as error:
            return None, {"note": f"Not healed: {error}."}
    train = material(stack, context, how.train or (calibration if isinstance(calibration, ImageText) else TEXT))
    free = SHARE * _free(stack.device)
    fitting = [each for each in _options(plan) if _needed(stack, each, _length(train)) < free]
    if not fitting:
        return None, {"note": "Not healed: training does not fit the free memory beside the model."}
    options: dict[str, Any] = {
        **fitting[0],
        **({"minutes": how.minutes or MINUTES} if how.steps is None else {"steps": how.steps}),
        "bf16": computes_well(torch.bfloat16, stack.device),
        "log_every": 1,
    }
    try:
        return Training.prepared(stack, plan, context, train, loss="kd", options=options).run(work)
    except TooLittleTime as error:
        return None, {"note": f"Not healed: {error}."}


def material(
    stack: Stack, context: InputContext, source: str | Text | ImageText, rows: int = ROWS, blocks: int | None = None
) -> Text | ImageText:
    """What healing trains on: blocks of a text, or rows of images with text.

    Args:
        rows: of images with text, at most.
        blocks: of a text; as many as it has when left out.

    Raises:
        CalibrationError: for a source that is missing, or a text that is too short for one step.
    """
    if isinstance(source, ImageText):
        return source.part("calibration", rows=rows)
    name = source if isinstance(source, str) else source.source.name
    if ImageText.fits(stack, name):
        return ImageText.open(name, context, rows=rows)
    count = available(context.tokenizer, name, TOKENS, BATCH) if blocks is None else blocks
    return Text.open(name, context, sequences=count, length=TOKENS)


def _length(train: Text | ImageText) -> int:
    """Tokens in the longest block or row, about."""
    if isinstance(train, Text):
        return train.tokens.shape[1]
    return train.batch(train[:BATCH])["input_ids"].shape[1]


def unseen(stack: Stack, judge: Callable[[str], Text], models: dict[str, Any]) -> list[dict[str, Any]]:
    """Fidelity to the original on kinds of text that healing never saw, as far as they are here and time goes.

    Args:
        judge: opens a text to judge by.
        models: by name.

    Returns:
        For each text its provenance and the fidelity of every model.
    """
    found: list[dict[str, Any]] = []
    begin = time.monotonic()
    for name in UNSEEN:
        if found and time.monotonic() - begin > UNSEEN_SECONDS / len(UNSEEN):
            break
        try:
            text = judge(name)
        except DownloadError:
            continue
        test = FidelityTest(stack, text.tokens)
        fidelity = {key: test.of(model).as_dict() for key, model in models.items()}
        found.append({"text": text.describe(), "fidelity": fidelity})
    return found


def _options(plan: Plan) -> list[dict[str, Any]]:
    """Ways to train, the best first; each needs less memory than the one before."""
    ways = [WHOLE, ADAPTERS] if plan.width else [ADAPTERS]
    return [way | SCHEDULE | {"batch": size, "accumulate": BATCH // size} for way in ways for size in (BATCH, 1)]


def _needed(stack: Stack, options: dict[str, Any], length: int) -> float:
    """Bytes that training needs beside the models, about: what trains, what the backward pass reads, and logits."""
    sizes = stack.architecture.sizes_of(stack.config)
    trained = 0 if "lora" in options else 4 * 4 * sum(each.numel() for each in stack.model.parameters())
    kept = options["batch"] * length * len(stack) * (12 * sizes.hidden + 4 * sizes.channels) * 4
    rounded = 2 * 2 * sum(each.numel() for each in stack.model.parameters())  # both models once more, in bfloat16
    return rounded + trained + kept + 4 * CHUNK * stack.config.vocab_size * 4


def _free(device: torch.device) -> float:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts what the system can give back, which sysconf does not
        return 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
