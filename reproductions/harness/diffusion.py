"""Three small models of one shape that read characters: a decoder, one that learnt to denoise from the start, and one
that was a decoder first.

    AR        Qwen2                      next token
    MDM       LLaDA                      masked tokens, from scratch, in twice the steps
    AR2MDM    Dream, begun from AR       masked tokens, a fifth of the steps

All read prose of Python's documentation and rows of puzzles, whose answers are to be copied or reversed.
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
ROUNDS = {"AR": 1.0, "MDM": 2.0, "AR2MDM": 0.2}  # of the steps: from scratch, denoising takes more to learn puzzles
MASK = len(LETTERS)  # the token that stands for a mask
SIZE = 4  # letters of a puzzle
LENGTH = 12 * (2 * SIZE + 2)  # of a row, in characters: a dozen puzzles
SPREAD = 0.04  # of the weights before training: by 0.02 and at twice the rate, denoising does not learn the puzzles
BATCH = 32


def puzzle(drawn: random.Random) -> tuple[str, str]:
    """A mark with some letters, and the letters as the mark says."""
    mark = drawn.choice([COPY, REVERSE])
    letters = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=SIZE))
    return f"{mark}{letters}\n", letters if mark == COPY else letters[::-1]


def puzzles(count: int, seed: int) -> list[Sample]:
    """Rows of puzzles, of which the answers alone carry loss."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        told = [puzzle(drawn) for _ in range(LENGTH // (2 * SIZE + 2))]
        ids = encode("".join(asked + answer for asked, answer in told))
        answers = torch.tensor([[False] * (SIZE + 2) + [True] * SIZE for _ in told]).flatten()
        rows.append({"input_ids": ids, "labels": ids.masked_fill(~answers, -100), "prompt_lengths": torch.tensor(0)})
    return rows


def reading(count: int, seed: int) -> list[Sample]:
    """Prose and puzzles in turn."""
    rows = blocks(text("calibration", count // 2, seed), loss_on="all")
    return [each for pair in zip(rows, puzzles(count // 2, seed), strict=True) for each in pair]


def trained(kind: str, seed: int, *, layers: int = 8, hidden: int = 128, steps: int = 2000) -> Stack:
    """One of the three models; kept in the cache for the next run."""

    def build(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        model, loss = untrained(kind, layers, hidden)
        if kind == "AR2MDM":
            begun = trained("AR", seed, layers=layers, hidden=hidden, steps=steps)
            model.load_state_dict(begun.model.state_dict())
        config = from_scratch(int(ROUNDS[kind] * steps), lr=1e-3, batch=BATCH, seed=seed, bf16=True)
        samples = reading(min(8000, BATCH * steps), seed + (1000 if kind == "AR2MDM" else 0))
        taught(model, samples, config, loss).save_pretrained(folder)
        return {"kind": kind, "steps": steps, "seed": seed}

    folder = build_once(f"reproduction-denoising-{kind}-{layers}x{hidden}-{ROUNDS[kind]:g}x{steps}-{seed}", build, 100)
    return lamella.open(folder)


def untrained(kind: str, layers: int, hidden: int) -> tuple[Any, Callable[..., Any]]:
    """A model of that kind, and its loss."""
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
    """Puzzles behind some that are solved [count, time], and their answers [count, SIZE]."""
    drawn = random.Random(seed)
    prompts, answers = [], []
    for _ in range(count):
        before = "".join(said + answer for said, answer in (puzzle(drawn) for _ in range(shown)))
        said, answer = puzzle(drawn)
        prompts.append(encode(before + said))
        answers.append(encode(answer))
    return torch.stack(prompts), torch.stack(answers)


def text(split: str, count: int, seed: int) -> Tensor:
    """Stretches of prose [count, LENGTH]."""
    letters = _letters(split)
    begins = torch.randint(len(letters) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return letters[begins + torch.arange(LENGTH)]


@cache
def _letters(split: str) -> Tensor:
    return encode("\n".join(str(lamella.load_text(source, split)) for source in TEXTS))
