"""Two small models of one shape that answer questions about rendered shapes by denoising.

    scratch     LLaVA around LLaDA     masked tokens from random weights
    ar2diff     LLaVA around Dream     70 % of the steps next tokens, one after the other; then masked tokens

Both learn first to name one or two things, since the towers have seen no picture, then to answer about up to four. The
first computes its whole sequence in every pass. The second learns to denoise with a prompt that sees itself alone, so
that it can be kept. Answers end with as many ends as it takes to fill their length.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

import lamella
from harness.vlm import shown_row
from lamella.data import Processing, Shown
from lamella.stack import Model
from lamella.train import Task, TrainConfig, diffusion_loss, fit, response_loss
from lamella.zoo import cache_folder
from lamella.zoo.cache import build_once
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import MOST, Part, examples

Provenance = Literal["scratch", "ar2diff"]
PROVENANCES = get_args(Provenance)
KINDS = {"scratch": "llava_llada", "ar2diff": "llava_dream"}
CACHES = {"scratch": "none", "ar2diff": "prompt"}
LENGTHS = {"colour": 2, "list": 26}  # short and long answers, in tokens, their end among them
NAMED = {"list": 26, "caption": 8}  # the same, of one or two things
STEPS, BATCH = 10_000, 16


class Stage(NamedTuple):
    """What is learnt in a share of all steps: answers of some lengths about so many things, by next tokens or masks."""

    lengths: Mapping[str, int]
    most: int
    share: float
    causal: bool


STAGES = {
    "scratch": (Stage(NAMED, 2, 0.6, False), Stage(LENGTHS, MOST, 0.4, False)),
    "ar2diff": (Stage(NAMED, 2, 0.6, True), Stage(LENGTHS, MOST, 0.1, True), Stage(LENGTHS, MOST, 0.3, False)),
}


@dataclass(frozen=True)
class Group:
    """Rows of one task, which make a batch."""

    rows: Sequence[Shown]

    def content(self) -> bytes:
        return b"".join(each.content() for each in self.rows)


def shown(task: str, count: int, part: Part, seed: int, most: int = MOST) -> list[Shown]:
    """Rows of one task."""
    return [shown_row(each) for each in examples([task], count, part, seed, most=most)]


def batch_of(processing: Processing, rows: Sequence[Shown], length: int) -> dict[str, Tensor]:
    """Prompts of one task with answers of one length [rows, prompt + length]; the answers carry loss."""
    tokenizer = processing.tokenizer
    batch, end = dict(processing.prompts(rows)), tokenizer.eos_token_id
    told = [tokenizer(row.answer, add_special_tokens=False)["input_ids"] for row in rows]
    answers = torch.tensor([[*ids, *[end] * (length - len(ids))] for ids in told])
    prompt = batch["input_ids"]
    return batch | {
        "input_ids": torch.cat([prompt, answers], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(answers)], dim=1),
        "labels": torch.cat([torch.full_like(prompt, -100), answers], dim=1),
        "prompt_lengths": torch.full((len(rows),), prompt.shape[1]),
    }


def seen(batch: dict[str, Any], causal: bool) -> dict[str, Any]:
    """The same batch, whose tokens see those before them alone; or whose prompt sees itself alone, the answer all."""
    real = batch["attention_mask"].bool()
    time, prompt = real.shape[1], int(batch["prompt_lengths"][0])
    visible = torch.ones(time, time, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    else:
        visible[:prompt, prompt:] = False
    visible = (visible[None] & real[:, None]) | torch.eye(time, dtype=torch.bool)
    return batch | {"attention_mask": {"full_attention": visible[:, None]}}


def trained(provenance: Provenance, seed: int = 0, steps: int = STEPS) -> Model:
    """One of the two models; kept in the cache for the next run."""
    stages = STAGES[provenance]
    digest = hashlib.sha256(repr((stages, BATCH)).encode()).hexdigest()[:8]
    name = f"shapes-dmllm-{provenance}-{seed}-{steps}-{digest}"

    def build(folder: Path) -> dict[str, Any]:
        model, processor = shapes_vlm(KINDS[provenance], seed)
        for number, stage in enumerate(stages):
            work = cache_folder() / f"training-{name}-{number}"
            learn(model, processor, provenance, stage, max(2, round(stage.share * steps)), 10 * seed + number, work)
        for work in cache_folder().glob(f"training-{name}-*"):  # all of them, so that a killed training goes on
            shutil.rmtree(work)
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        return {"provenance": provenance, "steps": steps, "seed": seed}

    return lamella.open(build_once(name, build, megabytes=100))


def learn(model: Any, processor: Any, provenance: Provenance, stage: Stage, steps: int, seed: int, work: Path) -> None:
    """One stage, on its tasks in turn."""
    processing, tasks = Processing(processor), len(stage.lengths)
    rows = {task: shown(task, -(-steps // tasks) * BATCH, "calibration", seed, stage.most) for task in stage.lengths}
    groups: list[Group] = [
        Group(rows[task][place * BATCH : (place + 1) * BATCH])
        for place in range(-(-steps // tasks))
        for task in stage.lengths
    ]

    def collate(drawn: Sequence[Group]) -> dict[str, Any]:
        [group] = drawn
        batch = batch_of(processing, group.rows, stage.lengths[group.rows[0].task])
        return seen(batch, stage.causal) if provenance == "ar2diff" else batch

    config = TrainConfig(
        steps=steps, lr=1e-3, batch=1, weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05, seed=seed, log_every=50,
        save_every=200, bf16=True,
    )  # fmt: skip
    with torch.enable_grad():
        fit(model, groups, Task(response_loss if stage.causal else diffusion_loss, collate=collate), config, out=work)


def prompts(model: Model, rows: Sequence[Shown]) -> dict[str, Tensor]:
    """What a request is given."""
    assert model.path is not None
    return Processing(open_processor(model.path)).prompts(rows)
