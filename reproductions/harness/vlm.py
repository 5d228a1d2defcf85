"""Small models of images and text that reproductions train themselves on rendered shapes, and keep in the cache.

text        the text learns what captions and lists are, without pictures
naming      captions and lists of pictures with one or two things; all trains but what the text stage has taught
            of words, since no tower is at hand that has seen a picture
alignment   the same with up to four things, once one or two can be seen
sft         all of it learns to answer, several questions to a picture, each as if it were the only one

In conversations, where a question may stand anywhere, places are not learnt in as many steps: here every question sees
the picture and itself alone, and stands where it would without the others. Encoder-decoders have one question to a
picture, half of them whether a sentence is true:

naming      captions and lists of one or two things
matching    questions about one or two things: of four, they never learn to look for the thing that a sentence names
sft         the same questions about up to four
"""

from __future__ import annotations

import hashlib
import shutil
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

SAVED = 50  # steps from one checkpoint to the next
TURNS = 8  # questions to a picture
WHOLE = ("caption", "list")
TEXT = ("language_model", "lm_head")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        config: how long, how fast; its seed is the run's.
        rows: from their number and a seed to training rows.
        trains: whether a parameter of that name does.
    """

    config: TrainConfig
    rows: Callable[[int, int, int], list[ImageTextRow]]
    trains: Callable[[str], bool]


def told(count: int, seed: int, size: int) -> list[ImageTextRow]:
    """Captions and lists without pictures."""
    return [
        ImageTextRow((), turns([(each.prompt, each.answer)]), task=each.task)
        for each in examples(WHOLE, count, seed=seed)
    ]


def shown(count: int, seed: int, size: int, most: int = MOST) -> list[ImageTextRow]:
    """The same with pictures of one to so many things, each in turn as a caption and as a list."""
    drawn = np.random.default_rng((seed, 3))
    rows = []
    for number, scene in zip(range(count), scenes("calibration", (seed, 4), (1, most)), strict=False):
        said = TASKS[WHOLE[number % 2]](scene, drawn)
        assert said is not None
        rows.append(ImageTextRow((render(scene, size, seed=(seed, number)),), turns([(f"{MARK}\n{said[0]}", said[1])])))
    return rows


def questions(count: int, seed: int, size: int) -> list[ImageTextRow]:
    """Several questions to each picture; every other one ends with a caption or a list."""
    drawn = np.random.default_rng((seed, 1))
    rows = []
    for number, scene in zip(range(count), scenes("calibration", (seed, 2)), strict=False):
        said = list(_asked(scene, drawn, end=number % 4))
        said[0] = (f"{MARK}\n{said[0][0]}", said[0][1])
        rows.append(ImageTextRow((render(scene, size, seed=(seed, number)),), turns(said)))
    return rows


def asked(count: int, seed: int, size: int, tasks: Sequence[str], most: int = MOST) -> list[ImageTextRow]:
    """One question about each picture of up to so many things, of these kinds in turn."""
    return [shown_row(each) for each in examples(tasks, count, "calibration", seed, size, most)]


def shown_row(each: ShapeExample) -> ImageTextRow:
    """An example as a row, its image first."""
    return ImageTextRow((each.image,), turns([(f"{MARK}\n{each.prompt}", each.answer)]), task=each.task)


def _asked(scene: ShapeScene, drawn: np.random.Generator, end: int) -> Iterator[tuple[str, str]]:
    for task in ("count", *drawn.choice(QUESTIONS, TURNS - 1), *WHOLE[end : end + 1]):  # of any scene one can count
        said = TASKS[str(task)](scene, drawn)
        if said is not None:
            yield said


def turns(said: Sequence[tuple[str, str]]) -> tuple[dict[str, str], ...]:
    """Prompts with their answers as the messages of a row."""
    return tuple({"role": role, "content": text} for turn in said for role, text in zip(ROLES, turn, strict=True))


ROLES = ("user", "assistant")
RECIPE = TrainConfig(
    lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05, batch=16, log_every=25, save_every=SAVED, bf16=True
)
STAGES = {
    "text": Stage(replace(RECIPE, steps=400, batch=32), told, lambda name: any(part in name for part in TEXT)),
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


def reading(processing: Processing, picture: Image) -> Callable[[Sequence[ImageTextRow]], dict[str, Tensor]]:
    """What makes batches of rows, and says how many tokens of each are of its picture; all are of the same size."""
    unasked = ImageTextRow((picture,), turns([(MARK, "nothing")]))
    tokens = 0 if processing.encodes else processing.prompts([unasked])["input_ids"].shape[1]

    def batch(rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
        return processing.batch(rows) | {"picture": torch.tensor([tokens if row.images else 0 for row in rows])}

    return batch


def loss(model: Any, batch: dict[str, Tensor]) -> Any:
    """Cross-entropy of the answers, each question by itself; of experts, with the loss that balances their load."""
    if model.config.is_encoder_decoder:
        return response_loss(model, batch)
    text, mask = model.config.get_text_config(), batch["attention_mask"]
    experts = hasattr(text, "router_aux_loss_coef")
    inputs = read_inputs(model, batch) | alone(model, batch) | ({"output_router_logits": True} if experts else {})
    output = model.model(**inputs, use_cache=False)
    answers = batch["labels"][:, 1:]
    told = answers >= 0
    ce = cross_entropy(model.lm_head(output.last_hidden_state[:, :-1][told]), answers[told])
    if not experts:
        return ce
    balance = load_balancing_loss_func(output.router_logits, text.num_experts, text.num_experts_per_tok, mask)
    return ce + text.router_aux_loss_coef * balance, {"ce": ce, "balance": balance}


def alone(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each token sees and where it stands, when every question with its answer is by itself behind the picture.

    Returns:
        ``attention_mask`` [batch, 1, time, time] bool and ``position_ids`` [batch, time], on three axes of Qwen's line.
    """
    ids, real, answers = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] >= 0
    time = torch.arange(ids.shape[1])
    ends = (~real).sum(1, keepdim=True) + batch["picture"][:, None]  # where the first question begins
    turn = torch.zeros_like(ids)
    turn[:, 1:] = (answers[:, :-1] & ~answers[:, 1:]).cumsum(1)  # behind an answer comes another question
    turn = torch.where(time < ends, 0, turn + 1).masked_fill(~real, PADDING)
    first = torch.where(turn[:, :, None] == turn[:, None], time, len(time)).amin(2)  # of its turn
    places = (real.cumsum(1) - 1).clamp(min=0)
    if "image_grid_thw" in batch:
        grid = {name: batch[name] for name in ("attention_mask", "image_grid_thw", "mm_token_type_ids")}
        places = model.model.get_rope_index(ids, **grid)[0]
    return {
        "attention_mask": apart(turn).tril()[:, None],
        "position_ids": places - torch.where(turn > 0, first - ends, 0),
    }


