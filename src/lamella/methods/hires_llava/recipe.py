"""What trains: adapters, sampler, projector and the marks between rows; with them the language model, if it shall.

The encoder stays as it is. The loss is that of LLaVA: cross-entropy of the answers' tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lamella.data import ImageTextRow, Processing
from lamella.methods.hires_llava.network import HiResLlava, HiResLlavaProcessor
from lamella.train import Task, TrainConfig, TrainingLog, add_lora, fit, response_loss

TRAINING = TrainConfig(lr=2e-4, batch=16, schedule="cosine", warmup=0.03)  # after LLaVA-1.5
NEW = ("slice_restore", "sampler", "row_end", "view_end", "multi_modal_projector")
TEXT = ("language_model", "lm_head")
Language = Literal["frozen", "lora", "full"]


def train(
    model: HiResLlava,
    processor: HiResLlavaProcessor,
    rows: Sequence[ImageTextRow],
    config: TrainConfig,
    out: Path,
    *,
    language: Language = "frozen",
    rank: int = 64,
    settings: Mapping[str, Any] | None = None,
) -> TrainingLog:
    """Train a model that reads slices, in place.

    Args:
        model: of :func:`lamella.methods.hires_llava.sliced`.
        processor: its own.
        rows: images with text, of any sizes.
        config: of the training.
        out: a folder for checkpoints; an interrupted run goes on from there, to the bit.
        language: whether the language model trains too: not at all, by LoRA that is merged, or in full.
        rank: of LoRA; its output is scaled by 2.
        settings: what else decides the result, for the record.
    """
    wanted = (*NEW, *TEXT) if language == "full" else NEW
    trained = {name for name, _ in model.named_parameters() if any(part in name for part in wanted)}
    adapters = add_lora(model, rank, 2 * rank, seed=config.seed) if language == "lora" else None
    if adapters is not None:
        trained |= {name for name, _ in model.named_parameters() if adapters.trains(name)}
    log = fit(
        model,
        rows,
        Task(response_loss, collate=Processing(processor).batch),
        config,
        out=out,
        trainable=trained.__contains__,
        settings={"language": language, **(settings or {})},
    )
    if adapters is not None:
        adapters.merge()
        adapters.remove()
    model.eval()
    return log


def parameters(model: HiResLlava) -> int:
    """How many there are in what is new, and in the projector, which trains beside it."""
    return sum(each.numel() for name, each in model.named_parameters() if any(part in name for part in NEW))
