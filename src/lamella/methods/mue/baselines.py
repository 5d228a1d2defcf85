"""What MuE is compared with: exits of the decoder by confidence, one exit for both modalities, fixed and random ones.

DeeBERT (arXiv 2004.12993) leaves a layer when the entropy of its prediction is low, PABEE (arXiv 2006.04152) when so
many layers in a row have predicted the same. Both read layers with the model's one head, as they were made in the paper
that compares with them, and only in the decoder, since layers of an encoder predict nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamella.methods.mue.policy import MODALITIES, OFF, StreamExits, TokenExits, check_threshold
from lamella.methods.mue.reduction import Exits
from lamella.runtime import LayerCall, Pass
from lamella.stack import Stack


class EntropyExits(TokenExits):
    """A token leaves when its layer's prediction has an entropy below a threshold, in nats.

    Args:
        stack: the decoder.
        below: the threshold; 0 never exits.
        min_layer: layers that always run.
    """

    def __init__(self, stack: Stack, below: float, min_layer: int = 1) -> None:
        super().__init__(stack, min_layer=min_layer)
        self.watches, self.below, self.head = True, below, stack.head

    def finished(self, call: LayerCall, h: Tensor, out: Tensor, s: Tensor, run: Pass) -> Tensor:
        p = self.head(out).float().softmax(-1)
        return torch.special.entr(p).sum(-1) < self.below


class PatienceExits(TokenExits):
    """A token leaves when so many layers in a row have predicted what the one before predicted.

    Args:
        stack: the decoder.
        patience: how many.
        min_layer: layers that always run.
    """

    def __init__(self, stack: Stack, patience: int, min_layer: int = 1) -> None:
        super().__init__(stack, min_layer=min_layer)
        self.watches, self.patience, self.head = True, patience, stack.head

    def begin(self, run: Pass) -> None:
        super().begin(run)
        run.memory["said"] = torch.full_like(self.exits, -1)
        run.memory["alike"] = torch.zeros_like(self.exits)

    def finished(self, call: LayerCall, h: Tensor, out: Tensor, s: Tensor, run: Pass) -> Tensor:
        says = self.head(out).argmax(-1)
        run.memory["alike"] = torch.where(says == run.memory["said"], run.memory["alike"] + 1, 0)
        run.memory["said"] = says
        return run.memory["alike"] >= self.patience


class FusedExits(StreamExits):
    """An encoder as it was, in which all tokens see each other, with one exit for both modalities.

    Args:
        stack: the encoder.
        fused: tau.
        min_layer: layers that always run.
    """

    def __init__(self, stack: Stack, fused: float = OFF, min_layer: int = 1) -> None:
        super().__init__(stack, min_layer=min_layer)
        self.tau = {"fused": check_threshold("fused", fused)}

    def streams(self, run: Pass) -> dict[str, Tensor]:
        both = super().streams(run)
        return {"fused": both["image"] | both["text"]}

    def end(self, run: Pass) -> None:
        streams = super().streams(run)
        for kept in (self.exits, self.seen):
            whole = kept.pop("fused")
            for name in MODALITIES:  # each row's one exit, as that of both
                there = streams[name].any(1)
                gone = torch.zeros_like(whole) if whole.dtype == torch.long else torch.full_like(whole, torch.nan)
                there = there.to(whole.device).view(-1, *[1] * (whole.ndim - 1))
                kept[name] = torch.where(there, whole, gone)


def shuffled(exits: Exits, seed: int) -> dict[str, Any]:
    """Exits of the same histograms, dealt out to other rows and tokens by chance.

    Returns:
        By modality and ``decoder``, the exits in the order of what they are now for.
    """
    generator = torch.Generator().manual_seed(seed)

    def dealt(taken: Tensor, there: Tensor) -> Tensor:
        out, some = taken.clone(), taken[there]
        out[there] = some[torch.randperm(len(some), generator=generator)]
        return out

    found = {name: dealt(exits.streams[name], exits.tokens[name] > 0) for name in MODALITIES}
    return found | {"decoder": dealt(exits.decoder, torch.ones_like(exits.decoder, dtype=torch.bool))}
