"""Gradient traces of each sublayer with and without pruning: gradients of adapters that are never trained.

TraceNAS (arXiv 2602.02891) measures whether the gradient of a pruned model agrees with that of the original:

    adapter        y = W x + s B A x             A [rank, in] random, B [out, rank] = 0
    its gradient   dL/dA = 0                     dL/dB = s sum over tokens (dL/dy) (A x)^T = s (dL/dW) A^T

Since B is 0, an adapter has no effect, so none is attached: hooks record A x in the forward pass and dL/dy in the
backward pass. Pruning is simulated by masking activations, which is equivalent to masking weights; weights are not
changed, and their gradients are not computed. Adapters are not masked, so all traces have the same length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.errors import ArchitectureError, NumericsError, PlanError
from lamella.measure.hidden_states import Tokens, sequences
from lamella.plan import Plan
from lamella.stack import Context, Position, Stack, cuttable, share
from lamella.stack.wiring import Part

CHUNK = 1024  # positions per chunk of logits


@dataclass(frozen=True)
class Traces:
    """The gradients of one model on one batch.

    Attributes:
        sublayers: for each sublayer that runs, the flattened gradient of all its adapters `[values]`.
        loss: in nats per token.
    """

    sublayers: Mapping[Position, Tensor]
    loss: float


@dataclass(frozen=True)
class Saliency:
    """The importance of each structure by weights and inputs: |W| times the norm of the input (Wanda).

    Attributes:
        heads: the sum over the head's columns of the attention's output projection `[layers, heads]`.
        channels: the column of the MLP's output projection `[layers, channels]`.
        sublayers: the mean over all weights of the sublayer `[layers, 2]`.
    """

    heads: np.ndarray
    channels: np.ndarray
    sublayers: np.ndarray


@dataclass
class _Projection:
    """One linear layer, its adapter's A [rank, in], and the recordings of a pass."""

    module: nn.Module
    part: Part
    a: Tensor
    keep: dict[str, Tensor] = field(default_factory=dict)  # by axis: 1 for kept, 0 for pruned
    gradient: Tensor | None = None
    squares: Tensor | None = None  # sums of squared inputs over tokens, while collected
    token_mask: Tensor | None = None  # mask of non-padding tokens [batch, time], bool

    @classmethod
    def on(cls, layer: nn.Module, part: Part, rank: int, generator: torch.Generator) -> _Projection:
        """Create the projection of a layer with a random A, and register its hooks."""
        module: Any = layer.get_submodule(part.path)
        weight, length = module.weight, module.weight.shape[int(isinstance(module, nn.Linear))]
        matrix = (2 * torch.rand(rank, length, generator=generator) - 1) / length**0.5
        projection = cls(module, part, matrix.to(weight))
        module.register_forward_pre_hook(projection.on_input)
        module.register_forward_hook(projection.on_output)
        return projection

    @property
    def weight(self) -> Tensor:
        """The weight matrix `[out, in]`."""
        weight: Any = self.module.weight
        return weight.detach() if isinstance(self.module, nn.Linear) else weight.detach().T

    def on_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Record A x, and mask the inputs."""
        x = args[0].detach()
        self._low = x.flatten(0, -2) @ self.a.T
        if self.squares is not None:
            self.squares += x[self.token_mask].float().square().sum(0)
        mask = self.keep.get(self.part.reads or "")
        return args if mask is None else (args[0] * mask, *args[1:])

    def on_output(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Mask the outputs, and record their gradient in the backward pass."""
        if any(axis in self.keep for axis in self.part.writes):
            size = y.shape[-1] // len(self.part.writes)
            ones = torch.ones(size, dtype=y.dtype, device=y.device)
            y = y * torch.cat([self.keep.get(axis, ones) for axis in self.part.writes])
        if y.requires_grad:
            low = self._low
            y.register_hook(lambda dy: self._add(dy.flatten(0, -2).T @ low))
        return y

    def _add(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class GradientTraces:
    """Traces of a model and of its prunings, on the same tokens with the same adapters.

    Args:
        stack: the opened model; it is not modified.
        tokens: token ids `[sequences, time]`, or a dictionary with an attention mask.
        rank: rank of the adapters; 64 in the authors' script. The paper's appendix compares ranks.
        alpha: s is alpha / rank.
        batch: sequences per pass; the trace is the mean over passes, so it is part of the definition.
        seed: random seed of A, which is Kaiming-uniform as in trained adapters.

    Raises:
        ArchitectureError: for a family whose widths are unknown, or a model that is already pruned.
        CalibrationError: for tokens of the wrong shape.
    """

    def __init__(
        self, stack: Stack, tokens: Tokens, *, rank: int = 64, alpha: float = 16.0, batch: int = 4, seed: int = 42
    ) -> None:
        if not stack.architecture.cuttable or stack.dropped or stack.is_altered:
            raise ArchitectureError(
                f"{stack.name}: gradient traces support unpruned models of these families: {', '.join(cuttable())}"
            )
        self.stack, self.scale = Stack(share(stack.model).eval(), name=stack.name), alpha / rank
        self.sizes = stack.architecture.sizes_of(stack.config)
        generator = torch.Generator().manual_seed(seed)
        self.projections: dict[Position, list[_Projection]] = {}
        for position in stack.positions:
            layer, parts = self.stack.layers[position.layer], stack.architecture.wiring.sublayers[position.sublayer]
            linear = [part for part in parts if part.reads is not None]
            self.projections[position] = [_Projection.on(layer, part, rank, generator) for part in linear]
        rows = sequences(tokens)
        self.batches = [
            {name: torch.cat([row[name] for row in rows[start : start + batch]]) for name in rows[0]}
            for start in range(0, len(rows), batch)
        ]

    @cached_property
    def _contexts(self) -> list[tuple[Context, Tensor]]:
        """Every batch at the first layer, with the next token of each position, -100 if there is none."""
        found = []
        for batch in self.batches:
            context = self.stack.context({name: value.to(self.stack.device) for name, value in batch.items()})
            ids = batch["input_ids"].to(self.stack.device)
            next_tokens = torch.where(context.real[:, 1:] & context.real[:, :-1], ids[:, 1:], -100)
            found.append((context, next_tokens))
        return found

    @cached_property
    def _whole(self) -> tuple[Traces, Saliency]:
        for projection in self._all_projections:
            projection.squares = torch.zeros(projection.a.shape[1], device=projection.a.device)
        traces = self._traces(frozenset())
        saliency = self._saliency()
        for projection in self._all_projections:
            projection.squares = None
        return traces, saliency

    @property
    def _all_projections(self) -> list[_Projection]:
        return [projection for projections in self.projections.values() for projection in projections]

    @property
    def base(self) -> Traces:
        """The traces of the whole model."""
        return self._whole[0]

    @property
    def saliency(self) -> Saliency:
        """The saliency of heads, channels and sublayers of the whole model."""
        return self._whole[1]

    def of(self, plan: Plan) -> Traces:
        """Return the traces of the model under a plan of whole layers, heads and MLP channels.

        Raises:
            PlanError: for other plans.
        """
        widths = plan.widths
        merged = any(heads.merge is not None for heads in widths.heads.values())
        if plan.path or plan.policy or plan.weights or widths.hidden is not None or merged:
            raise PlanError("gradient traces only support plans of layers, heads and MLP channels")
        for (layer, sublayer), projections in self.projections.items():
            keep = dict[str, Tensor]()
            if sublayer == "mlp" and layer in widths.channels:
                keep["channels"] = self._mask(widths.channels[layer], self.saliency.channels.shape[1])
            elif sublayer == "attn" and layer in widths.heads:
                heads = self._mask(widths.heads[layer].keep, self.saliency.heads.shape[1])
                keep["queries"] = heads.repeat_interleave(self.sizes.head_dim)
                if self.sizes.heads == self.sizes.kv_heads:
                    keep["keys"] = keep["queries"]
            for projection in projections:
                projection.keep = keep
        try:
            return self._traces(plan.skipped)
        finally:
            for projection in self._all_projections:
                projection.keep = {}

    def _mask(self, indices: Any, length: int) -> Tensor:
        reference = self._all_projections[0].a
        mask = torch.zeros(length, dtype=reference.dtype, device=reference.device)
        mask[torch.tensor(list(indices), device=reference.device)] = 1
        return mask

    @torch.enable_grad()
    def _traces(self, skip: frozenset[Position]) -> Traces:
        for projection in self._all_projections:
            projection.gradient = None
        loss = 0.0
        for context, next_tokens in self._contexts:
            loss += self._backward(context, next_tokens, skip) / len(self._contexts)
        if not np.isfinite(loss):
            raise NumericsError(f"the loss of {self.stack.name} is {loss}: try float32, or check the weights")
        scale = self.scale / len(self._contexts)
        sublayers = {
            position: scale * torch.cat([projection.gradient.flatten() for projection in projections])  # type: ignore[union-attr]
            for position, projections in self.projections.items()
            if position not in skip
        }
        return Traces(sublayers, loss)

    def _backward(self, context: Context, next_tokens: Tensor, skip: frozenset[Position]) -> float:
        """Run one forward and backward pass; the logits are computed a chunk at a time."""
        for projection in self._all_projections:
            projection.token_mask = context.real
        start = context.h.detach().requires_grad_()
        h = self.stack.run(start, 0, len(self.stack), context, skip=skip)
        has_label = next_tokens != -100
        states, labels = self.stack.normed(h)[:, :-1][has_label], next_tokens[has_label]
        detached = states.detach().requires_grad_()
        loss = 0.0
        for first in range(0, len(labels), CHUNK):
            part = slice(first, first + CHUNK)
            logits = self.stack.logits(detached[part]).float()
            part_loss = cross_entropy(logits, labels[part], reduction="sum") / len(labels)
            part_loss.backward(inputs=[detached])
            loss += part_loss.item()
        states.backward(detached.grad, inputs=[start])
        return loss

    def _saliency(self) -> Saliency:
        heads, channels, sublayers = [], [], []
        for position, projections in self.projections.items():
            weighted = [p.weight.float().abs() * p.squares.sqrt() for p in projections]  # type: ignore[union-attr]
            sublayers.append(sum(float(each.sum()) for each in weighted) / sum(each.numel() for each in weighted))
            [columns] = [
                each.sum(0) for each, p in zip(weighted, projections, strict=True) if p.part.writes == ("hidden",)
            ]
            if position.sublayer == "mlp":
                channels.append(columns)
            else:
                heads.append(columns.unflatten(0, (-1, self.sizes.head_dim)).sum(-1))
        return Saliency(
            torch.stack(heads).cpu().numpy(),
            torch.stack(channels).cpu().numpy(),
            np.array(sublayers).reshape(-1, 2),
        )


def pearson(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two traces `[values]`; 0 if one of them is constant.

    Args:
        a: a trace `[values]`.
        b: another trace, of the same length.
    """
    a, b = a - a.mean(), b - b.mean()
    return cosine(a, b)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two traces `[values]`; 0 if one of them is zero.

    Args:
        a: a trace `[values]`.
        b: another trace, of the same length.
    """
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0
