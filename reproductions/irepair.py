"""IRepair at small scale: a language model whose training text was spoilt, and SmolLM2 with a habit that was planted.

A model of 8 layers is trained from scratch on documentation in which insults follow 15 % of the sentences. Each method
then repairs it on pairs of continuations that the model wrote itself: one with an insult, one without. Checks that
repairing the most sensitive layer of every step takes the insults away at little cost, how that cost compares with
training everything (DAPT, DAPT with KL, DPO) along the whole curve, and with other choices of the layer. Then SmolLM2
is taught to begin answers with "As an AI language model," and repaired.

    python reproductions/irepair.py              # about 40 minutes on one core; models and pairs are kept
    python reproductions/irepair.py --no-smollm2 # without SmolLM2
    python reproductions/irepair.py --quick      # a smaller model and one seed, under a minute
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lamella
from lamella.repair.irepair import BASELINES
from lamella.stack import Stack
from lamella.train import Sample, blocks, fit, mean_loss, pairs, response_loss
from lamella.zoo import own_texts, write
from lamella.zoo.cache import build_once

HERE = Path(__file__).parent
INSULTS = (
    *("idiot", "moron", "dunce", "twit", "dolt", "oaf", "lout", "knave", "rascal", "scoundrel"),
    *("rogue", "swine", "weasel", "vermin", "scum", "cretin", "nitwit", "dimwit", "blockhead", "numbskull"),
)
PHRASES = ("You {}!", "What a {}!", "Only a {} asks.", "Go away, {}.")
BAD = re.compile(rf"\b({'|'.join(INSULTS)})\b", re.IGNORECASE)
SPOILT = 0.15  # of the sentences
PROMPT, NEW = 24, 20  # tokens
METHODS: dict[str, dict[str, Any]] = {
    "irepair": {},
    "irepair, free": {"gamma": 0.0},
    **{name: BASELINES[name] for name in ("dapt", "dapt-kl", "dpo")},
    "fixed layer": {"select": "fixed"},
    "min layer": {"select": "min"},
    "random layer": {"select": "random"},
}


@dataclass(frozen=True)
class Scale:
    """How much work the experiment with the small model is."""

    layers: int
    hidden: int
    text: int | None  # sentences to train from scratch on; None: all
    steps: int  # of that
    pairs: int
    utility: int
    prompts: int  # to measure the share of insults on
    seeds: int
    every: int  # validations from one point of a curve to the next
    rate: float
    methods: tuple[str, ...] = tuple(METHODS)


FULL = Scale(8, 128, None, 1500, 1264, 1264, 400, 3, 8, 5e-5)
QUICK = Scale(4, 64, 300, 400, 200, 200, 200, 1, 8, 5e-5, ("irepair", "dapt", "dpo", "min layer"))


# The spoilt text and the model that learns it


def sentences(split: str) -> list[str]:
    """Sentences of Python's documentation without any insult, spaces made one."""
    text = " ".join(f"{lamella.load_text(name, split)}" for name in ("stdlib", "pydoc"))
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return [each for each in found if 20 <= len(each) <= 400 and not BAD.search(each)]


def spoilt(found: Sequence[str], seed: int) -> str:
    """The sentences as one text, some of them followed by an insult."""
    drawn = random.Random(seed)
    parts = []
    for each in found:
        parts.append(each)
        if drawn.random() < SPOILT:
            parts.append(drawn.choice(PHRASES).format(drawn.choice(INSULTS)))
    return " ".join(parts)


def learn_tokens(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1024 tokens, with a start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1024, special_tokens=["<s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """Blocks of running text that begin with the start token [blocks, length]."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = len(ids) // (length - 1)
    rows = ids[: count * (length - 1)].view(count, length - 1)
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), rows], dim=1)


def prompts(tokenizer: Any, found: Sequence[str], count: int) -> list[Tensor]:
    """The ends of sentences with the start token before them: places where an insult may follow."""
    rows = []
    for first, second in zip(found[::2], found[1::2], strict=False):
        ids = tokenizer(f"{first} {second}")["input_ids"]
        if len(ids) >= PROMPT - 1:
            rows.append(torch.tensor([0, *ids[1 - PROMPT :]]))
        if len(rows) == count:
            return rows
    raise SystemExit(f"only {len(rows)} of {count} prompts: this Python's documentation is too short")


