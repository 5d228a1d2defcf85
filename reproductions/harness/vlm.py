"""Small vision-language models that reproductions train on images of rendered shapes, and cache.

text        captions and lists without images
naming      captions and lists of images with one or two objects; trains everything except the token embeddings of the
            text stage, since there is no pre-trained vision tower
alignment   the same with up to four objects
sft         all weights, several questions per image, each processed independently

In conversations, where a question may have any position, positions are not learned in so few steps: here every question
attends only to the image and itself, at the positions it would have without the others. Encoder-decoders have one
question per image, half of them whether a sentence is true:

naming      captions and lists of one or two objects
matching    questions about one or two objects: with four, the models never learn to find the object of a sentence
sft         the same questions about up to four
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from lamella.data import MARK, ImageText, ImageTextRow, Processing
from lamella.data.images import Image
from lamella.evaluate.scored import read_inputs
from lamella.train import Task, TrainConfig, fit, response_loss
from lamella.zoo import cache_folder
from lamella.zoo.cache import build_once
from lamella.zoo.opening import open_config, open_model, open_processor
from lamella.zoo.vlm import POSITION_SCALE, SHAPES_SEQ2SEQ, shapes_vlm
from lamella.zoo.worlds import MOST, QUESTIONS, SIZE, TASKS, Part, ShapeExample, ShapeScene, examples, render, scenes

SAVED = 50  # steps between checkpoints
TURNS = 8  # questions per image
WHOLE = ("caption", "list")
TEXT = ("language_model", "lm_head")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        config: settings of the training; its seed is the run's.
        rows: returns training rows from their number, a seed and the image size.
        trains: whether the parameter of a name is trained.
    """

    config: TrainConfig
    rows: Callable[[int, int, int], list[ImageTextRow]]
    trains: Callable[[str], bool]


def text_rows(count: int, seed: int, size: int) -> list[ImageTextRow]:
    """Return captions and lists without images.

    Args:
        count: the number of rows.
        seed: random seed.
        size: the image size.
    """
    return [
        ImageTextRow((), turns([(each.prompt, each.answer)]), task=each.task)
        for each in examples(WHOLE, count, seed=seed)
    ]


def shown(count: int, seed: int, size: int, most: int = MOST) -> list[ImageTextRow]:
    """Return the same with images of one to `most` objects, captions and lists alternately.

    Args:
        count: the number of rows.
        seed: random seed.
        size: the image size.
        most: the maximum number of objects.
    """
    rng = np.random.default_rng((seed, 3))
    rows = []
    for number, scene in zip(range(count), scenes("calibration", (seed, 4), (1, most)), strict=False):
        pair = TASKS[WHOLE[number % 2]](scene, rng)
        assert pair is not None
        rows.append(ImageTextRow((render(scene, size, seed=(seed, number)),), turns([(f"{MARK}\n{pair[0]}", pair[1])])))
    return rows


def questions(count: int, seed: int, size: int) -> list[ImageTextRow]:
    """Return several questions per image; every other image also has a caption or a list.

    Args:
        count: the number of images.
        seed: random seed.
        size: the image size.
    """
    rng = np.random.default_rng((seed, 1))
    rows = []
    for number, scene in zip(range(count), scenes("calibration", (seed, 2)), strict=False):
        conversation = list(_questions(scene, rng, end=number % 4))
        conversation[0] = (f"{MARK}\n{conversation[0][0]}", conversation[0][1])
        rows.append(ImageTextRow((render(scene, size, seed=(seed, number)),), turns(conversation)))
    return rows


def asked(
    count: int, seed: int, size: int, tasks: Sequence[str], most: int = MOST, varied: bool = True
) -> list[ImageTextRow]:
    """Return one question per image of up to `most` objects, with alternating tasks.

    Args:
        count: the number of rows.
        seed: random seed.
        size: the image size.
        tasks: the tasks.
        most: the maximum number of objects.
        varied: see :func:`shown_row`.
    """
    return [shown_row(each, varied) for each in examples(tasks, count, "calibration", seed, size, most)]


def shown_row(each: ShapeExample, varied: bool = True) -> ImageTextRow:
    """Return an example as a row, with its image first.

    Args:
        each: the example.
        varied: whether objects of one kind vary; otherwise they look alike, and models learn to see from few images.
    """
    image = each.image if varied else render(each.scene, each.size)
    return ImageTextRow((image,), turns([(f"{MARK}\n{each.prompt}", each.answer)]), task=each.task)


