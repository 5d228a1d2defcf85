"""Three small character-level models of equal size: a decoder, a diffusion model, and one converted from the decoder.

    AR        Qwen2                      next token
    MDM       LLaDA                      masked tokens, from scratch, with twice the steps
    AR2MDM    Dream, initialised from AR masked tokens, a fifth of the steps

All are trained on prose of Python's documentation and on rows of puzzles, whose answers are copies or reversals.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import lamella
from harness.nano import COPY, LETTERS, REVERSE, TEXTS, encode, from_scratch, taught
from lamella.stack import Stack
from lamella.stack.diffusion import DreamConfig, DreamForMaskedLM, LLaDAConfig, LLaDAForMaskedLM
from lamella.train import Sample, blocks, diffusion_loss, response_loss
from lamella.zoo.cache import build_once

KINDS = ("AR", "MDM", "AR2MDM")
ROUNDS = {"AR": 1.0, "MDM": 2.0, "AR2MDM": 0.2}  # relative steps: from scratch, denoising needs more for the puzzles
MASK = len(LETTERS)  # the mask token
SIZE = 4  # letters of a puzzle
LENGTH = 6 * (2 * SIZE + 2)  # of a row, in characters: six puzzles
SPREAD = 0.04  # initialisation of weights: with 0.02 and twice the rate, denoising does not learn the puzzles
BATCH = 16


def puzzle(rng: random.Random) -> tuple[str, str]:
    """Return a mark with some letters, and the letters copied or reversed as the mark requires."""
    mark = rng.choice([COPY, REVERSE])
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=SIZE))
    return f"{mark}{letters}\n", letters if mark == COPY else letters[::-1]


def puzzles(count: int, seed: int) -> list[Sample]:
    """Return rows of puzzles with loss on the answers only."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        solved = [puzzle(rng) for _ in range(LENGTH // (2 * SIZE + 2))]
        ids = encode("".join(asked + answer for asked, answer in solved))
        answers = torch.tensor([[False] * (SIZE + 2) + [True] * SIZE for _ in solved]).flatten()
        rows.append({"input_ids": ids, "labels": ids.masked_fill(~answers, -100), "prompt_lengths": torch.tensor(0)})
    return rows


def reading(count: int, seed: int) -> list[Sample]:
    """Return prose and puzzles alternately."""
    rows = blocks(text("calibration", count // 2, seed), loss_on="all")
    return [each for pair in zip(rows, puzzles(count // 2, seed), strict=True) for each in pair]


def trained(kind: str, seed: int, *, layers: int = 8, hidden: int = 96, steps: int = 2000) -> Stack:
    """Return one of the three models, from the cache if it was trained before.

    Args:
        kind: one of :data:`KINDS`.
        seed: random seed.
        layers: the number of layers.
        hidden: the hidden size.
        steps: the number of steps of AR.
    """

    def build(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        model, loss = untrained(kind, layers, hidden)
        if kind == "AR2MDM":
            begun = trained("AR", seed, layers=layers, hidden=hidden, steps=steps)
            model.load_state_dict(begun.model.state_dict())
        config = from_scratch(int(ROUNDS[kind] * steps), lr=1e-3, batch=BATCH, seed=seed)
        samples = reading(min(8000, BATCH * steps), seed + (1000 if kind == "AR2MDM" else 0))
        taught(model, samples, config, loss).save_pretrained(folder)
        return {"kind": kind, "steps": steps, "seed": seed}

    recipe = f"{layers}x{hidden}-{ROUNDS[kind]:g}x{steps}-{BATCH}x{LENGTH}"
    folder = build_once(f"reproduction-denoising-{kind}-{recipe}-{seed}", build, 100)
    return lamella.open(folder)


def untrained(kind: str, layers: int, hidden: int) -> tuple[Any, Callable[..., Any]]:
    """Return an untrained model of the given kind, and its loss.

    Args:
        kind: one of :data:`KINDS`.
        layers: the number of layers.
        hidden: the hidden size.
    """
    shape = {
        "vocab_size": MASK + 1, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": SPREAD,
    }  # fmt: skip
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind == "AR":
        return Qwen2ForCausalLM(Qwen2Config(**shape, **tokens)), response_loss
    if kind == "AR2MDM":
        return DreamForMaskedLM(DreamConfig(**shape, **tokens, mask_token_id=MASK)), diffusion_loss
    config = LLaDAConfig(
        vocab_size=MASK + 1, d_model=hidden, mlp_hidden_size=3 * hidden, n_layers=layers, n_heads=4,
        max_sequence_length=512, rope_theta=10000.0, rms_norm_eps=1e-6, include_qkv_bias=True, mask_token_id=MASK,
        init_std=SPREAD,
    )  # fmt: skip
    return LLaDAForMaskedLM(config), diffusion_loss


def asked(count: int, seed: int, shown: int = 5) -> tuple[Tensor, Tensor]:
    """Return puzzles after some solved ones `[count, time]`, and their answers `[count, SIZE]`.

    Args:
        count: the number of puzzles.
        seed: random seed.
        shown: the number of solved puzzles before each.
    """
    rng = random.Random(seed)
    prompts, answers = [], []
    for _ in range(count):
        before = "".join(question + answer for question, answer in (puzzle(rng) for _ in range(shown)))
        question, answer = puzzle(rng)
        prompts.append(encode(before + question))
        answers.append(encode(answer))
    return torch.stack(prompts), torch.stack(answers)


def text(split: str, count: int, seed: int) -> Tensor:
    """Return passages of prose `[count, LENGTH]`.

    Args:
        split: the split of the texts.
        count: the number of passages.
        seed: random seed.
    """
    letters = _letters(split)
    starts = torch.randint(len(letters) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return letters[starts + torch.arange(LENGTH)]


@cache
def _letters(split: str) -> Tensor:
    return encode("\n".join(str(lamella.load_text(source, split)) for source in TEXTS))