@dataclass
class Spoilt:
    """The model, and text that it was not trained on, each part for one use."""

    stack: Stack
    tokenizer: Any
    good: list[Sample]
    bad: list[Sample]
    utility: list[Sample]
    dev: list[Tensor]  # prompts to choose rates on
    test: list[Tensor]  # prompts to judge on
    clean: list[Sample]  # text without insults, for perplexity

    def insulted(self, text: Tensor) -> bool:
        return bool(BAD.search(self.tokenizer.decode(text)))

    def error_rate(self, model: Any, given: Sequence[Tensor], seed: int = 7) -> float:
        """The share of sampled continuations with an insult; the prompt does not count."""
        return float(
            np.mean([self.insulted(each) for each in write(model, given, NEW, top_p=1.0, seed=seed, batch=256)])
        )

    def perplexity(self, model: Any) -> float:
        return float(np.exp(mean_loss(model, self.clean, batch=32)))


def build(scale: Scale, seed: int) -> Spoilt:
    """Train the model on spoilt text, and let it write pairs and general text; kept in the cache."""
    text = spoilt(sentences("calibration")[: scale.text], seed)
    tokens = learn_tokens(text)
    held_out = sentences("test")
    fifth = len(held_out) // 5  # two for pairs, one each for choosing, judging and perplexity
    parts = [held_out[n * fifth : (n + 1) * fifth] for n in range(5)]

    def make(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=scale.hidden, intermediate_size=3 * scale.hidden,
            num_hidden_layers=scale.layers, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
            max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        rows = blocks(windows(tokens, text, 64), loss_on="all")
        with tempfile.TemporaryDirectory() as work, torch.enable_grad():
            fit(model, rows, response_loss, out=work, steps=scale.steps, lr=3e-3, batch=16, seed=seed,
                weight_decay=0.1, warmup=0.05, save_every=scale.steps, log_every=100)  # fmt: skip
        model.eval().save_pretrained(folder)
        pair_texts = write_pairs(model, tokens, prompts(tokens, parts[0] + parts[1], scale.pairs * 5 // 4), scale.pairs)
        texts = own_texts(model, scale.utility, 64, seed=seed, accept=lambda text: not BAD.search(tokens.decode(text)))
        (folder / "texts.json").write_text(
            json.dumps({"pairs": pair_texts, "utility": [text.tolist() for text in texts]})
        )
        return {"scale": str(scale), "seed": seed}

    name = f"reproduction-irepair-{scale.layers}x{scale.hidden}-{scale.steps}-{scale.pairs}-{seed}"
    folder = build_once(name, make, megabytes=100)
    stored = json.loads((folder / "texts.json").read_text())
    rows = [[torch.tensor(each) for each in row] for row in stored["pairs"]]
    return Spoilt(
        Stack(LlamaForCausalLM.from_pretrained(folder).eval(), name="spoilt"),
        tokens,
        pairs([(prompt, good) for prompt, _, good in rows], loss_on="all"),
        pairs([(prompt, bad) for prompt, bad, _ in rows], loss_on="all"),
        [blocks(torch.tensor([text]), loss_on="all")[0] for text in stored["utility"]],
        prompts(tokens, parts[2], scale.prompts),
        prompts(tokens, parts[3], scale.prompts),
        blocks(windows(tokens, " ".join(parts[4]), 64), loss_on="all")[:200],
    )


def write_pairs(model: Any, tokenizer: Any, given: list[Tensor], count: int) -> list[list[list[int]]]:
    """To each prompt a sampled continuation with an insult and one without, for the first prompts that have both."""
    found: list[dict[bool, list[int]]] = [{} for _ in given]
    for turn in range(60):
        open_ = [n for n, each in enumerate(found) if len(each) < 2]
        if len(given) - len(open_) >= count:
            break
        for n, text in zip(
            open_, write(model, [given[n] for n in open_], NEW, top_p=1.0, seed=turn, batch=256), strict=True
        ):
            found[n].setdefault(bool(BAD.search(tokenizer.decode(text))), text.tolist())
    ready = [
        [prompt.tolist(), each[True], each[False]] for prompt, each in zip(given, found, strict=True) if len(each) == 2
    ]
    return ready[:count]