def _questions(scene: ShapeScene, rng: np.random.Generator, end: int) -> Iterator[tuple[str, str]]:
    for task in ("count", *rng.choice(QUESTIONS, TURNS - 1), *WHOLE[end : end + 1]):  # counting is always possible
        pair = TASKS[str(task)](scene, rng)
        if pair is not None:
            yield pair


def turns(conversation: Sequence[tuple[str, str]]) -> tuple[dict[str, str], ...]:
    """Return prompts with their answers as the messages of a row."""
    return tuple(
        {"role": role, "content": text} for turn in conversation for role, text in zip(ROLES, turn, strict=True)
    )


ROLES = ("user", "assistant")
RECIPE = TrainConfig(
    lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05, batch=16, log_every=25, save_every=SAVED, bf16=True
)
STAGES = {
    "text": Stage(replace(RECIPE, steps=400, batch=32), text_rows, lambda name: any(part in name for part in TEXT)),
    "naming": Stage(replace(RECIPE, steps=1600), partial(shown, most=2), lambda name: "embed_tokens" not in name),
    "alignment": Stage(replace(RECIPE, steps=1600), shown, lambda name: "embed_tokens" not in name),
    "sft": Stage(replace(RECIPE, steps=2400), questions, lambda name: True),
}
ENTAILED = ("caption", "colour", "position", "relation", "premise", *3 * ["entailment"])
STAGES_SEQ2SEQ = {
    "naming": Stage(replace(RECIPE, steps=1600, batch=32), partial(shown, most=2), lambda name: True),
    "matching": Stage(replace(RECIPE, steps=2400, batch=32), partial(asked, tasks=ENTAILED, most=2), lambda name: True),
    "sft": Stage(replace(RECIPE, steps=5000, batch=32), partial(asked, tasks=ENTAILED), lambda name: True),
}


