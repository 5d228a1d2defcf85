"""Healing at the end of a compression: within a budget of minutes, and judged on text of kinds that it never saw.

A model that was planned on images with text is healed on rows of the same kind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamella.data import ImageText, Reader, load_text, windows
from lamella.errors import DownloadError, MethodError
from lamella.evaluate import FidelityTest
from lamella.jobs.heal import Material, TextAlone, train_back
from lamella.jobs.held_out import judging_windows
from lamella.plan import Plan
from lamella.stack import Stack
from lamella.train import Healed, TooLittleTime
from lamella.train.losses import CHUNK
from lamella.zoo import computes_well

WAYS = ("auto", "recipe", "none")
MINUTES = 8.0
TEXT = "general"
UNSEEN = ("gsm8k", "humaneval")  # kinds of text that are not in TEXT
TOKENS = 256  # in a block
BATCH = 4  # blocks in a step
BLOCKS = 1000  # of the text, at most; longer runs see them again
ROWS = 256  # of images with text, at most
# What trials on SmolLM2 chose: adapters beat all weights in as many steps, which cost the same, and need no memory for
# gradients and optimizer state of what they stand beside.
ADAPTERS: dict[str, Any] = {"lora": 128, "lr": 2e-3, "vocabulary": False}
WHOLE: dict[str, Any] = {"lr": 5e-4}  # of a narrower model, whose weights all stand elsewhere
SCHEDULE: dict[str, Any] = {"warmup": 0.1, "schedule": "linear"}
SHARE = 0.8  # of the free memory that training may take


@dataclass(frozen=True)
class Healing:
    """How a compression shall heal what it cuts.

    Attributes:
        way: ``auto``: distillation from the original, and the recipe of the plan's method where that decides while the
            model runs. ``recipe``: the method's own, or continual pre-training on the text where it has none. ``none``:
            not at all.
        minutes: how long distillation may train.
        steps: optimizer steps, in place of the minutes or of the recipe's own number.
        text: what to train on. Left out: what the method planned on, for a recipe or where that holds images.
    """

    way: str = "auto"
    minutes: float = MINUTES
    steps: int | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise MethodError(f"heal '{self.way}': choose one of {', '.join(WAYS)}")
        if not self.minutes > 0:
            raise MethodError(f"{self.minutes:g} minutes of healing: give more than 0, or do not heal")


def mend(
    stack: Stack, plan: Plan, reader: Reader, how: Healing, work: Path, *, calibration: str
) -> tuple[Healed | None, dict[str, Any]]:
    """Train a cut model back.

    Args:
        stack: the original.
        plan: what was cut.
        reader: what reads for the model.
        how: see :class:`Healing`.
        work: the folder with which an interrupted run goes on.
        calibration: what was planned on: text, or images with text.

    Returns:
        What came out, and what evidence says of it; nothing, and a ``note``, where the model does not fit the memory
        beside what training takes, or a recipe takes no images.
    """
    if how.way == "recipe" or not plan.is_static or plan.weights:  # distillation knows nothing of what a plan decides
        given = {} if how.steps is None else {"steps": how.steps}
        try:
            return train_back(stack, plan, reader, work, material=Material(how.text or calibration), options=given)
        except TextAlone as error:
            return None, {"note": f"Not healed: {error}."}
    material = material_of(stack, reader, how.text or (calibration if ImageText.fits(stack, calibration) else TEXT))
    free = SHARE * _free(stack.device)
    fitting = [each for each in _options(plan) if _needed(stack, each, material.length) < free]
    if not fitting:
        return None, {"note": "Not healed: training does not fit the free memory beside the model."}
    options: dict[str, Any] = {
        **fitting[0],
        **({"minutes": how.minutes} if how.steps is None else {"steps": how.steps}),
        "bf16": computes_well(torch.bfloat16, stack.device),
        "log_every": 1,
    }
    try:
        return train_back(stack, plan, reader, work, material=material, loss="kd", options=options)
    except TooLittleTime as error:
        return None, {"note": f"Not healed: {error}."}


def material_of(stack: Stack, reader: Reader, name: str) -> Material:
    """As much of a source as healing takes.

    Raises:
        CalibrationError: for a source that is missing, or a text that is too short for one step.
    """
    if ImageText.fits(stack, name):
        longest = reader.processing.batch(ImageText.open(name, reader, rows=BATCH)[:])["input_ids"].shape[1]
        return Material(name, sequences=ROWS, length=longest)
    return Material(name, sequences=available(reader.tokenizer, name), length=TOKENS)


def available(tokenizer: Any, text: str, length: int = TOKENS) -> int:
    """How many blocks of a text there are to train on, of so many tokens.

    Raises:
        CalibrationError: for a text that is missing, or too short for one step.
    """
    source = load_text(text, "calibration")
    parts = (tokenizer(each, add_special_tokens=False, verbose=False) for each in source.apart(tokenizer))
    count = min(BLOCKS, sum(len(each["input_ids"]) // length for each in parts))
    if count < BATCH:
        windows(tokenizer, source, BATCH, length)  # says what is missing
    return count


def unseen(stack: Stack, tokenizer: Any, models: dict[str, Any]) -> list[dict[str, Any]]:
    """Fidelity to the original on kinds of text that healing never saw, as far as they can be had here.

    Args:
        models: by name.

    Returns:
        For each text its provenance and the fidelity of every model.
    """
    found = []
    for name in UNSEEN:
        try:
            tokens, provenance = judging_windows(tokenizer, name, stack)
        except DownloadError:
            continue
        test = FidelityTest(stack, tokens)
        found.append({"text": provenance, "fidelity": {key: test.of(model).as_dict() for key, model in models.items()}})
    return found


def _options(plan: Plan) -> list[dict[str, Any]]:
    """Ways to train, the best first; each needs less memory than the one before."""
    ways = [WHOLE, ADAPTERS] if plan.width else [ADAPTERS]
    return [way | SCHEDULE | {"batch": size, "accumulate": BATCH // size} for way in ways for size in (BATCH, 1)]


def _needed(stack: Stack, options: dict[str, Any], length: int) -> float:
    """Bytes that training needs beside the models, about: what trains, what the backward pass reads, and logits."""
    sizes = stack.architecture.sizes_of(stack.config)
    trained = 0 if "lora" in options else 4 * 4 * sum(each.numel() for each in stack.model.parameters())
    kept = options["batch"] * length * len(stack) * (12 * sizes.stream + 4 * sizes.channels) * 4
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
