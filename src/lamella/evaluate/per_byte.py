"""The loss of a model per byte of text, which compares models that divide the text into different tokens.

    loss = - sum over tokens of log p(token | the tokens before it) / number of bytes of the text in UTF-8

The first token is predicted from the token that begins a text, or that separates texts if there is none, so that every
byte counts for every model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.errors import CalibrationError
from lamella.evaluate.fidelity import Estimate
from lamella.progress import track


@dataclass(frozen=True)
class ByteLoss:
    """The loss of a model per byte of some texts.

    Attributes:
        losses: nats per byte of each text.
        length: tokens per byte.
        bytes: number of bytes of all texts.
    """

    losses: tuple[float, ...]
    length: float
    bytes: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, texts: Iterable[str]) -> ByteLoss:
        """Measure a model.

        Args:
            model: a transformers model that predicts the next token.
            tokenizer: its tokenizer.
            texts: the texts; one that exceeds the context is divided.

        Raises:
            CalibrationError: for no text, or a tokenizer that marks neither the beginning nor the end of a text.
        """
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        texts = [text for text in texts if text]
        if begin is None or not texts:
            what = "there is no text" if begin is not None else "the tokenizer has no token that begins or ends a text"
            raise CalibrationError(f"the loss per byte cannot be measured, since {what}")
        context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)
        losses, lengths, sizes = [], [], []
        for text in track(texts, "loss per byte"):
            ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            losses.append(sum(_loss(model, begin, part) for part in ids.split(context - 1)))
            lengths.append(len(ids))
            sizes.append(len(text.encode()))
        per_byte = tuple(loss / size for loss, size in zip(losses, sizes, strict=True))
        return cls(per_byte, sum(lengths) / sum(sizes), sum(sizes))

    @property
    def loss(self) -> Estimate:
        """The mean over texts, in nats per byte."""
        return Estimate.of(torch.tensor(self.losses, dtype=torch.float64))

    def since(self, before: ByteLoss) -> Estimate:
        """Return the increase since another model, paired by text, which is more precise than either loss.

        Args:
            before: the loss of the other model on the same texts.
        """
        ours, theirs = (torch.tensor(each.losses, dtype=torch.float64) for each in (self, before))
        return Estimate.of(ours - theirs)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate and the counts as JSON values."""
        return {"loss": vars(self.loss), "length": self.length, "bytes": self.bytes, "texts": len(self.losses)}


@torch.no_grad()
def _loss(model: Any, begin: int, ids: Tensor) -> float:
    """Return the sum of the losses of some tokens [time] that follow the token ``begin``."""
    tokens = torch.cat([torch.tensor([begin]), ids]).to(model.device)
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    return float(cross_entropy(logits.float(), tokens[1:], reduction="sum"))