def fit_into(
    folder: Path, model: Any, processor: Any, rows: Sequence[ImageTextRow], task: Task, config: TrainConfig
) -> None:
    """Train a model, and save it with its processor.

    Args:
        folder: where it is saved.
        model: the model.
        processor: its processor.
        rows: the training data.
        task: the loss, and how rows are batched.
        config: settings of the training.
    """
    with tempfile.TemporaryDirectory() as work, torch.enable_grad():
        fit(model, rows, task, config, out=Path(work))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def reading(processing: Processing, picture: Image) -> Callable[[Sequence[ImageTextRow]], dict[str, Tensor]]:
    """Return a collate function that also returns the number of image tokens; all images have the same size.

    Args:
        processing: the processor.
        picture: any image of that size.
    """
    image_only = ImageTextRow((picture,), turns([(MARK, "nothing")]))
    tokens = 0 if processing.encodes else processing.prompts([image_only])["input_ids"].shape[1]

    def batch(rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
        return processing.batch(rows) | {"picture": torch.tensor([tokens if row.images else 0 for row in rows])}

    return batch


def loss(model: Any, batch: dict[str, Tensor]) -> Any:
    """Return the cross-entropy of the answers, each question independently; for experts with the load-balancing loss.

    Args:
        model: the model.
        batch: the batch.
    """
    if model.config.is_encoder_decoder:
        return response_loss(model, batch)
    text, mask = model.config.get_text_config(), batch["attention_mask"]
    experts = hasattr(text, "router_aux_loss_coef")
    inputs = read_inputs(model, batch) | alone(model, batch) | ({"output_router_logits": True} if experts else {})
    output = model.model(**inputs, use_cache=False)
    answers = batch["labels"][:, 1:]
    has_label = answers >= 0
    ce = cross_entropy(model.lm_head(output.last_hidden_state[:, :-1][has_label]), answers[has_label])
    if not experts:
        return ce
    balance = load_balancing_loss_func(output.router_logits, text.num_experts, text.num_experts_per_tok, mask)
    return ce + text.router_aux_loss_coef * balance, {"ce": ce, "balance": balance}


def alone(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mask and the positions with which every question and its answer directly follow the image.

    Args:
        model: the model.
        batch: the batch.

    Returns:
        ``attention_mask`` [batch, 1, time, time] bool and ``position_ids`` [batch, time], with three axes for Qwen
        models.
    """
    ids, real, answers = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] >= 0
    time = torch.arange(ids.shape[1])
    ends = (~real).sum(1, keepdim=True) + batch["picture"][:, None]  # the start of the first question
    turn = torch.zeros_like(ids)
    turn[:, 1:] = (answers[:, :-1] & ~answers[:, 1:]).cumsum(1)  # a question follows each answer
    turn = torch.where(time < ends, 0, turn + 1).masked_fill(~real, PADDING)
    first = torch.where(turn[:, :, None] == turn[:, None], time, len(time)).amin(2)  # first token of the turn
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    if "image_grid_thw" in batch:
        grid = {name: batch[name] for name in ("attention_mask", "image_grid_thw", "mm_token_type_ids")}
        position_ids = model.model.get_rope_index(ids, **grid)[0]
    return {
        "attention_mask": apart(turn).tril()[:, None],
        "position_ids": position_ids - torch.where(turn > 0, first - ends, 0),
    }


PADDING = -1


def apart(question: Tensor) -> Tensor:
    """Return the mask for several questions about an image: each attends to the image and itself; padding to itself.

    Args:
        question: the index of the question to which a token belongs, 0 for the image, below 0 for padding [batch,
            time].

    Returns:
        [batch, time, time] bool.
    """
    sees = (question[:, :, None] == question[:, None]) | (question[:, None] == 0)
    real = question > PADDING
    return (sees & real[:, :, None] & real[:, None]) | torch.eye(question.shape[1], dtype=torch.bool)


def trained_vlm(kind: str, stage: str = "sft", seed: int = 0, size: int = SIZE, steps: float = 1.0) -> Path:
    """Return the folder of a trained model with its processor, from the cache; an interrupted training resumes.

    Args:
        kind: see :func:`lamella.zoo.vlm.shapes_vlm`.
        stage: the last of :data:`STAGES` to train; encoder-decoders have those of :data:`STAGES_SEQ2SEQ`.
        seed: random seed of weights and rows.
        size: the image size in pixels.
        steps: a fraction of the steps of the stages, for quick runs.
    """
    encodes = kind in SHAPES_SEQ2SEQ
    stages = STAGES_SEQ2SEQ if encodes else STAGES
    names = list(stages)
    before = names[: names.index(stage)][-1:]
    recipe = stages[stage]
    config = replace(recipe.config, steps=max(2, round(steps * (recipe.config.steps or 0))), seed=seed)
    key = (
        f"{[(name, stages[name].config) for name in names[: names.index(stage) + 1]]} {TURNS} {POSITION_SCALE}"
        + encodes * f" {ENTAILED}"
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    name = f"shapes-{kind}-{stage}-{size}-{seed}-{steps:g}-{digest}"

    def build(folder: Path) -> dict[str, Any]:
        model, processor = shapes_vlm(kind, seed, size)
        if before:
            model = opened_vlm(trained_vlm(kind, before[0], seed, size, steps))
        rows = recipe.rows((config.steps or 0) * config.batch, names.index(stage) + 10 * seed, size)
        work = cache_folder() / f"training-{name}"
        blank = np.zeros((size, size, 3), dtype=np.uint8)
        task = Task(loss, collate=reading(Processing(processor, encodes), blank))
        log = fit(model, rows, task, config, out=work, trainable=recipe.trains)
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        shutil.rmtree(work)
        return {"stage": stage, "seed": seed, "steps": config.steps, "loss": log.train[-1].loss}

    return build_once(name, build, megabytes=200)


def opened_vlm(folder: Path) -> Any:
    """Open the transformers model of a folder, in float32."""
    return open_model(folder, dtype=torch.float32, device="cpu").model


def rows_of(
    folder: Path, tasks: Sequence[str], count: int, part: Part = "test", seed: int = 0, size: int = SIZE
) -> ImageText:
    """Return rows of any part of the data for a trained model.

    Args:
        folder: the folder of the model.
        tasks: the tasks.
        count: the number of rows.
        part: the part of the data.
        seed: random seed.
        size: the image size in pixels.
    """
    encodes = bool(open_config(folder).is_encoder_decoder)
    rows = [shown_row(each) for each in examples(tasks, count, part, seed, size)]
    return ImageText(rows, Processing(open_processor(folder), encodes))
