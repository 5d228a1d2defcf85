"""A trained model as an addressable stack of layers.

Three calls carry everything else: :meth:`Stack.context` runs the model's own front (embedding, positions, masks) and
notes what each layer is called with; :meth:`Stack.run` executes any stretch of the stack, from any sublayer to any
other; :meth:`Stack.head` finishes. Restarts in the middle, lens readings and ablations are all made of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError, NumericsError
from lamella.stack.architectures import Architecture, find_architecture
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import Position, positions_of
from lamella.stack.sublayers import Parallel, join

Stream = Tensor | Parallel
Point = int | tuple[int, str]  # the place in the stream before a layer, or before a sublayer of it
NOTHING: frozenset[Position] = frozenset()


@dataclass(frozen=True)
class Context:
    """What the front of a model made of its inputs.

    Attributes:
        h: the stream that enters the first layer [batch, time, hidden].
        calls: for each layer, the keyword arguments that the model passes to it.
        real: which positions are tokens, not padding [batch, time] bool.
    """

    h: Tensor
    calls: tuple[dict[str, Any], ...]
    real: Tensor


class Stack:
    """A model and the addresses of its layers. Nothing in here writes to the model.

    Args:
        model: a transformers model of a known architecture.
        path: the folder it was loaded from, when there is one.
        name: what to call it in messages and reports.

    Raises:
        ArchitectureError: for a model that the architecture table does not know.
    """

    def __init__(self, model: Any, path: Path | None = None, name: str | None = None) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise ArchitectureError(f"cannot open a {type(model).__name__}: give a transformers model or its folder")
        self.model = model
        self.path = path
        self.architecture: Architecture = find_architecture(model.config)
        self.name = name or (path.name if path else type(model).__name__)
        try:
            self.base: Any = model.get_submodule(self.architecture.base)
            self.unembedding: Any = model.get_submodule(self.architecture.head)
        except AttributeError as error:
            raise ArchitectureError(
                f"a {type(model).__name__} has no {error.args[0].split()[-1]}: open the model with its head"
            ) from None
        self.layers: Any = self.base.get_submodule(self.architecture.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Stack({self.name}: {self.architecture.name}, {len(self)} layers)"

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.unembedding.weight.device

    @cached_property
    def files_digest(self) -> str | None:
        """The SHA-256 over the safetensors files that the model was loaded from, or None without any.

        Read once, since checkpoints are large and every plan asks.
        """
        files = sorted(self.path.glob("*.safetensors")) if self.path is not None else []
        if not files:
            return None
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        """The sublayers of all layers, in the order in which they run."""
        return positions_of(len(self), self.architecture.names)

    @property
    def end(self) -> Position:
        """The place behind the last layer."""
        return Position(len(self), self.architecture.names[0])

    def after(self, position: tuple[int, str]) -> Position:
        """The place behind a sublayer."""
        place = self._place(position) + 1
        return self.positions[place] if place < len(self.positions) else self.end

    @cached_property
    def dropped(self) -> frozenset[Position]:
        """The sublayers that do not run, where the model is a view with a static plan or a native export."""
        return frozenset(Position(*each) for each in getattr(self.model, "lamella_dropped", ()))

    @cached_property
    def _front(self) -> Any:
        """The model's front alone: a sharing copy of the base whose layers only note what they are called with."""
        front = share(self.base)
        for layer in front.get_submodule(self.architecture.layers):
            replace_forward(layer, _note_call)
        return front

    def context(self, inputs: Tensor | Mapping[str, Tensor]) -> Context:
        """Run the front of the model once.

        Args:
            inputs: token ids [batch, time], or what the model takes by name (``input_ids`` and ``attention_mask``,
                or ``pixel_values``).
        """
        given: dict[str, Any] = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if self.architecture.causal:
            given.setdefault("use_cache", False)
        calls: list[dict[str, Any]] = []
        layers = self._front.get_submodule(self.architecture.layers)
        for layer in layers:
            layer.calls = calls
        try:
            self._front(**given)
        finally:
            for layer in layers:
                del layer.calls
        h = calls[0].pop("h")
        for call in calls[1:]:
            del call["h"]
        mask = given.get("attention_mask")
        real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask.bool()
        return Context(h, tuple(calls), real)

    def walk(
        self, h: Stream, start: Point, stop: Point, context: Context, skip: Collection[tuple[int, str]] = NOTHING
    ) -> Iterator[tuple[Position, Stream]]:
        """Run the sublayers between two points, yielding each one's position with the stream after it.

        Args:
            h: the stream at ``start`` [batch, time, hidden].
            start, stop: layers or positions, ``stop`` not included; ``len(stack)`` is the end.
            context: what :meth:`context` returned for these inputs.
            skip: positions to leave out.
        """
        last = self.architecture.names[-1]
        for position in self.positions[self._place(start) : self._place(stop)]:
            layer, name = position
            if position in skip or position in self.dropped:
                h = join(h) if name == last else h
            else:
                h = self.architecture[name].run(self.layers[layer], h, context.calls[layer])
            yield position, h

    def _place(self, point: Point) -> int:
        """Where in the list of positions a point is."""
        layer, name = (point, self.architecture.names[0]) if isinstance(point, int) else point
        if not 0 <= layer <= len(self):
            raise IndexError(f"point {point} is out of range: {self.name} has {len(self)} layers")
        return layer * len(self.architecture.names) + self.architecture.names.index(name)

    def run(
        self, h: Stream, start: Point, stop: Point, context: Context, skip: Collection[tuple[int, str]] = NOTHING
    ) -> Stream:
        """The stream at ``stop``, given the stream at ``start``; see :meth:`walk`."""
        for _, after in self.walk(h, start, stop, context, skip):
            h = after
        return h

    def execute(self, context: Context, order: Collection[int]) -> Stream:
        """The stream after running whole layers in any order: left out, repeated, reordered.

        Args:
            context: what :meth:`context` returned.
            order: layer numbers in the order of execution.
        """
        h: Stream = context.h
        for layer in order:
            h = self.run(h, layer, layer + 1, context)
        return h

    def normed(self, h: Stream) -> Tensor:
        """The final norm (and, where the model has one, the projection behind it)."""
        h = join(h)
        norm = getattr(self.base, self.architecture.norm)  # None in post-norm OPT
        h = h if norm is None else norm(h)
        project = getattr(self.base, "project_out", None)
        return h if project is None else project(h)

    def logits(self, normed: Tensor, unembedding: nn.Module | None = None) -> Tensor:
        """The output projection [..., hidden] -> [..., vocabulary], with the model's own soft cap.

        Args:
            unembedding: another projection in place of the model's, such as :meth:`unembedding_of` some tokens.
        """
        if self.architecture.stack == "vision":
            normed = normed[..., 0, :]  # the class token
        logits = (unembedding or self.unembedding)(normed)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def unembedding_of(self, tokens: Tensor) -> nn.Linear:
        """The output projection to some tokens alone [hidden] -> [tokens], for :meth:`logits`."""
        weight, bias = self.unembedding.weight, getattr(self.unembedding, "bias", None)
        some = nn.Linear(weight.shape[1], len(tokens), bias=bias is not None, device="meta")
        some.weight = nn.Parameter(weight.detach()[tokens], requires_grad=False)
        if bias is not None:
            some.bias = nn.Parameter(bias.detach()[tokens], requires_grad=False)
        return some

    def head(self, h: Stream) -> Tensor:
        """The logits of a stream: final norm, then output projection [batch, time, vocabulary]."""
        return self.logits(self.normed(h))

    def hidden(self, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Tensor:
        """The final normed states that the model itself computes for these inputs [batch, time, hidden]."""
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if self.architecture.causal:
            options.setdefault("use_cache", False)
        return self.base(**given, **options).last_hidden_state

    def check_finite(self, position: tuple[int, str], h: Stream) -> None:
        """Raise a :class:`NumericsError` that names the sublayer whose output is not finite."""
        if not torch.isfinite(join(h)).all():
            site = Position(*position).site
            raise NumericsError(
                f"non-finite activations after {site} of {self.name}: try float32, or check the weights"
            )


def _note_call(layer: Any, h: Tensor, call: dict[str, Any]) -> Tensor:
    layer.calls.append(call | {"h": h})
    return h
