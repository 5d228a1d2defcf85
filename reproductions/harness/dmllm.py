"""Two small diffusion models that answer questions about images of rendered shapes.

    scratch     LLaVA with LLaDA     masked tokens from random weights
    ar2diff     LLaVA with Dream     70 % of the steps next-token prediction; then masked tokens

An image has 16 tokens, one for each cell of its grid, and objects of one kind look alike, so that the vision tower,
which is trained from random weights with the rest, learns quickly. In the first stage each image has several questions,
each of which is processed independently, then a single one. Positions of questions start at a random offset from the
end of the image: if they always started directly after it, answers would be wrong where dropped tokens change the
offset. The first model computes its whole sequence in every pass. The second is trained to denoise with a prompt that
attends only to itself, so that the prompt can be cached. Answers are padded with end tokens to their full length.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

import lamella
from harness.vlm import PADDING, apart, shown_row, turns
from lamella.data import MARK, ImageTextRow, Processing
from lamella.data.images import Image
from lamella.data.samples import NO_LOSS
from lamella.stack import Model
from lamella.train import Task, TrainConfig, diffusion_loss, fit, response_loss
from lamella.zoo import cache_folder
from lamella.zoo.cache import build_once
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import MOST, TASKS, Part, examples, render, scenes

Provenance = Literal["scratch", "ar2diff"]
Sight = Literal["all", "prompt", "apart", "causal"]
PROVENANCES = get_args(Provenance)
KINDS = {"scratch": "llava_llada", "ar2diff": "llava_dream"}
CACHES = {"scratch": "none", "ar2diff": "prompt"}
LENGTHS = {"colour": 2, "list": 26}  # short and long answers, in tokens, their end among them
STEPS, QUICK, BATCH = 5500, 4, 16
PATCH = 8  # pixels, on a side, of an image token
GAP = 12  # maximum offset of a question's positions from the end of the image, in both directions
TRIES = 8  # attempts for questions about colours, so that most of the possible ones occur


class Stage(NamedTuple):
    """A fraction of all steps, and the attention mask in it.

    all         every token attends to all
    prompt      image and question attend to each other, the answer to everything: prompts can be cached
    apart       several questions per image: the image attends to itself, a question with its answer to image and itself
    causal      the same with causal attention; predicts the next token, where the others predict masked ones
    """

    sight: Sight
    share: float


STAGES = {
    "scratch": (Stage("apart", 0.7), Stage("all", 0.3)),
    "ar2diff": (Stage("causal", 0.7), Stage("prompt", 0.3)),
}


@dataclass(frozen=True)
class Asked:
    """An image with its questions: task, question and answer of each."""

    picture: Image
    said: Sequence[tuple[str, str, str]]

    def content(self) -> bytes:
        """Return the content for digests."""
        return self.picture.tobytes() + repr(self.said).encode()


def shown(task: str, count: int, part: Part, seed: int) -> list[ImageTextRow]:
    """Return rows of one task.

    Args:
        task: the task.
        count: the number of rows.
        part: the part of the data.
        seed: random seed.
    """
    return [shown_row(each, varied=False) for each in examples([task], count, part, seed)]


def asked(count: int, seed: int) -> list[Asked]:
    """Return one question per image, with short and long answers alternately."""
    return [
        Asked(render(each.scene), [(each.task, each.prompt, each.answer)])
        for each in examples(tuple(LENGTHS), count, "calibration", seed)
    ]


def asked_together(count: int, seed: int) -> list[Asked]:
    """Return several questions per image: its list, and colours."""
    rng, rows = np.random.default_rng((seed, 1)), []
    for _, scene in zip(range(count), scenes("calibration", (seed, 2), (2, MOST)), strict=False):
        colours = {said for _ in range(TRIES) if (said := TASKS["colour"](scene, rng))}
        listed = TASKS["list"](scene, rng)
        assert listed is not None
        said = [("list", *listed), *(("colour", *each) for each in sorted(colours))]
        rows.append(Asked(render(scene), said))
    return rows


def reading(processing: Processing, sight: Sight, gap: int = 0) -> Callable[[Sequence[Asked]], dict[str, Tensor]]:
    """Return a collate function: tokens, labels of answers, attention masks and positions, padded on the right.

    The positions of each question start at the end of the image plus a random offset of up to ``gap``.

    Args:
        processing: the processor.
        sight: the attention mask, see :class:`Stage`.
        gap: the maximum offset.
    """
    tokenizer, known = processing.tokenizer, dict[str, tuple[list[int], list[int]]]()

    def parts(picture: Image, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens up to the end of the image, and those after it."""
        if question not in known:
            row = ImageTextRow((picture,), turns([(f"{MARK}\n{question}", "nothing")]))
            ids = processing.prompts([row])["input_ids"][0].tolist()
            end = len(ids) - ids[::-1].index(tokenizer.image_token_id)
            known[question] = ids[:end], ids[end:]
        return known[question]

    def columns(row: Asked) -> Tensor:
        """Return id, label, question (0 is the image) and position of each token `[4, time]`."""
        first = parts(row.picture, row.said[0][1])[0]
        found = [(token, NO_LOSS, 0, position) for position, token in enumerate(first)]
        for number, (task, question, answer) in enumerate(row.said, start=1):
            after, answer_ids = (
                parts(row.picture, question)[1],
                tokenizer(answer, add_special_tokens=False)["input_ids"],
            )
            answer_ids = answer_ids + [tokenizer.eos_token_id] * (LENGTHS[task] - len(answer_ids))
            labelled_tokens = [*((token, NO_LOSS) for token in after), *zip(answer_ids, answer_ids, strict=True)]
            start = len(first) + int(torch.randint(-gap, gap + 1, ()))
            found += [(*each, number, position) for position, each in enumerate(labelled_tokens, start)]
        return torch.tensor(found).T

    def batch(rows: Sequence[Asked]) -> dict[str, Tensor]:
        each = [columns(row) for row in rows]
        table = torch.zeros(4, len(rows), max(one.shape[1] for one in each), dtype=torch.long)
        table[1], table[2] = NO_LOSS, PADDING
        for index, one in enumerate(each):
            table[:, index, : one.shape[1]] = one
        ids, labels, question, position_ids = table
        image_rows = [ImageTextRow((row.picture,), turns([(MARK, "nothing")])) for row in rows]
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": position_ids,
            "attention_mask": seen(question, labels != NO_LOSS, sight)[:, None],
            "pixel_values": processing.prompts(image_rows)["pixel_values"],
            "prompt_lengths": (labels != NO_LOSS).int().argmax(dim=1),
        }

    return batch


