"""Training: adapters, sampler, projector and end tokens; optionally the language model.

The image encoder stays frozen. The loss is that of LLaVA: cross-entropy of the answer tokens.
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
    """Train a model that uses slices, in place.

    Args:
        model: the model; see :func:`lamella.methods.hires_llava.sliced`.
        processor: its processor.
        rows: images with text, of any size.
        config: training settings.
        out: folder for checkpoints, from which an interrupted run resumes with bitwise identical results.
        language: whether the language model trains too: frozen, by LoRA that is merged afterwards, or in full.
        rank: LoRA rank; its output is scaled by 2.
        settings: further settings that determine the result, for the run's metadata.

    Returns:
        The training log.
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
    """Count the parameters of the new modules and of the projector, which trains with them."""
    return sum(each.numel() for name, each in model.named_parameters() if any(part in name for part in NEW))
