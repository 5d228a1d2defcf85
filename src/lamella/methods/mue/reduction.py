"""What exits save: the expected time reduction, by layers as in the paper or by FLOPs, from the exits of samples.

    reduction = 1 - E[used] / E[full]      used = sum_m w_m e_m + sum_u w_d j_u,   full with N_e and N_d

By layers w_d = 1, and the modalities of a row share 1. By FLOPs a layer weighs what it multiplies: a stream more with
its tokens, a decoder's layer more with what it looks back on, and the layers that a token has left still make its keys.
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
    """How many layers were run, in rows that stand one behind the other.

    Attributes:
        streams: of each row by modality, 0 without such tokens [rows].
        tokens: how many tokens a stream has, by modality [rows].
        decoder: of each token that was written [written].
        row, step: its row, and its place in the answer [written].
        right: which rows were answered word for word [rows] bool.
        loss: mean cross-entropy of the answers, in nats.
        cosines: S of each layer, NaN where it did not run: by modality [rows, N_e], and ``decoder`` [written, N_d].
    """

    streams: dict[str, Tensor]
    tokens: dict[str, Tensor]
    decoder: Tensor
    row: Tensor
    step: Tensor
    right: Tensor
    loss: float
    cosines: dict[str, Tensor]


@torch.no_grad()
def observed(view: Any, samples: ImageText, batch: int = BATCH) -> Exits:
    """The exits that a view takes while it writes the answers of samples, and whether it would write them itself."""
    stack, encoder, decoder = last_stack(view), view.lamella_policy_encoder, view.lamella_policy
    image = getattr(view.config, stack.stacks["encoder"].architecture.images)
    parts: list[dict[str, Tensor]] = []
    rows = 0
    for each in track(list(labelled_batches(samples, batch, stack.device)), "mue: exits"):
        states, labels = scored_states(view, each)
        logits = stack.logits(states).float()
        row, step = (each["labels"] != NO_LOSS).nonzero().unbind(1)
        wrong = torch.zeros(len(each["labels"]), device=row.device).index_add(
            0, row, (logits.argmax(-1) != labels).float()
        )
        real, images = each["attention_mask"].bool(), each["input_ids"] == image
        found = {
            "tokens image": (real & images).sum(1),
            "tokens text": (real & ~images).sum(1),
            "decoder": decoder.exits[row, step],
            "cosine decoder": decoder.seen[row, step],
            "row": row + rows,
            "step": step,
            "right": wrong == 0,
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        }
        for name in MODALITIES:
            found |= {f"exit {name}": encoder.exits[name], f"cosine {name}": encoder.seen[name]}
        parts.append({name: value.cpu() for name, value in found.items()})
        rows += len(real)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Exits(
        {name: whole[f"exit {name}"] for name in MODALITIES},
        {name: whole[f"tokens {name}"] for name in MODALITIES},
        whole["decoder"],
        whole["row"],
        whole["step"],
        whole["right"],
        float(whole["loss"].mean()),
        {name: whole[f"cosine {name}"] for name in (*MODALITIES, "decoder")},
    )


def by_layers(exits: Exits, layers: tuple[int, int]) -> float:
    """The expected time reduction by layers (the paper's): the encoder's exit is the mean of its modalities'.

    Args:
        exits: of samples.
        layers: N_e and N_d.
    """
    there = torch.stack([exits.tokens[name] > 0 for name in MODALITIES])
    run = torch.stack([exits.streams[name] for name in MODALITIES]).double()
    encoder = float((run.sum(0) / there.sum(0)).sum())
    used = encoder + float(exits.decoder.double().sum())
    full = layers[0] * there.shape[1] + layers[1] * len(exits.decoder)
    return 1 - used / full


@dataclass(frozen=True)
class Work:
    """What a layer multiplies, in multiply-accumulates.

    Attributes:
        d: the stream's width.
        encoder: of each token in a layer of the encoder, but for attention.
        decoder: the same in the decoder; the encoder's keys and values are not among it.
        keys: of each token, to make its keys and values in a layer of the decoder.
        memory: of each token of the encoder, the same for the attention to it.
        layers: N_e and N_d.
    """

    d: int
    encoder: int
    decoder: int
    keys: int
    memory: int
    layers: tuple[int, int]

    @classmethod
    def of(cls, encoder: Stack, decoder: Stack) -> Work:
        attn, cross = _matrices(decoder, "attn"), _matrices(decoder, "cross")
        return cls(
            encoder.architecture.sizes_of(encoder.config).hidden,
            sum(_matrices(encoder, name) for name in encoder.architecture.names),
            attn + cross // 2 + _matrices(decoder, "mlp"),
            attn // 2,
            cross // 2,
            (len(encoder), len(decoder)),
        )


def by_flops(exits: Exits, work: Work) -> float:
    """The same by multiplications; of what keeps a token's state in the layers that it left, too."""
    n_e, n_d = work.layers
    used = full = 0.0
    memory = torch.zeros_like(exits.row, dtype=torch.double)
    for name in MODALITIES:
        n = exits.tokens[name].double()
        layer = n * work.encoder + 2 * n * n * work.d
        used += float((layer * exits.streams[name]).sum())
        full += float(layer.sum()) * n_e
        memory += n[exits.row]
    deepest = torch.zeros(len(exits.right), dtype=torch.long)
    deepest = deepest.scatter_reduce(0, exits.row, exits.decoder, "amax")
    of_memory = torch.stack([exits.tokens[name].double() for name in MODALITIES]).sum(0) * work.memory
    layer = work.decoder + 2 * work.d * (memory + exits.step + 1)
    left = (n_d - exits.decoder).double() * work.keys
    used += float((layer * exits.decoder + left).sum() + (of_memory * deepest).sum())
    full += float(layer.sum() + of_memory.sum()) * n_d
    return 1 - used / full


def _matrices(stack: Stack, sublayer: str) -> int:
    """The entries of the matrices of a sublayer, in the last layer: T5's first one has a bias of positions besides."""
    layer = stack.layers[-1]
    parts = [layer.get_submodule(path) for path in stack.architecture[sublayer].modules]
    return sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)


