"""Importance of MLP neurons, attention heads and channels of the residual stream, from forward passes alone.

Minitron (arXiv 2407.14679, section 2.2) reduces the absolute activation of a unit twice, over the tokens of a sequence
and over the sequences:

    batch = l2, seq = mean:   score_i = sqrt( sum_b ( mean_s |a[b, s, i]| )^2 )

Activations are reduced during the forward pass, in float32 within a sequence and float64 over sequences.
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
# Over sequences, from the sum and the sum of squares of the reduced values above, and the number of sequences.
OVER_SEQUENCES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "l2": lambda total, squares, count: np.sqrt(squares),
    "mean": lambda total, squares, count: total / count,
    "var": lambda total, squares, count: np.maximum(squares / count - (total / count) ** 2, 0),
}


@dataclass(frozen=True)
class Importance:
    """Scores of every width axis; the same scores serve any target shape.

    Attributes:
        channels: activation of the MLP neurons at the input of the output projection, ``("layer", "channel")``.
        heads: L2 norm of each head's output before the output projection, ``("layer", "head")``.
        hidden: output of the norms before the sublayers, summed over all norms, ``("channel",)``.
    """

    channels: Scores
    heads: Scores
    hidden: Scores

    def save(self, path: str | Path) -> None:
        """Write the scores to one safetensors file."""
        scores = vars(self)
        about = {name: {"name": each.name, "provenance": each.provenance} for name, each in scores.items()}
        tensors = {name: np.ascontiguousarray(each.values) for name, each in scores.items()}
        save_file(tensors, path, metadata={"lamella.importance/1": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read the scores that :meth:`save` wrote.

        Raises:
            CheckpointError: when the file holds no importance scores.
        """
        dims = {"channels": ("layer", "channel"), "heads": ("layer", "head"), "hidden": ("channel",)}
        try:
            with safe_open(path, "numpy") as file:
                about = parse_json(file.metadata()["lamella.importance/1"])
                read = {name: file.get_tensor(name) for name in dims}
            described = {name: (str(about[name]["name"]), dict(about[name]["provenance"])) for name in dims}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: holds no importance scores; measure them again") from None
        return cls(**{name: Scores(described[name][0], dims[name], read[name], described[name][1]) for name in dims})


@torch.no_grad()
def activation_importance(stack: Stack, tokens: Tokens, *, batch_agg: str = "l2", seq_agg: str = "mean") -> Importance:
    """Score MLP neurons, heads and channels of the residual stream by their activations (Minitron, section 2.2).

    Args:
        stack: the opened model.
        tokens: token ids [sequences, time], alone or with an attention mask; padding is ignored.
        batch_agg: reduction over sequences: ``l2``, ``mean`` or ``var``.
        seq_agg: reduction over the tokens of a sequence: ``mean`` (of absolute values), ``l2`` or ``var``.

    Returns:
        The scores of every width axis.

    Raises:
        ArchitectureError: for an architecture whose widths are not known, or a model that was already pruned.
        NumericsError: for activations that are not finite; the message names the site.
    """
    if not stack.architecture.cuttable:
        raise ArchitectureError(
            f"cannot score {stack.prefix}{stack.architecture.name} models, whose widths are unknown; known are "
            f"{', '.join(cuttable())}"
        )
    if stack.is_altered or stack.dropped:
        raise ArchitectureError(f"{stack.name} was already pruned or rewritten: score the original model")
    hooks = _ActivationHooks(stack, seq_agg)
    layers = hooks.model.get_submodule(stack.architecture.prefix.removesuffix("."))
    for index, layer in enumerate(layers):
        hooks.input_of(layer, stack.architecture["mlp"].out, f"layers.{index}.mlp.channels")
        hooks.input_of(layer, stack.architecture["attn"].out, f"layers.{index}.attn.heads")
        for norm in stack.architecture.wiring.norms:
            hooks.output_of(layer, norm, f"layers.{index}.{norm}")
    for inputs in track(sequences(tokens), "activation importance"):
        hooks.run(inputs)

    final = {site: OVER_SEQUENCES[batch_agg](*sums, hooks.count) for site, sums in hooks.sums.items()}
    indices = range(len(stack))
    channels = np.stack([final[f"layers.{index}.mlp.channels"] for index in indices])
    heads = np.stack([final[f"layers.{index}.attn.heads"] for index in indices])
    hidden = np.sum(
        [final[f"layers.{index}.{norm}"] for index in indices for norm in stack.architecture.wiring.norms], axis=0
    )
    about = {"tokens": describe(tokens), "batch_agg": batch_agg, "seq_agg": seq_agg}
    return Importance(
        Scores("activation of MLP channels", ("layer", "channel"), channels, about),
        Scores("output of attention heads", ("layer", "head"), heads, about),
        Scores("normalised channels of the residual stream", ("channel",), hidden, about),
    )


class _ActivationHooks:
    """A copy of a model that shares its tensors; hooks reduce the inputs or outputs of some modules.

    Attributes:
        sums: by site, the sum and the sum of squares over sequences of the values reduced over tokens.
        count: number of sequences that were run.
    """

    def __init__(self, stack: Stack, seq_agg: str) -> None:
        self.stack, self.reduce = stack, OVER_TOKENS[seq_agg]
        self.heads = stack.architecture.sizes_of(stack.config).heads
        self.model = share(stack.model)
        self.sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.count = 0
        self._real = torch.empty(0)

    def input_of(self, layer: nn.Module, path: str, site: str) -> None:
        """Reduce the input of the submodule at ``path`` of a layer under the name ``site``."""
        layer.get_submodule(path).register_forward_pre_hook(lambda module, args: self._note(site, args[0]))

    def output_of(self, layer: nn.Module, path: str, site: str) -> None:
        """Reduce the output of the submodule at ``path`` of a layer under the name ``site``."""
        layer.get_submodule(path).register_forward_hook(lambda module, args, out: self._note(site, out))

    def run(self, row: dict[str, Tensor]) -> None:
        """Run one sequence."""
        mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))
        self._real = mask.bool()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # left padding does not shift positions
        self.model.get_submodule(self.stack.architecture.base)(**row, position_ids=positions, use_cache=False)
        self.count += 1

    def _note(self, site: str, values: Tensor) -> None:
        """Reduce the values [1, time, units] of one module and sequence, and add them to the sums."""
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