PADDING = -1


def apart(question: Tensor) -> Tensor:
    """What a token sees of several questions about a picture: it and its own question; padding, itself alone.

    Args:
        question: the question to which a token belongs, 0 for the picture, below 0 for padding [batch, time].

    Returns:
        [batch, time, time] bool.
    """
    sees = (question[:, :, None] == question[:, None]) | (question[:, None] == 0)
    real = question > PADDING
    return (sees & real[:, :, None] & real[:, None]) | torch.eye(question.shape[1], dtype=torch.bool)


def trained_vlm(kind: str, stage: str = "sft", seed: int = 0, size: int = SIZE, steps: float = 1.0) -> Path:
    """The folder of a trained model with its processor, kept in the cache; a training that was killed goes on.

    Args:
        kind: see :func:`lamella.zoo.vlm.shapes_vlm`.
        stage: after which of :data:`STAGES`; encoder-decoders have those of :data:`STAGES_SEQ2SEQ`.
        seed: of weights and rows.
        size: pixels of its pictures.
        steps: a share of those of the stages, for a quick look.
    """
    encodes = kind in SHAPES_SEQ2SEQ
    stages = STAGES_SEQ2SEQ if encodes else STAGES
    names = list(stages)
    before = names[: names.index(stage)][-1:]
    recipe = stages[stage]
    config = replace(recipe.config, steps=max(2, round(steps * (recipe.config.steps or 0))), seed=seed)
    said = (
        f"{[(name, stages[name].config) for name in names[: names.index(stage) + 1]]} {TURNS} {POSITION_SCALE}"
        + encodes * f" {ENTAILED}"
    )
    digest = hashlib.sha256(said.encode()).hexdigest()[:8]
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
    """The transformers model of a folder, in float32."""
    return open_model(folder, dtype=torch.float32, device="cpu").model


def rows_of(
    folder: Path, tasks: Sequence[str], count: int, part: Part = "test", seed: int = 0, size: int = SIZE
) -> ImageText:
    """Rows of the world for a trained model, of any part."""
    encodes = bool(open_config(folder).is_encoder_decoder)
    rows = [shown_row(each) for each in examples(tasks, count, part, seed, size)]
    return ImageText(rows, Processing(open_processor(folder), encodes))
