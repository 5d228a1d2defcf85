"""The contribution of every layer to the residual stream in one run of the whole model."""

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
class RecordedRun:
    """The hidden states of one sequence without padding, in the dtype of the model.

    Attributes:
        context: inputs of the layers, to restart from any of them.
        h: residual stream before each layer, and after the last [layers + 1, time, hidden].
        attn: output of each attention [layers, time, hidden].
        mlp: output of each MLP [layers, time, hidden].
        middle: residual stream before each MLP [layers, time, hidden]: after the attention, or, for parallel sublayers,
            before it.
    """

    context: Context
    h: Tensor
    attn: Tensor
    mlp: Tensor
    middle: Tensor

    @property
    def time(self) -> int:
        """The number of tokens."""
        return self.h.shape[1]

    def token_mask(self, front: int = 0, modality: str | None = None) -> Tensor:
        """Return the mask of the tokens after the front, of one modality if given [time] bool.

        Args:
            front: number of tokens at the front to exclude.
            modality: name of a modality, or None for all tokens.

        Raises:
            MethodError: for a modality that the stack does not have.
        """
        known = self.context.modalities
        if modality is None:
            chosen = torch.ones(self.time, dtype=torch.bool, device=self.h.device)
        elif modality in known:
            chosen = known[modality][0].clone()
        else:
            raise MethodError(f"modality {modality}: this stack has {' and '.join(known)}")
        chosen[:front] = False
        return chosen

    @property
    def c(self) -> Tensor:
        """The contribution of each layer [layers, time, hidden]."""
        return self.h[1:] - self.h[:-1]


@torch.no_grad()
def run_once(stack: Stack, inputs: Tensor | Mapping[str, Tensor]) -> RecordedRun:
    """Run the whole model once and record its residual stream.

    Args:
        stack: the model.
        inputs: token ids of one sequence [time], or the model's inputs by name, including images, without padding.

    Raises:
        NumericsError: for activations that are not finite, named by site.
    """
    context = stack.context(inputs[None] if isinstance(inputs, Tensor) else inputs)
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
    return RecordedRun(context, *parts)


def runs(stack: Stack, tokens: Tokens, what: str) -> Iterator[RecordedRun]:
    """Run each sequence of calibration tokens, or row of images with text, once, without padding.

    Args:
        stack: the model.
        tokens: calibration tokens, or rows of images with text.
        what: description for the progress bar.

    Raises:
        CalibrationError: if there is no sequence, or one without tokens.
    """
    for row in track(sequences(tokens), what):
        if not isinstance(tokens, Tensor | Mapping):  # rows of images with text, one at a time
            yield run_once(stack, {name: each.to(stack.device) for name, each in row.items()})
            continue
        real = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
        yield run_once(stack, row["input_ids"][real].to(stack.device))


def layer_contribution(stack: Stack, layer: int, h: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Run a layer on another residual stream; return its output and its contribution, each [time, hidden].

    Args:
        stack: the model.
        layer: index of the layer.
        h: residual stream before the layer [time, hidden].
        context: inputs of the layers.
    """
    after = join(stack.run(h[None], layer, layer + 1, context))[0]
    return after, after - h
