"""Baseline network, in addition to the families of the search."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.methods.hourglass_mlp.network import HourglassMLP


class PlainMLP(HourglassMLP):
    """The same layers and norms in the same order, without skip connections."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [batch, d_out], in [0, 1], from x [batch, d_in]."""
        z = self.lift(x)
        for block in self.blocks:
            z = block(z)
        return torch.sigmoid(self.readout(z))