def seen(question: Tensor, answers: Tensor, sight: Sight) -> Tensor:
    """Return the attention mask, in which padding attends to itself `[batch, time, time]`.

    Args:
        question: the index of the question to which a token belongs, 0 for the image, below 0 for padding `[batch,
            time]`.
        answers: whether it belongs to an answer `[batch, time]`.
        sight: see :class:`Stage`.
    """
    if sight in ("apart", "causal"):
        sees = apart(question)
        return sees.tril() if sight == "causal" else sees
    sees = apart(question.clamp(max=0))  # a single group
    return sees & (answers[:, :, None] | ~answers[:, None]) if sight == "prompt" else sees


def trained(provenance: Provenance, seed: int = 0, quick: bool = False) -> Model:
    """Return one of the two models, from the cache if it was trained before.

    Args:
        provenance: the kind of model.
        seed: random seed.
        quick: whether to train only a few steps.
    """
    stages, steps = STAGES[provenance], QUICK if quick else STEPS
    digest = hashlib.sha256(repr((stages, BATCH, PATCH, GAP, TRIES)).encode()).hexdigest()[:8]
    name = f"shapes-dmllm-{provenance}-{seed}-{steps}-{digest}"

    def build(folder: Path) -> dict[str, Any]:
        model, processor = shapes_vlm(KINDS[provenance], seed, patch=PATCH)
        for number, stage in enumerate(stages):
            work = cache_folder() / f"training-{name}-{number}"
            learn(model, processor, stage.sight, max(2, round(stage.share * steps)), 10 * seed + number, work)
        for work in cache_folder().glob(f"training-{name}-*"):  # kept until all stages are done, to resume
            shutil.rmtree(work)
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        return {"provenance": provenance, "steps": steps, "seed": seed}

    return lamella.open(build_once(name, build, megabytes=100))


def learn(model: Any, processor: Any, sight: Sight, steps: int, seed: int, work: Path) -> None:
    """Train one stage.

    Args:
        model: the model, which is changed.
        processor: its processor.
        sight: the attention mask, see :class:`Stage`.
        steps: the number of steps.
        seed: random seed.
        work: the folder for checkpoints.
    """
    rows = (asked_together if sight in ("apart", "causal") else asked)(steps * BATCH, seed)
    config = TrainConfig(
        steps=steps, lr=1e-3, batch=BATCH, weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05, seed=seed, log_every=50,
        save_every=200, bf16=True,
    )  # fmt: skip
    loss = response_loss if sight == "causal" else partial(diffusion_loss, by_count=True)
    with torch.enable_grad():
        fit(model, rows, Task(loss, collate=reading(Processing(processor), sight, GAP)), config, out=work)


def prompts(model: Model, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
    """Return the model inputs of some requests."""
    assert model.path is not None
    return Processing(open_processor(model.path)).prompts(rows)
