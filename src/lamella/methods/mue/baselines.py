"""Baselines of MuE: decoder exits by confidence, one encoder exit for both modalities, fixed and random exits.

DeeBERT (arXiv 2004.12993) exits after a layer when the entropy of its prediction is low, PABEE (arXiv 2006.04152) when
a number of consecutive layers predict the same token. Both apply the model's only head to every layer, as in the
paper's comparison, and exit in the decoder only, since encoder layers predict nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamella.methods.mue.policy import MODALITIES, OFF, ModalityExits, TokenExits, check_threshold
from lamella.methods.mue.reduction import Exits
from lamella.runtime import LayerCall, Pass
from lamella.stack import Stack


class EntropyExits(TokenExits):
    """Exit a token when the entropy of its layer's prediction falls below a threshold.

    Args:
        stack: the decoder.
        below: the threshold in nats; 0 never exits.
        min_layer: number of layers that always run.
    """

    def __init__(self, stack: Stack, below: float, min_layer: int = 1) -> None:
        super().__init__(stack, min_layer=min_layer)
        self.active, self.below, self.head = True, below, stack.head

    def finished(self, call: LayerCall, h: Tensor, out: Tensor, s: Tensor, run: Pass) -> Tensor:
        """Mark the tokens whose prediction has a low entropy: [batch, time] bool.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            out: hidden states after it `[batch, time, hidden]`.
            s: saturation of each token `[batch, time]`; not used.
            run: the pass.
        """
        p = self.head(out).float().softmax(-1)
        return torch.special.entr(p).sum(-1) < self.below


class PatienceExits(TokenExits):
    """Exit a token when a number of consecutive layers have predicted the same as the layer before.

    Args:
        stack: the decoder.
        patience: the number of layers.
        min_layer: number of layers that always run.
    """

    def __init__(self, stack: Stack, patience: int, min_layer: int = 1) -> None:
        super().__init__(stack, min_layer=min_layer)
        self.active, self.patience, self.head = True, patience, stack.head

    def begin(self, run: Pass) -> None:
        """Reset the predictions of the last layer and the counts."""
        super().begin(run)
        run.memory["predicted"] = torch.full_like(self.exits, -1)
        run.memory["stable"] = torch.zeros_like(self.exits)

    def finished(self, call: LayerCall, h: Tensor, out: Tensor, s: Tensor, run: Pass) -> Tensor:
        """Mark the tokens whose prediction has been stable for ``patience`` layers: [batch, time] bool.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            out: hidden states after it `[batch, time, hidden]`.
            s: saturation of each token `[batch, time]`; not used.
            run: the pass, whose memory has the last predictions and the counts.
        """
        predicted = self.head(out).argmax(-1)
        run.memory["stable"] = torch.where(predicted == run.memory["predicted"], run.memory["stable"] + 1, 0)
        run.memory["predicted"] = predicted
        return run.memory["stable"] >= self.patience


class FusedExits(ModalityExits):
    """An encoder in its original form, in which all tokens attend to each other, with one exit for both modalities.

    Args:
        stack: the encoder.
        fused: tau.
        min_layer: number of layers that always run.
    """

    def __init__(self, stack: Stack, fused: float = OFF, min_layer: int = 1) -> None:
        super().__init__(stack, min_layer=min_layer)
        self.tau = {"fused": check_threshold("fused", fused)}

    def token_masks(self, run: Pass) -> dict[str, Tensor]:
        """Return one group of all tokens: [batch, time] bool."""
        both = super().token_masks(run)
        return {"fused": both["image"] | both["text"]}

    def end(self, run: Pass) -> None:
        """Copy the common exit of each row to both of its modalities."""
        masks = super().token_masks(run)
        for kept in (self.exits, self.cosines):
            whole = kept.pop("fused")
            for name in MODALITIES:  # both modalities of a row take its one exit
                present = masks[name].any(1)
                absent = torch.zeros_like(whole) if whole.dtype == torch.long else torch.full_like(whole, torch.nan)
                present = present.to(whole.device).view(-1, *[1] * (whole.ndim - 1))
                kept[name] = torch.where(present, whole, absent)


def shuffled(exits: Exits, seed: int) -> dict[str, Any]:
    """Permute the measured exits at random over rows and tokens, so that their histograms stay the same.

    Args:
        exits: the measured exits.
        seed: random seed.

    Returns:
        The permuted exits, by modality and ``decoder``.
    """
    generator = torch.Generator().manual_seed(seed)

    def permuted(taken: Tensor, present: Tensor) -> Tensor:
        out, some = taken.clone(), taken[present]
        out[present] = some[torch.randperm(len(some), generator=generator)]
        return out

    found = {name: permuted(exits.layers[name], exits.tokens[name] > 0) for name in MODALITIES}
    return found | {"decoder": permuted(exits.decoder, torch.ones_like(exits.decoder, dtype=torch.bool))}
