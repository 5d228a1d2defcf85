"""What the shape is compared with, beside the families of the search."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.methods.hourglass_mlp.network import HourglassMLP


class PlainMLP(HourglassMLP):
    """The same maps and norms in the same order, without any skip."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.lift(x)
        for block in self.blocks:
            z = block(z)
        return torch.sigmoid(self.readout(z))
