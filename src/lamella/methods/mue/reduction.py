"""Savings of exits: the expected time reduction, by layers as in the paper or by FLOPs, from the exits of samples.

    reduction = 1 - E[used] / E[full]      used = sum_m w_m e_m + sum_u w_d j_u,   full with N_e and N_d

By layers, w_d = 1 and the weights w_m of a row's modalities sum to 1. By FLOPs, a layer weighs its multiplications:
they grow with the tokens of a modality and with the context of a decoder token, and the keys that a token still needs
in the layers after its exit count as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.data import ImageText
from lamella.data.samples import NO_LOSS
from lamella.evaluate.scored import labelled_batches, scored_states
from lamella.methods.mue.policy import MODALITIES
from lamella.progress import track
from lamella.stack import Stack, last_stack

BATCH = 16


@dataclass(frozen=True)
class Exits:
    """The number of layers that were run, for samples and generated tokens.

    Attributes:
        layers: of each row by modality, 0 without such tokens [rows].
        tokens: number of tokens, by modality [rows].
        decoder: of each generated token [tokens].
        row: the row of each generated token [tokens].
        step: the position of each generated token in the answer [tokens].
        correct: which rows were answered exactly [rows] bool.
        loss: mean cross-entropy of the answers, in nats.
        cosines: S of each layer, NaN where it did not run: by modality [rows, N_e], and ``decoder`` [tokens, N_d].
    """

    layers: dict[str, Tensor]
    tokens: dict[str, Tensor]
    decoder: Tensor
    row: Tensor
    step: Tensor
    correct: Tensor
    loss: float
    cosines: dict[str, Tensor]


@torch.no_grad()
def measure_exits(view: Any, samples: ImageText, batch: int = BATCH) -> Exits:
    """Measure the exits of a view on the answers of samples, and whether it would generate these answers itself.

    Args:
        view: a view with exits.
        samples: prompts with their answers.
        batch: samples per batch.
    """
    stack, encoder, decoder = last_stack(view), view.lamella_policy_encoder, view.lamella_policy
    image = getattr(view.config, stack.stacks["encoder"].architecture.images)
    parts: list[dict[str, Tensor]] = []
    rows = 0
    for each in track(list(labelled_batches(samples, batch, stack.device)), "mue: exits"):
        states, labels = scored_states(view, each)
        logits = stack.logits(states).float()
        row, step = (each["labels"] != NO_LOSS).nonzero().unbind(1)
        errors = torch.zeros(len(each["labels"]), device=row.device).index_add(
            0, row, (logits.argmax(-1) != labels).float()
        )
        real, images = each["attention_mask"].bool(), each["input_ids"] == image
        found = {
            "tokens image": (real & images).sum(1),
            "tokens text": (real & ~images).sum(1),
            "decoder": decoder.exits[row, step],
            "cosine decoder": decoder.cosines[row, step],
            "row": row + rows,
            "step": step,
            "correct": errors == 0,
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        }
        for name in MODALITIES:
            found |= {f"exit {name}": encoder.exits[name], f"cosine {name}": encoder.cosines[name]}
        parts.append({name: value.cpu() for name, value in found.items()})
        rows += len(real)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Exits(
        {name: whole[f"exit {name}"] for name in MODALITIES},
        {name: whole[f"tokens {name}"] for name in MODALITIES},
        whole["decoder"],
        whole["row"],
        whole["step"],
        whole["correct"],
        float(whole["loss"].mean()),
        {name: whole[f"cosine {name}"] for name in (*MODALITIES, "decoder")},
    )


def by_layers(exits: Exits, layers: tuple[int, int]) -> float:
    """Return the expected time reduction by layers, as in the paper, from the mean of both modalities' exits.

    Args:
        exits: exits of samples.
        layers: N_e and N_d.
    """
    present = torch.stack([exits.tokens[name] > 0 for name in MODALITIES])
    run = torch.stack([exits.layers[name] for name in MODALITIES]).double()
    encoder = float((run.sum(0) / present.sum(0)).sum())
    used = encoder + float(exits.decoder.double().sum())
    full = layers[0] * present.shape[1] + layers[1] * len(exits.decoder)
    return 1 - used / full


@dataclass(frozen=True)
class ExitCosts:
    """The cost of a layer, in multiply-accumulates.

    Attributes:
        d: hidden size.
        encoder: per token in an encoder layer, without attention scores.
        decoder: the same in a decoder layer, without the keys and values of the encoder.
        keys: per token, for its keys and values in a decoder layer.
        memory: per encoder token, for its keys and values in a decoder layer's cross-attention.
        layers: N_e and N_d.
    """

    d: int
    encoder: int
    decoder: int
    keys: int
    memory: int
    layers: tuple[int, int]

    @classmethod
    def of(cls, encoder: Stack, decoder: Stack) -> ExitCosts:
        """Return the costs of a pair of stacks.

        Args:
            encoder: stack of the encoder.
            decoder: stack of the decoder.
        """
        attn, cross = _matrices(decoder, "attn"), _matrices(decoder, "cross")
        return cls(
            encoder.architecture.sizes_of(encoder.config).hidden,
            sum(_matrices(encoder, name) for name in encoder.architecture.names),
            attn + cross // 2 + _matrices(decoder, "mlp"),
            attn // 2,
            cross // 2,
            (len(encoder), len(decoder)),
        )


def by_flops(exits: Exits, work: ExitCosts) -> float:
    """Return the expected reduction by multiplications.

    The keys that tokens need in the layers after their exits count as used.

    Args:
        exits: exits of samples.
        work: costs of the layers.
    """
    n_e, n_d = work.layers
    used = full = 0.0
    memory = torch.zeros_like(exits.row, dtype=torch.double)
    for name in MODALITIES:
        n = exits.tokens[name].double()
        layer = n * work.encoder + 2 * n * n * work.d
        used += float((layer * exits.layers[name]).sum())
        full += float(layer.sum()) * n_e
        memory += n[exits.row]
    deepest = torch.zeros(len(exits.correct), dtype=torch.long)
    deepest = deepest.scatter_reduce(0, exits.row, exits.decoder, "amax")
    of_memory = torch.stack([exits.tokens[name].double() for name in MODALITIES]).sum(0) * work.memory
    layer = work.decoder + 2 * work.d * (memory + exits.step + 1)
    left = (n_d - exits.decoder).double() * work.keys
    used += float((layer * exits.decoder + left).sum() + (of_memory * deepest).sum())
    full += float(layer.sum() + of_memory.sum()) * n_d
    return 1 - used / full


def _matrices(stack: Stack, sublayer: str) -> int:
    """Return the number of elements of a sublayer's matrices in the last layer; T5's first has a position bias too."""
    layer = stack.layers[-1]
    parts = [layer.get_submodule(path) for path in stack.architecture[sublayer].modules]
    return sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)


def histograms(exits: Exits, layers: tuple[int, int]) -> dict[str, list[float]]:
    """Return for each exit the fraction of rows, or of generated tokens, that take it after each layer.

    Args:
        exits: exits of samples.
        layers: N_e and N_d.
    """
    found = {}
    for name in MODALITIES:
        present = exits.layers[name][exits.tokens[name] > 0]
        if len(present):
            found[name] = _fractions(present, layers[0])
    return found | {"decoder": _fractions(exits.decoder, layers[1])}


def _fractions(exits: Tensor, layers: int) -> list[float]:
    return [float((exits == e).double().mean()) for e in range(1, layers + 1)]


def executed(exits: Exits, stacks: Mapping[str, Stack]) -> dict[str, list[tuple[float, ...]]]:
    """Return for each layer of both stacks the fraction of tokens that runs its sublayers, in the form of plans.

    Args:
        exits: the recorded exits.
        stacks: the stacks ``encoder`` and ``decoder``.
    """
    n = torch.cat([exits.tokens[name] for name in MODALITIES]).double()
    e = torch.cat([exits.layers[name] for name in MODALITIES])
    found = {}
    for name, run, weight in (("encoder", e, n), ("decoder", exits.decoder, torch.ones(len(exits.decoder)).double())):
        stack = stacks[name]
        shares = [float((weight * (run > layer)).sum() / weight.sum()) for layer in range(len(stack))]
        found[name] = [(share,) * len(stack.architecture.names) for share in shares]
    return found


def quantile_thresholds(exits: Exits, q: float, min_layer: int = 1) -> dict[str, float]:
    """Return the threshold of each exit: a quantile of S over samples and all layers but the last.

    Args:
        exits: exits of samples that run all layers.
        q: the quantile; a higher one exits later.
        min_layer: first layer after which a sample may exit.
    """
    found = {}
    for name, cosines in exits.cosines.items():
        known = cosines[:, min_layer - 1 : -1].flatten()
        known = known[~known.isnan()]
        if len(known):
            found[name] = float(known.double().quantile(q))
    return found
