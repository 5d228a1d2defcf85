"""Traces: token by token and layer by layer, what ran and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Trace:
    """What ran in a series of passes over one batch.

    Attributes:
        sublayers: their names, in their order.
        ran: for each pass [batch, time, layers, sublayers] bool: which ran.
        prompt: for each pass [batch, time] bool: whether the token is prompt.
        notes: what the policy said of each token and layer, by name, for each pass [batch, time, layers].
    """

    layers: int
    sublayers: tuple[str, ...]
    ran: list[np.ndarray] = field(default_factory=list)
    prompt: list[np.ndarray] = field(default_factory=list)
    notes: list[dict[str, np.ndarray]] = field(default_factory=list)

    def begin(self, batch: int, tokens: int, response: Tensor) -> None:
        self.ran.append(np.zeros((batch, tokens, self.layers, len(self.sublayers)), dtype=bool))
        self.prompt.append(np.broadcast_to(~response.cpu().numpy(), (batch, tokens)).copy())
        self.notes.append({})

    def note_run(self, layer: int, sublayer: str, rows: Tensor | None, tokens: Tensor | None) -> None:
        """A sublayer ran, for all tokens of all rows or for some [rows, tokens]."""
        now = self.ran[-1][:, :, layer, self.sublayers.index(sublayer)]
        which = slice(None) if rows is None else rows.cpu().numpy()
        now[which] |= True if tokens is None else tokens.cpu().numpy()

    def did_not_count(self, layer: int, tokens: Tensor) -> None:
        """What ran at a layer was not used for these tokens [batch or 1, time] bool."""
        self.ran[-1][:, :, layer] &= ~tokens.cpu().numpy()[..., None]

    def note(self, name: str, layer: int, values: Tensor) -> None:
        batch, tokens, layers, _ = self.ran[-1].shape
        if name not in self.notes[-1]:
            self.notes[-1][name] = np.full((batch, tokens, layers), np.nan, dtype=np.float32)
        self.notes[-1][name][:, :, layer] = values.detach().to("cpu", torch.float32).numpy()

    def joined(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """What ran, prompt and notes of all passes, one after the other along time."""
        names = {name: None for notes in self.notes for name in notes}
        shape = [ran.shape[:3] for ran in self.ran]
        empty = [np.full(s, np.nan, dtype=np.float32) for s in shape]
        notes = {
            name: np.concatenate([n.get(name, e) for n, e in zip(self.notes, empty, strict=True)], axis=1)
            for name in names
        }
        return np.concatenate(self.ran, axis=1), np.concatenate(self.prompt, axis=1), notes