def histograms(exits: Exits, layers: tuple[int, int]) -> dict[str, list[float]]:
    """Of each exit, the share of rows, or of written tokens, that take it behind layer 1, 2, and so on."""
    found = {}
    for name in MODALITIES:
        there = exits.streams[name][exits.tokens[name] > 0]
        if len(there):
            found[name] = _shares(there, layers[0])
    return found | {"decoder": _shares(exits.decoder, layers[1])}


def _shares(exits: Tensor, layers: int) -> list[float]:
    return [float((exits == e).double().mean()) for e in range(1, layers + 1)]


def executed(exits: Exits, stacks: Mapping[str, Stack]) -> dict[str, list[tuple[float, ...]]]:
    """Of each layer of both stacks, the share of tokens that runs its sublayers, as plans say it."""
    n = torch.cat([exits.tokens[name] for name in MODALITIES]).double()
    e = torch.cat([exits.streams[name] for name in MODALITIES])
    found = {}
    for name, run, weight in (("encoder", e, n), ("decoder", exits.decoder, torch.ones(len(exits.decoder)).double())):
        stack = stacks[name]
        shares = [float((weight * (run > layer)).sum() / weight.sum()) for layer in range(len(stack))]
        found[name] = [(share,) * len(stack.architecture.names) for share in shares]
    return found


def quantiles(exits: Exits, q: float, min_layer: int = 1) -> dict[str, float]:
    """Thresholds: of each exit the quantile of S over samples and layers, but the last, behind which nothing is left.

    Args:
        exits: of samples that run everything.
        q: which quantile: higher is later.
        min_layer: the first layer behind which one may exit.
    """
    found = {}
    for name, cosines in exits.cosines.items():
        known = cosines[:, min_layer - 1 : -1].flatten()
        known = known[~known.isnan()]
        if len(known):
            found[name] = float(known.double().quantile(q))
    return found
