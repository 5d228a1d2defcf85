"""What SMoRA must be compared with beside LoRA: mixtures of whole LoRAs, as the authors' files train them.

    y = W x + alpha/r_e sum_e g_e(x) B_e A_e x        E experts of rank r_e, g a softmax over W_g x

    top-1    trains on a soft Gumbel mixture (tau 0.1), runs the best expert alone, without its gate
    top-2    the two best, gates made to sum to 1
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

How = Literal["top-1", "top-2", "soft", "smear"]
TAU = 0.1


def drawn(rows: int, columns: int) -> nn.Parameter:
    """A random map as linear ones begin."""
    weight = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


class LoraMixture(SiteAdapter):
    """E LoRAs with a router, of which a token runs one, two, all, or their average.

    Args:
        inputs, outputs: sizes of the map.
        experts: E.
        r: rank of each.
        alpha: of the scale alpha / r.
        how: see above.
    """

    def __init__(
        self, inputs: int, outputs: int, *, experts: int = 8, r: int = 8, alpha: float = 16.0, how: How = "top-1"
    ) -> None:
        super().__init__(inputs, outputs)
        self.experts, self.r, self.scale, self.how = experts, r, alpha / r, how
        self.lora_A = drawn(experts * r, inputs)
        self.lora_B = nn.Parameter(torch.zeros(outputs, experts * r))
        self.lora_router = drawn(experts, inputs)

    def gates(self, x: Tensor) -> Tensor:
        """g [..., E]."""
        scores = linear(x, self.lora_router)
        if self.how == "top-1":
            return gumbel_softmax(scores, TAU) if self.training else one_hot(scores.argmax(-1), self.experts).to(x)
        gates = scores.softmax(-1)
        if self.how == "top-2":
            best = gates.topk(2, dim=-1)
            kept = torch.zeros_like(gates).scatter(-1, best.indices, best.values)
            return kept / kept.sum(-1, keepdim=True)
        return gates

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.lora_A.dtype)
        gates = self.gates(x)
        h = linear(x, self.lora_A)  # [..., E r]
        if self.how == "smear":  # (sum_e g_e A_e) x, then sum_e g_e B_e of that
            averaged = (gates.unsqueeze(-1) * h.unflatten(-1, (self.experts, self.r))).sum(-2)
            h = torch.cat([averaged] * self.experts, dim=-1)
        change = linear(h * gates.repeat_interleave(self.r, dim=-1), self.lora_B)
        return y + (self.scale * change).to(y.dtype)


class HydraLora(SiteAdapter):
    """One A and a B for each expert, mixed by a softmax.

    Args:
        inputs, outputs: sizes of the map.
        experts: heads B.
        r: rank.
        alpha: of the scale alpha / r.
    """

    def __init__(self, inputs: int, outputs: int, *, experts: int = 4, r: int = 8, alpha: float = 16.0) -> None:
        super().__init__(inputs, outputs)
        self.experts, self.r, self.scale = experts, r, alpha / r
        self.lora_A = drawn(r, inputs)
        self.lora_B = nn.Parameter(torch.zeros(outputs, experts * r))
        self.lora_router = drawn(experts, inputs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.lora_A.dtype)
        gates = linear(x, self.lora_router).softmax(-1).repeat_interleave(self.r, dim=-1)
        h = torch.cat([linear(x, self.lora_A)] * self.experts, dim=-1)
        return y + (self.scale * linear(h * gates, self.lora_B)).to(y.dtype)


class MosLora(SiteAdapter):
    """B M A: a LoRA with a mixing matrix, which begins orthogonal.

    Args:
        inputs, outputs: sizes of the map.
        r: rank.
        alpha: of the scale alpha / r.
    """

    def __init__(self, inputs: int, outputs: int, *, r: int = 64, alpha: float = 16.0) -> None:
        super().__init__(inputs, outputs)
        self.scale = alpha / r
        self.lora_A = drawn(r, inputs)
        self.lora_mixer = nn.Parameter(nn.init.orthogonal_(torch.empty(r, r)))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.lora_A.dtype)
        change = linear(linear(linear(x, self.lora_A), self.lora_mixer), self.lora_B)
        return y + (self.scale * change).to(y.dtype)
