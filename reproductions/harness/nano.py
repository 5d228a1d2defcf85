"""Small models that reproductions train: a character-level Llama, on prose or on a mixture of tasks."""

from __future__ import annotations

import atexit
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from lamella.data.samples import NO_LOSS
from lamella.stack import Stack
from lamella.train import Sample, Task, TrainConfig, collate, fit, response_loss
from lamella.train.losses import label_log_probs
from lamella.train.task import Loss
from lamella.zoo.cache import build_once

LETTERS = "\n" + "".join(chr(code) for code in range(32, 127)) + "§¶"  # the last two mark tasks
COPY, REVERSE = "§", "¶"
TEXTS = ("pydoc", "stdlib")  # 2.7 M parameters memorise pydoc alone: a loss of 0.49 nats on it, and 1.73 on other text


def encode(text: str) -> LongTensor:
    """Return the characters as token ids `[time]`; unknown characters become spaces."""
    index_of = {letter: index for index, letter in enumerate(LETTERS)}
    return torch.tensor([index_of.get(letter, index_of[" "]) for letter in text])


def prose(
    split: str,
    count: int,
    length: int,
    seed: int,
    sources: Sequence[str] = ("pydoc",),
    part: tuple[float, float] = (0.0, 1.0),
) -> list[Sample]:
    """Return passages of Python's documentation (or of several texts), with prompts of a quarter to a half of them.

    Args:
        split: the split of the texts.
        count: the number of samples.
        length: the number of characters per sample.
        seed: random seed.
        sources: the names of the texts.
        part: the fractions of each text where the passages begin and end, such as (0, 0.5) for the first half.
    """
    texts = [str(lamella.load_text(source, split)) for source in sources]
    text = encode("\n".join(each[int(part[0] * len(each)) : int(part[1] * len(each))] for each in texts))
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        begin = rng.randrange(len(text) - length)
        rows.append(_sample(text[begin : begin + length], rng.randrange(length // 4, length // 2)))
    return rows


def puzzles(count: int, length: int, seed: int) -> list[Sample]:
    """Return random strings to copy or to reverse, depending on the first character; the answer is the response.

    Args:
        count: the number of samples.
        length: the number of characters per sample.
        seed: random seed.
    """
    rng = random.Random(seed)
    size = (length - 2) // 2
    rows = []
    for _ in range(count):
        mark = rng.choice([COPY, REVERSE])
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size))
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
    lr: float = 3e-3,
    **shape: Any,
) -> Stack:
    """Train a Llama from scratch on all tokens of the samples, and cache it.

    Args:
        samples: the training data.
        layers: the number of layers.
        hidden: the hidden size.
        steps: the number of steps.
        seed: random seed.
        name: the name of the recipe, which is part of the cache key.
        batch: samples per step.
        lr: learning rate.
        shape: heads and more, for :func:`llama`.
    """
    config = from_scratch(steps, lr=lr, batch=batch, seed=seed)
    model = llama(len(LETTERS), hidden, layers, **shape)
    return taught_once(f"{name}-{layers}x{hidden}-{steps}-{seed}", model, lambda: whole(samples), config)


def taught_once(name: str, model: LlamaConfig, samples: Callable[[], Sequence[Sample]], config: TrainConfig) -> Stack:
    """Train a Llama from scratch on the responses of ``samples()``, and cache it.

    Args:
        name: the cache key.
        model: the config of the model.
        samples: returns the training data.
        config: settings of the training.
    """

    def build(folder: Path) -> dict[str, Any]:
        rows = samples()
        torch.manual_seed(config.seed)
        taught(LlamaForCausalLM(model), rows, config).save_pretrained(folder)
        return {"steps": config.steps, "seed": config.seed}

    return built(name, build)


def llama(
    vocabulary: int,
    hidden: int,
    layers: int,
    *,
    context: int = 512,
    heads: int = 4,
    kv_heads: int = 4,
    channels: int | None = None,
    tied: bool = True,
    bos: int | None = None,
) -> LlamaConfig:
    """Return the config of a small Llama, by default without special tokens.

    Args:
        vocabulary: the size of the vocabulary.
        hidden: the hidden size.
        layers: the number of layers.
        context: the maximum number of tokens.
        heads: the number of query heads.
        kv_heads: the number of key-value heads.
        channels: the intermediate size of the MLPs; three times the hidden size by default.
        tied: whether embedding and head share a matrix.
        bos: the token id of the beginning of a sequence, if any.
    """
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=channels or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=None,
        pad_token_id=None,
    )


def from_scratch(steps: int, **settings: Any) -> TrainConfig:
    """Return the training settings of small models."""
    return TrainConfig(steps=steps, weight_decay=0.1, warmup=0.05, log_every=max(steps // 20, 1), **settings)


def taught(
    model: Any, samples: Sequence[Sample], config: TrainConfig, loss: Loss = response_loss, **options: Any
) -> Any:
    """Train a model on the responses, and return it in eval mode; options are those of ``fit``.

    Args:
        model: the model, which is changed.
        samples: the training data.
        config: settings of the training.
        loss: the loss.
        options: further options of ``fit``.
    """
    with tempfile.TemporaryDirectory() as work, torch.enable_grad():
        fit(model, samples, Task(loss), replace(config, save_every=config.steps), out=work, **options)
    return model.eval()


def built(name: str, build: Callable[[Path], dict[str, Any]], megabytes: int = 100) -> Stack:
    """Return the model that ``build`` saves into a folder of the cache, once.

    Args:
        name: the cache key.
        build: saves the model into a folder.
        megabytes: the approximate size of the folder.
    """
    folder = build_once(f"reproduction-{name}", build, megabytes)
    return Stack(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), name=name)


def digest(samples: Sequence[Sample]) -> str:
    """Return a digest of the training data, for the cache key."""
    return hashlib.sha256(b"".join(each["input_ids"].numpy().tobytes() for each in samples)).hexdigest()[:8]


def whole(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with loss on all tokens."""
    return [dict(sample) | {"labels": _all_labels(sample["input_ids"])} for sample in samples]


def _all_labels(row: Tensor) -> Tensor:
    labels = row.clone()
    labels[0] = -100
    return labels


@torch.no_grad()
def nats(model: object, samples: Sequence[Sample], size: int = 16) -> float:
    """Return the mean loss on the responses, in nats per token, of a model or a view.

    Args:
        model: the model or view.
        samples: the samples.
        size: samples per batch.
    """
    total = count = 0.0
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size])
        labels = int((batch["labels"] != -100).sum())
        total += float(response_loss(model, batch)) * labels
        count += labels
    return total / count


@torch.no_grad()
def nats_by_sample(model: Any, samples: Sequence[Sample], size: int = 32) -> list[float]:
    """Return the loss on the labels of each sample, in nats per token, of a model or a view.

    A view runs as in generation: prompts as prompts, and what follows them as generated tokens.

    Args:
        model: the model or view.
        samples: the samples.
        size: samples per batch.
    """
    found: list[float] = []
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size])
        count = (batch["labels"][:, 1:] != NO_LOSS).sum(1)
        found += (-label_log_probs(model, batch) / count).tolist()
    return found


def scratch(name: str) -> Path:
    """Create a folder for the checkpoints of one run, which is removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"lamella-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
