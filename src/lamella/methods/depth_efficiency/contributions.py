"""What every layer adds to the stream in one run of the whole model: what studies of depth are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.measure.hidden_states import Tokens, sequences
from lamella.progress import track
from lamella.stack import Context, Parallel, Stack, join


@dataclass(frozen=True)
class Recorded:
    """One sequence without padding, layer by layer, in the dtype of the stream.

    Attributes:
        context: what the layers are called with, to start again from any of them.
        h: the stream before each layer, and after the last [layers + 1, time, hidden].
        attn: what each attention adds to it [layers, time, hidden].
        mlp: what each MLP adds [layers, time, hidden].
        middle: the stream that each MLP reads [layers, time, hidden]: behind the attention, or, where both read the
            same, before it.
    """

    context: Context
    h: Tensor
    attn: Tensor
    mlp: Tensor
    middle: Tensor

    @property
    def time(self) -> int:
        return self.h.shape[1]

    def which(self, front: int = 0, modality: str | None = None) -> Tensor:
        """The tokens behind the front, of one modality where it is named [time] bool.

        Raises:
            MethodError: for a modality that the stack does not carry.
        """
        known = self.context.modalities
        if modality is None:
            chosen = torch.ones(self.time, dtype=torch.bool, device=self.h.device)
        elif modality in known:
            chosen = known[modality][0].clone()
        else:
            raise MethodError(f"modality {modality}: this stack carries {' and '.join(known)}")
        chosen[:front] = False
        return chosen

    @property
    def c(self) -> Tensor:
        """What each layer adds [layers, time, hidden]."""
        return self.h[1:] - self.h[:-1]


@torch.no_grad()
def run_once(stack: Stack, given: Tensor | Mapping[str, Tensor]) -> Recorded:
    """Run the whole model once and keep its stream.

    Args:
        given: the tokens of one sequence [time], or what the model takes of one by name, images too, without padding.

    Raises:
        NumericsError: for activations that are not finite, named by site.
    """
    context = stack.context(given[None] if isinstance(given, Tensor) else given)
    h, attn, mlp, middle, joined = [context.h], [], [], [], context.h
    for position, after in stack.walk(context.h, 0, len(stack), context):
        stack.check_finite(position, after)
        if position.sublayer == "mlp":
            mlp.append(join(after) - joined)
            h.append(join(after))
        else:
            joined = join(after)
            attn.append(after.attn if isinstance(after, Parallel) else joined - h[-1])
            middle.append(after.h if isinstance(after, Parallel) else joined)
    parts = [torch.cat(part) for part in (h, attn, mlp, middle)]
    return Recorded(context, *parts)


def runs(stack: Stack, tokens: Tokens, what: str) -> Iterator[Recorded]:
    """Each sequence of calibration tokens, or row of images with text, run once; padding is left out.

    Args:
        what: the name of the work, for its progress.

    Raises:
        CalibrationError: for no sequences, or one without tokens.
    """
    for row in track(sequences(tokens), what):
        if not isinstance(tokens, Tensor | Mapping):  # rows of images with text, one at a time
            yield run_once(stack, {name: each.to(stack.device) for name, each in row.items()})
            continue
        real = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
        yield run_once(stack, row["input_ids"][real].to(stack.device))


def added(stack: Stack, layer: int, h: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """What a layer makes of another stream than its own, and what it adds to it, each [time, hidden].

    Args:
        h: the stream before the layer [time, hidden].
    """
    after = join(stack.run(h[None], layer, layer + 1, context))[0]
    return after, after - h
