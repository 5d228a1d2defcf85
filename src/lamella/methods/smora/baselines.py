"""Baselines for SMoRA besides LoRA: mixtures of whole LoRAs, as in the authors' files.

    y = W x + alpha/r_e sum_e g_e(x) B_e A_e x        E experts of rank r_e, g a softmax over W_g x

    top-1    trains a soft Gumbel mixture (tau 0.1), and runs only the best expert, without its gate
    top-2    the two best, with gates normalised to sum to 1
    soft     all of them
    smear    one product of the averaged A and the averaged B

HydraLoRA has one A and a B for each expert; MosLoRA is a LoRA with a mixing matrix between A and B, and no router.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, linear, one_hot

from lamella.plan import SiteAdapter

Mixing = Literal["top-1", "top-2", "soft", "smear"]
TAU = 0.1


def random_matrix(rows: int, columns: int) -> nn.Parameter:
    """Return a random weight matrix with the initialisation of a linear layer.

    Args:
        rows: output size.
        columns: input size.
    """
    weight = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


class LoraMixture(SiteAdapter):
    """E LoRAs with a router; a token runs one of them, two, all, or their average.

    Args:
        inputs, outputs: sizes of the linear layer.
        experts: E.
        r: rank of each.
        alpha: of the scale alpha / r.
        mixing: the mixture, see above.
    """

    def __init__(
        self, inputs: int, outputs: int, *, experts: int = 8, r: int = 8, alpha: float = 16.0, mixing: Mixing = "top-1"
    ) -> None:
        super().__init__(inputs, outputs)
        self.experts, self.r, self.scale, self.mixing = experts, r, alpha / r, mixing
        self.lora_A = random_matrix(experts * r, inputs)
        self.lora_B = nn.Parameter(torch.zeros(outputs, experts * r))
        self.lora_router = random_matrix(experts, inputs)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates g `[..., E]`."""
        scores = linear(x, self.lora_router)
        if self.mixing == "top-1":
            return gumbel_softmax(scores, TAU) if self.training else one_hot(scores.argmax(-1), self.experts).to(x)
        gates = scores.softmax(-1)
        if self.mixing == "top-2":
            best = gates.topk(2, dim=-1)
            top = torch.zeros_like(gates).scatter(-1, best.indices, best.values)
            return top / top.sum(-1, keepdim=True)
        return gates

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the mixture of the LoRAs to the output of the linear layer.

        Args:
            x: input of the linear layer `[..., inputs]`.
            y: its output `[..., outputs]`.
        """
        x = x.to(self.lora_A.dtype)
        gates = self.gates(x)
        h = linear(x, self.lora_A)  # [..., E r]
        if self.mixing == "smear":  # (sum_e g_e A_e) x, then sum_e g_e B_e of that
            averaged = (gates.unsqueeze(-1) * h.unflatten(-1, (self.experts, self.r))).sum(-2)
            h = torch.cat([averaged] * self.experts, dim=-1)
        change = linear(h * gates.repeat_interleave(self.r, dim=-1), self.lora_B)
        return y + (self.scale * change).to(y.dtype)


class HydraLora(SiteAdapter):
    """One A and a B for each expert, mixed by a softmax.

    Args:
        inputs, outputs: sizes of the linear layer.
        experts: number of heads B.
        r: rank.
        alpha: of the scale alpha / r.
    """

    def __init__(self, inputs: int, outputs: int, *, experts: int = 4, r: int = 8, alpha: float = 16.0) -> None:
        super().__init__(inputs, outputs)
        self.experts, self.r, self.scale = experts, r, alpha / r
        self.lora_A = random_matrix(r, inputs)
        self.lora_B = nn.Parameter(torch.zeros(outputs, experts * r))
        self.lora_router = random_matrix(experts, inputs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the mixture of the heads to the output of the linear layer.

        Args:
            x: input of the linear layer `[..., inputs]`.
            y: its output `[..., outputs]`.
        """
        x = x.to(self.lora_A.dtype)
        gates = linear(x, self.lora_router).softmax(-1).repeat_interleave(self.r, dim=-1)
        h = torch.cat([linear(x, self.lora_A)] * self.experts, dim=-1)
        return y + (self.scale * linear(h * gates, self.lora_B)).to(y.dtype)


class MosLora(SiteAdapter):
    """B M A: a LoRA with a mixing matrix, which is initialised orthogonally.

    Args:
        inputs, outputs: sizes of the linear layer.
        r: rank.
        alpha: of the scale alpha / r.
    """

    def __init__(self, inputs: int, outputs: int, *, r: int = 64, alpha: float = 16.0) -> None:
        super().__init__(inputs, outputs)
        self.scale = alpha / r
        self.lora_A = random_matrix(r, inputs)
        self.lora_mixer = nn.Parameter(nn.init.orthogonal_(torch.empty(r, r)))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the low-rank update to the output of the linear layer.

        Args:
            x: input of the linear layer `[..., inputs]`.
            y: its output `[..., outputs]`.
        """
        x = x.to(self.lora_A.dtype)
        change = linear(linear(linear(x, self.lora_A), self.lora_mixer), self.lora_B)
        return y + (self.scale * change).to(y.dtype)
