"""How large the activations of each neuron, head and channel of the stream are, from forward passes alone.

Minitron (arXiv 2407.14679, section 2.2) reduces the absolute activation of a unit twice, over the tokens of a sequence
and over the sequences:

    batch = l2, seq = mean:   score_i = sqrt( sum_b ( mean_s |a[b, s, i]| )^2 )

All is reduced while the model runs, in float32 within a sequence and float64 over sequences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from lamella.errors import ArchitectureError, CheckpointError, NumericsError
from lamella.measure.hidden_states import Tokens, describe, sequences
from lamella.measure.scores import Scores
from lamella.progress import track
from lamella.reading import parse_json
from lamella.stack import Stack, cuttable, share

# Within a sequence, float32 [tokens, units] -> [units]. Variances are those of the signed values.
OVER_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda a: a.abs().mean(dim=0),
    "l2": lambda a: a.norm(dim=0),
    "var": lambda a: a.var(dim=0, unbiased=False),
}
# Over sequences, from the sum and the sum of squares of what is above, and the number of sequences.
OVER_SEQUENCES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "l2": lambda total, squares, count: np.sqrt(squares),
    "mean": lambda total, squares, count: total / count,
    "var": lambda total, squares, count: np.maximum(squares / count - (total / count) ** 2, 0),
}


@dataclass(frozen=True)
class Importance:
    """The scores of every axis of width, which serve any target shape.

    Attributes:
        channels: the input of the MLP's output projection, ``("layer", "channel")``.
        heads: the L2 norm of each head's output before the output projection, ``("layer", "head")``.
        stream: the output of the norms before the sublayers, summed over all of them, ``("channel",)``.
    """

    channels: Scores
    heads: Scores
    stream: Scores

    def save(self, path: str | Path) -> None:
        """Write the scores to one safetensors file."""
        scores = vars(self)
        about = {name: {"name": each.name, "provenance": each.provenance} for name, each in scores.items()}
        tensors = {name: np.ascontiguousarray(each.values) for name, each in scores.items()}
        save_file(tensors, path, metadata={"lamella.importance/1": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: when it is no such file.
        """
        dims = {"channels": ("layer", "channel"), "heads": ("layer", "head"), "stream": ("channel",)}
        try:
            with safe_open(path, "numpy") as file:
                about = parse_json(file.metadata()["lamella.importance/1"])
                read = {name: file.get_tensor(name) for name in dims}
            told = {name: (str(about[name]["name"]), dict(about[name]["provenance"])) for name in dims}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: holds no importance scores; measure them again") from None
        return cls(**{name: Scores(told[name][0], dims[name], read[name], told[name][1]) for name in dims})


@torch.no_grad()
def activation_importance(stack: Stack, tokens: Tokens, *, batch_agg: str = "l2", seq_agg: str = "mean") -> Importance:
    """Score neurons, heads and channels of the stream by the size of their activations (Minitron, section 2.2).

    Args:
        stack: the opened model.
        tokens: token ids [sequences, time], or them with an attention mask; padding does not count.
        batch_agg: over sequences: ``l2``, ``mean`` or ``var``.
        seq_agg: over the tokens of a sequence: ``mean`` (of absolute values), ``l2`` or ``var``.

    Raises:
        ArchitectureError: for a family whose widths are not known.
        NumericsError: for activations that are not finite, named by site.
    """
    if not stack.architecture.cuttable:
        raise ArchitectureError(
            f"the widths of {stack.prefix}{stack.architecture.name} models are not known, so not scored; known are "
            f"{', '.join(cuttable())}"
        )
    if stack.is_altered or stack.dropped:
        raise ArchitectureError(f"{stack.name} was cut or rewritten before: score the model it was made of")
    seen = _Watch(stack, seq_agg)
    layers = seen.model.get_submodule(stack.architecture.prefix.removesuffix("."))
    for number, layer in enumerate(layers):
        seen.input_of(layer, stack.architecture["mlp"].out, f"layers.{number}.mlp.channels")
        seen.input_of(layer, stack.architecture["attn"].out, f"layers.{number}.attn.heads")
        for norm in stack.architecture.wiring.norms:
            seen.output_of(layer, norm, f"layers.{number}.{norm}")
    for inputs in track(sequences(tokens), "activation importance"):
        seen.run(inputs)

    final = {site: OVER_SEQUENCES[batch_agg](*sums, seen.count) for site, sums in seen.sums.items()}
    numbers = range(len(stack))
    channels = np.stack([final[f"layers.{number}.mlp.channels"] for number in numbers])
    heads = np.stack([final[f"layers.{number}.attn.heads"] for number in numbers])
    stream = np.sum(
        [final[f"layers.{number}.{norm}"] for number in numbers for norm in stack.architecture.wiring.norms], axis=0
    )
    about = {"tokens": describe(tokens), "batch_agg": batch_agg, "seq_agg": seq_agg}
    return Importance(
        Scores("activation of MLP channels", ("layer", "channel"), channels, about),
        Scores("output of attention heads", ("layer", "head"), heads, about),
        Scores("normed channels of the stream", ("channel",), stream, about),
    )


class _Watch:
    """A copy of a model that shares its tensors, whose hooks reduce what some modules see.

    Attributes:
        sums: by site, the sum and the sum of squares over sequences of what was reduced over tokens.
        count: sequences that were run.
    """

    def __init__(self, stack: Stack, seq_agg: str) -> None:
        self.stack, self.reduce = stack, OVER_TOKENS[seq_agg]
        self.heads = stack.architecture.sizes_of(stack.config).heads
        self.model = share(stack.model)
        self.sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.count = 0
        self._real = torch.empty(0)

    def input_of(self, layer: nn.Module, path: str, site: str) -> None:
        layer.get_submodule(path).register_forward_pre_hook(lambda module, args: self._note(site, args[0]))

    def output_of(self, layer: nn.Module, path: str, site: str) -> None:
        layer.get_submodule(path).register_forward_hook(lambda module, args, out: self._note(site, out))

    def run(self, row: dict[str, Tensor]) -> None:
        """Run one sequence."""
        mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))
        self._real = mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padding shifts nothing
        self.model.get_submodule(self.stack.architecture.base)(**row, position_ids=positions, use_cache=False)
        self.count += 1

    def _note(self, site: str, values: Tensor) -> None:
        """Reduce what one module saw of the sequence [1, time, units]."""
        real = values[self._real].float()
        if site.endswith("attn.heads"):
            real = real.unflatten(-1, (self.heads, -1)).norm(dim=-1)
        reduced = self.reduce(real).double().cpu().numpy()
        if not np.isfinite(reduced).all():
            raise NumericsError(
                f"non-finite activations at {site} of {self.stack.name}: try float32, or check the weights"
            )
        total, squares = self.sums.get(site, (0.0, 0.0))
        self.sums[site] = total + reduced, squares + reduced**2
