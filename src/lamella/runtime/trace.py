"""Traces: what ran for each token in each layer, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Trace:
    """What ran in a series of passes over one batch.

    Attributes:
        layers: number of layers.
        sublayers: names of the sublayers, in order.
        ran: for each pass, which sublayers ran [batch, time, layers, sublayers] bool.
        prompt: for each pass, which tokens are prompt [batch, time] bool.
        notes: for each pass, the policy's values for each token and layer, by name [batch, time, layers].
    """

    layers: int
    sublayers: tuple[str, ...]
    ran: list[np.ndarray] = field(default_factory=list)
    prompt: list[np.ndarray] = field(default_factory=list)
    notes: list[dict[str, np.ndarray]] = field(default_factory=list)

    def begin(self, batch: int, tokens: int, response: Tensor) -> None:
        """Start recording a pass.

        Args:
            batch: number of rows.
            tokens: number of tokens.
            response: which tokens are generated [batch or 1, time] bool.
        """
        self.ran.append(np.zeros((batch, tokens, self.layers, len(self.sublayers)), dtype=bool))
        self.prompt.append(np.broadcast_to(~response.cpu().numpy(), (batch, tokens)).copy())
        self.notes.append({})

    def note_run(self, layer: int, sublayer: str, rows: Tensor | None, tokens: Tensor | None) -> None:
        """Record that a sublayer ran, for all tokens of all rows or for some.

        Args:
            layer: index of the layer.
            sublayer: name of the sublayer.
            rows: indices of the rows; None for all.
            tokens: which tokens [rows, time] bool; None for all.
        """
        now = self.ran[-1][:, :, layer, self.sublayers.index(sublayer)]
        which = slice(None) if rows is None else rows.cpu().numpy()
        now[which] |= True if tokens is None else tokens.cpu().numpy()

    def did_not_count(self, layer: int, tokens: Tensor) -> None:
        """Record that the result of a layer was not used for some tokens.

        Args:
            layer: index of the layer.
            tokens: these tokens [batch or 1, time] bool.
        """
        self.ran[-1][:, :, layer] &= ~tokens.cpu().numpy()[..., None]

    def note(self, name: str, layer: int, values: Tensor) -> None:
        """Record a value per token for one layer.

        Args:
            name: name of the value.
            layer: index of the layer.
            values: the values [batch, time].
        """
        batch, tokens, layers, _ = self.ran[-1].shape
        if name not in self.notes[-1]:
            self.notes[-1][name] = np.full((batch, tokens, layers), np.nan, dtype=np.float32)
        self.notes[-1][name][:, :, layer] = values.detach().to("cpu", torch.float32).numpy()

    def joined(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Return what ran, prompt and notes of all passes, concatenated along time."""
        names = {name: None for notes in self.notes for name in notes}
        shape = [ran.shape[:3] for ran in self.ran]
        empty = [np.full(s, np.nan, dtype=np.float32) for s in shape]
        notes = {
            name: np.concatenate([n.get(name, e) for n, e in zip(self.notes, empty, strict=True)], axis=1)
            for name in names
        }
        return np.concatenate(self.ran, axis=1), np.concatenate(self.prompt, axis=1), notes
