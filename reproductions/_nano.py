"""Small models that reproductions train themselves: a character-level Llama, on prose or on a mixture of tasks."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from lamella.stack import Stack
from lamella.train import Sample, Task, TrainConfig, collate, fit, response_loss
from lamella.zoo.cache import build_once

LETTERS = "\n" + "".join(chr(code) for code in range(32, 127)) + "§¶"  # the last two mark tasks
COPY, REVERSE = "§", "¶"
TEXTS = ("pydoc", "stdlib")  # a model of 2.7 M parameters learns pydoc alone by heart: 0.49 nats on it, 1.73 beside it


def encode(text: str) -> LongTensor:
    """Characters as token ids [time]; what is not in the table becomes a space."""
    place = {letter: index for index, letter in enumerate(LETTERS)}
    return torch.tensor([place.get(letter, place[" "]) for letter in text])


def prose(split: str, count: int, length: int, seed: int, sources: Sequence[str] = ("pydoc",)) -> list[Sample]:
    """Stretches of Python's documentation (or of several texts), with prompts of a quarter to a half of them."""
    text = encode("\n".join(str(lamella.load_text(source, split)) for source in sources))
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        begin = drawn.randrange(len(text) - length)
        rows.append(_sample(text[begin : begin + length], drawn.randrange(length // 4, length // 2)))
    return rows


def puzzles(count: int, length: int, seed: int) -> list[Sample]:
    """Random strings to copy or to reverse, as the mark before them says; the answer is the response."""
    drawn = random.Random(seed)
    size = (length - 2) // 2
    rows = []
    for _ in range(count):
        mark = drawn.choice([COPY, REVERSE])
        letters = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=size))
        answer = letters if mark == COPY else letters[::-1]
        rows.append(_sample(encode(f"{mark}{letters}\n{answer}"), size + 2))
    return rows


def _sample(row: Tensor, prompt: int) -> Sample:
    labels = row.clone()
    labels[:prompt] = -100
    return {"input_ids": row, "labels": labels, "prompt_lengths": torch.tensor(prompt)}


def trained(
    samples: Sequence[Sample],
    *,
    layers: int,
    hidden: int,
    steps: int,
    seed: int,
    name: str,
    batch: int = 16,
    heads: int = 4,
    kv_heads: int = 4,
    lr: float = 3e-3,
    tied: bool = True,
) -> Stack:
    """A Llama trained from scratch on these samples, all tokens of them; kept in the cache for the next run.

    Args:
        name: of the recipe, which the cache is keyed by, with the sizes.
        tied: one matrix for embedding and head.
    """
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )

    def build(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        everything = whole(samples)
        with tempfile.TemporaryDirectory() as work, torch.enable_grad():
            settings = TrainConfig(steps=steps, lr=lr, batch=batch, seed=seed, weight_decay=0.1, warmup=0.05,
                                   save_every=steps, log_every=max(steps // 20, 1))  # fmt: skip
            fit(model, everything, Task(response_loss), settings, out=work)
        model.save_pretrained(folder)
        return {"recipe": name, "steps": steps, "seed": seed}

    folder = build_once(f"reproduction-{name}-{layers}x{hidden}-{steps}-{seed}", build, megabytes=100)
    return Stack(LlamaForCausalLM.from_pretrained(folder).eval(), name=name)


def whole(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples with loss on all of their tokens."""
    return [dict(sample) | {"labels": _all_labels(sample["input_ids"])} for sample in samples]


def _all_labels(row: Tensor) -> Tensor:
    labels = row.clone()
    labels[0] = -100
    return labels


@torch.no_grad()
def nats(model: object, samples: Sequence[Sample], size: int = 16) -> float:
    """Mean loss on the responses, in nats per token, of a model or a view."""
    total = count = 0.0
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size])
        labels = int((batch["labels"] != -100).sum())
        total += float(response_loss(model, batch)) * labels
        count += labels
    return total / count


def scratch(name: str) -> Path:
    """A folder for one run's checkpoints, which goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"lamella-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
