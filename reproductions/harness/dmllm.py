"""Two small models of one shape that answer questions about rendered shapes by denoising.

    scratch     LLaVA around LLaDA     masked tokens from random weights
    ar2diff     LLaVA around Dream     70 % of the steps next tokens, one after the other; then masked tokens

As in LLaDA-V and LaViDa, both begin behind a tower and a projector that have seen pictures: those of a small LLaVA,
trained on the same world; the rest has random weights. First each picture comes with all that is asked of it, each
question as if it were the only one, then with one question alone. Questions begin anywhere about the picture's end:
where they stand right behind it always, it costs nearly every answer that places close up behind a few tokens. The
first model computes its whole sequence in every pass. The second learns to denoise with a prompt that sees itself
alone, so that it can be kept. Answers end with as many ends as it takes to fill their length.
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
from harness.vlm import PADDING, apart, opened_vlm, shown_row, trained_vlm, turns
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
STEPS, QUICK, BATCH = 6000, 4, 16
SEES = ("vision_tower", "multi_modal_projector")
GAP = 48  # how far from the picture's end a question may begin, before or behind
TRIES = 8  # of a question about a colour, so that most of those are asked that there are


class Stage(NamedTuple):
    """A share of all steps, and what tokens see there.

    all         everything
    prompt      image and question each other, the answer everything: prompts can be kept
    apart       several questions to a picture: it sees itself, a question with its answer the picture and themselves
    causal      the same, and nothing that comes later; learns the next token, where the others learn masked ones
    """

    sight: Sight
    share: float


STAGES = {
    "scratch": (Stage("apart", 0.7), Stage("all", 0.3)),
    "ar2diff": (Stage("causal", 0.7), Stage("prompt", 0.3)),
}


@dataclass(frozen=True)
class Asked:
    """A picture, and what is asked of it: task, question and answer of each."""

    picture: Image
    said: Sequence[tuple[str, str, str]]

    def content(self) -> bytes:
        return self.picture.tobytes() + repr(self.said).encode()


def shown(task: str, count: int, part: Part, seed: int) -> list[ImageTextRow]:
    """Rows of one task."""
    return [shown_row(each) for each in examples([task], count, part, seed)]


def asked(count: int, seed: int) -> list[Asked]:
    """One question about each picture, short and long ones in turn."""
    return [
        Asked(each.image, [(each.task, each.prompt, each.answer)])
        for each in examples(tuple(LENGTHS), count, "calibration", seed)
    ]


def asked_together(count: int, seed: int) -> list[Asked]:
    """Several questions about each picture: its list, and colours."""
    drawn, rows = np.random.default_rng((seed, 1)), []
    for number, scene in zip(range(count), scenes("calibration", (seed, 2), (2, MOST)), strict=False):
        some = {said for _ in range(TRIES) if (said := TASKS["colour"](scene, drawn))}
        listed = TASKS["list"](scene, drawn)
        assert listed is not None
        said = [("list", *listed), *(("colour", *each) for each in sorted(some))]
        rows.append(Asked(render(scene, seed=(seed, number)), said))
    return rows


def reading(processing: Processing, sight: Sight, gap: int = 0) -> Callable[[Sequence[Asked]], dict[str, Tensor]]:
    """What makes batches of rows, padded on the right: tokens, labels of answers, what each token sees and where it is.

    Questions follow one another, each told that it begins at the end of the picture or up to ``gap`` places from there.
    """
    tokenizer, known = processing.tokenizer, dict[str, tuple[list[int], list[int]]]()

    def parts(picture: Image, question: str) -> tuple[list[int], list[int]]:
        """The tokens of the picture with what is before it, and those behind."""
        if question not in known:
            row = ImageTextRow((picture,), turns([(f"{MARK}\n{question}", "nothing")]))
            ids = processing.prompts([row])["input_ids"][0].tolist()
            end = len(ids) - ids[::-1].index(tokenizer.image_token_id)
            known[question] = ids[:end], ids[end:]
        return known[question]

    def columns(row: Asked) -> Tensor:
        """Of each token its id, label, question (0 is the picture) and place [4, time]."""
        first = parts(row.picture, row.said[0][1])[0]
        found = [(token, NO_LOSS, 0, place) for place, token in enumerate(first)]
        for number, (task, question, answer) in enumerate(row.said, start=1):
            behind, told = parts(row.picture, question)[1], tokenizer(answer, add_special_tokens=False)["input_ids"]
            told = told + [tokenizer.eos_token_id] * (LENGTHS[task] - len(told))
            labelled = [*((token, NO_LOSS) for token in behind), *zip(told, told, strict=True)]
            start = len(first) + int(torch.randint(-gap, gap + 1, ()))
            found += [(*each, number, place) for place, each in enumerate(labelled, start)]
        return torch.tensor(found).T

    def batch(rows: Sequence[Asked]) -> dict[str, Tensor]:
        each = [columns(row) for row in rows]
        table = torch.zeros(4, len(rows), max(one.shape[1] for one in each), dtype=torch.long)
        table[1], table[2] = NO_LOSS, PADDING
        for place, one in enumerate(each):
            table[:, place, : one.shape[1]] = one
        ids, labels, question, places = table
        pictures = [ImageTextRow((row.picture,), turns([(MARK, "nothing")])) for row in rows]
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": places,
            "attention_mask": seen(question, labels != NO_LOSS, sight)[:, None],
            "pixel_values": processing.prompts(pictures)["pixel_values"],
            "prompt_lengths": (labels != NO_LOSS).int().argmax(dim=1),
        }

    return batch


def seen(question: Tensor, answers: Tensor, sight: Sight) -> Tensor:
    """Which tokens a token sees, padding itself [batch, time, time].

    Args:
        question: the question to which a token belongs, 0 for the picture, below 0 for padding [batch, time].
        answers: whether it belongs to an answer [batch, time].
        sight: see :class:`Stage`.
    """
    if sight in ("apart", "causal"):
        sees = apart(question)
        return sees.tril() if sight == "causal" else sees
    sees = apart(question.clamp(max=0))  # all of it one picture
    return sees & (answers[:, :, None] | ~answers[:, None]) if sight == "prompt" else sees


def trained(provenance: Provenance, seed: int = 0, quick: bool = False) -> Model:
    """One of the two models; kept in the cache for the next run."""
    stages, steps = STAGES[provenance], QUICK if quick else STEPS
    tower = trained_vlm("llava", seed=seed, steps=0.01 if quick else 1.0)
    digest = hashlib.sha256(repr((tower.name, stages, BATCH, GAP, TRIES)).encode()).hexdigest()[:8]
    name = f"shapes-dmllm-{provenance}-{seed}-{steps}-{digest}"

    def build(folder: Path) -> dict[str, Any]:
        model, processor = shapes_vlm(KINDS[provenance], seed)
        seeing = opened_vlm(tower).model
        for part in SEES:
            getattr(model.model, part).load_state_dict(getattr(seeing, part).state_dict())
        for number, stage in enumerate(stages):
            work = cache_folder() / f"training-{name}-{number}"
            learn(model, processor, stage.sight, max(2, round(stage.share * steps)), 10 * seed + number, work)
        for work in cache_folder().glob(f"training-{name}-*"):  # all of them, so that a killed training goes on
            shutil.rmtree(work)
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        return {"provenance": provenance, "steps": steps, "seed": seed}

    return lamella.open(build_once(name, build, megabytes=100))


def learn(model: Any, processor: Any, sight: Sight, steps: int, seed: int, work: Path) -> None:
    """One stage."""
    rows = (asked_together if sight in ("apart", "causal") else asked)(steps * BATCH, seed)
    config = TrainConfig(
        steps=steps, lr=1e-3, batch=BATCH, weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05, seed=seed, log_every=50,
        save_every=200, bf16=True,
    )  # fmt: skip
    loss = response_loss if sight == "causal" else partial(diffusion_loss, by_count=True)
    with torch.enable_grad():
        fit(model, rows, Task(loss, collate=reading(Processing(processor), sight, GAP)), config, out=work)


def prompts(model: Model, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
    """What a request is given."""
    assert model.path is not None
    return Processing(open_processor(model.path)).prompts(rows)
