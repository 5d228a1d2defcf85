"""A trained model as stacks of addressable layers.

Everything else builds on three calls: :meth:`Stack.context` runs the model's own front (embedding, positions, masks)
and records the arguments of each layer; :meth:`Stack.run` executes any part of the stack, from any sublayer to any
other; :meth:`Stack.head` computes the logits. Restarts in the middle, logit-lens readings and ablations all consist of
these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError, NumericsError
from lamella.stack.architectures import architectures_of, check_own
from lamella.stack.digest import digest_of_files
from lamella.stack.entry import Architecture, Experts
from lamella.stack.experts import find_experts
from lamella.stack.sharing import replace_forward, share
from lamella.stack.sites import Position, positions_of
from lamella.stack.sublayers import Parallel, join

Hidden = Tensor | Parallel
Boundary = int | tuple[int, str]  # the point in the residual stream before a layer, or before one of its sublayers
NO_POSITIONS: frozenset[Position] = frozenset()
LIBRARIES = ("diffusers", "timm", "torchvision")  # in addition to transformers


@dataclass(frozen=True)
class Context:
    """What the front of a model computes from its inputs.

    Attributes:
        h: hidden states that enter the first layer [batch, time, hidden]; for some vision towers [patches, hidden].
        calls: for each layer, the keyword arguments that the model passes to it.
        real: which positions are tokens rather than padding [batch, time] bool.
        modalities: which of those are ``text``, ``image`` or ``audio``, for each modality that the stack may have.
        added: by layer, what the model adds to the hidden states after it, such as features of an image in Qwen3-VL.
    """

    h: Tensor
    calls: tuple[dict[str, Any], ...]
    real: Tensor
    modalities: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[int, Tensor] = field(default_factory=dict)


def library_of(model: Any) -> str:
    """Return the library of a model in memory: ``transformers``, ``diffusers``, ``timm`` or ``torchvision``.

    Raises:
        ArchitectureError: for anything else.
    """
    packages = {each.__module__.partition(".")[0] for each in type(model).__mro__}
    if isinstance(model, nn.Module) or "diffusers" in packages:  # a pipeline of diffusers is not a module
        if found := next((each for each in LIBRARIES if each in packages), None):
            return found
        if hasattr(model, "config"):
            return "transformers"
        if hasattr(model, "pretrained_cfg"):  # a class of another package that is registered with timm
            return "timm"
    raise ArchitectureError(
        f"cannot open a {type(model).__name__}: give a transformers model, one of {', '.join(LIBRARIES)}, or its folder"
    )


class Model:
    """A model of any library, and its named stacks. No method changes the model.

    A model with one stack is that stack: :class:`Stack` is a subclass. Models of other libraries than transformers are
    not divided into stacks.

    Args:
        model: a transformers model of a known architecture, or a model of diffusers, timm or torchvision.
        path: the folder it was loaded from, if there is one.
        name: what to call it in messages and reports.

    Attributes:
        library: the library of the model.
        architectures: by stack, its architecture; empty for other libraries than transformers.

    Raises:
        ArchitectureError: for a model of another library, or of an unknown architecture.
    """

    model: Any

    def __init__(self, model: Any, path: Path | None = None, name: str | None = None) -> None:
        self.library = library_of(model)
        self.architectures: Mapping[str, Architecture] = {}
        if self.library == "transformers":
            check_own(model)
            self.architectures = architectures_of(model)
        self.model = model
        self.path = path
        self.name = name or (path.name if path else type(model).__name__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {', '.join(self.architectures) or self.library})"

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that hold its parameters: the model itself, or the networks of a pipeline."""
        return [self.model]

    def describe(self) -> dict[str, Any]:
        """Return the name, the library and the number of parameters, for provenance and evidence."""
        parameters = sum(each.numel() for module in self.modules for each in module.parameters())
        found = {"name": self.name, "library": self.library, "parameters": parameters}
        return found | ({} if self.files_digest is None else {"sha256": self.files_digest})

    @cached_property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks by name, in the order in which they run.

        Raises:
            ArchitectureError: for a model of another library than transformers.
        """
        self._check_stacks()
        return {stack: Stack(self.model, self.path, self.name, stack) for stack in self.architectures}

    def _check_stacks(self) -> None:
        if not self.architectures:
            raise ArchitectureError(
                f"{self.name} is a model of {self.library}, which is not divided into stacks of layers: give a "
                "transformers model"
            )

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        return next(each.device for module in self.modules for each in module.parameters())

    @cached_property
    def files_digest(self) -> str | None:
        """The SHA-256 over the tensors in the safetensors files that the model was loaded from; None without files."""
        return None if self.path is None else digest_of_files(self.path)


def open_model(model: Any, path: Path | None = None, name: str | None = None) -> Model:
    """Return a model in memory with its stacks; a model with one stack as that :class:`Stack`.

    Args:
        model: see :class:`Model`.
        path: the folder it was loaded from, if there is one.
        name: what to call it in messages and reports.
    """
    opened = Model(model, path, name)
    return Stack(model, path, name) if len(opened.architectures) == 1 else opened


class Stack(Model):
    """A chain of layers inside a model, and their addresses.

    Args:
        model: see :class:`Model`.
        path: the folder it was loaded from, if there is one.
        name: what to call it in messages and reports.
        stack: name of the stack, for a model with several.

    Raises:
        ArchitectureError: for a model of an unknown architecture, or if a model has several stacks and none is named.
    """

    def __init__(self, model: Any, path: Path | None = None, name: str | None = None, stack: str | None = None) -> None:
        super().__init__(model, path, name)
        self._check_stacks()
        if stack is None and len(self.architectures) > 1:
            *_, last = self.architectures
            known = " and ".join(self.architectures)
            raise ArchitectureError(
                f"{self.name} has the stacks {known}: choose one with --stack {last} "
                f"(in Python lamella.open(...).stacks['{last}'])"
            )
        if stack is not None and stack not in self.architectures:
            known = " and ".join(self.architectures)
            raise ArchitectureError(f"{self.name} has no stack '{stack}': it has {known}")
        self.stack = stack or next(iter(self.architectures))
        self.architecture: Architecture = self.architectures[self.stack]
        try:
            self.base: Any = model.get_submodule(self.architecture.base)
            self.unembedding: Any = model.get_submodule(self.architecture.head) if self.architecture.head else None
            self.layers: Any = self.base.get_submodule(self.architecture.layers)
        except AttributeError as error:
            how = "the model with its head" if self.architecture.head else f"it as {self.architecture.auto} does"
            raise ArchitectureError(
                f"a {type(model).__name__} has no {error.args[0].split()[-1]}: open {how}"
            ) from None

    @cached_property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks of its model by name, including this one."""
        return {name: self if name == self.stack else Stack(self.model, self.path, self.name, name)
                for name in self.architectures}  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return what provenance records of the model, with the architecture and the number of layers."""
        return super().describe() | {"family": self.architecture.name, "layers": len(self)}

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Stack({self.name}: {self.architecture.name}, {len(self)} layers)"

    @property
    def config(self) -> Any:
        """The part of the model's config that belongs to this stack."""
        part = self.architecture.config
        return getattr(self.model.config, part) if part else self.model.config

    @property
    def prefix(self) -> str:
        """The prefix of its sites: its name, in a model with several stacks."""
        return f"{self.stack}." if len(self.architectures) > 1 else ""

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        """The sublayers of all layers, in the order in which they run."""
        return positions_of(len(self), self.architecture.names)

    @property
    def end(self) -> Position:
        """The boundary after the last layer."""
        return Position(len(self), self.architecture.names[0])

    def after(self, position: tuple[int, str]) -> Position:
        """Return the boundary after a sublayer."""
        index = self._index(position) + 1
        return self.positions[index] if index < len(self.positions) else self.end

    @property
    def vocabulary(self) -> list[nn.Module]:
        """The modules with an entry for each token: embedding and output projection, tied or not."""
        embedding = self.base.get_submodule(self.architecture.embedding)
        return [embedding] if self.unembedding is None else [embedding, self.unembedding]

    @cached_property
    def experts(self) -> Experts | None:
        """Its experts: those of the entry, or, for a derived architecture, those found and proved on first use."""
        if not self.architecture.sources or self.device.type == "meta":
            return self.architecture.experts
        return find_experts(self)

    @cached_property
    def dropped(self) -> frozenset[Position]:
        """The sublayers that do not run, if the model is a view with a static plan or a native export."""
        dropped = getattr(self.model, "lamella_dropped", ())
        if isinstance(dropped, Mapping):
            dropped = dropped.get(self.stack, ())
        return frozenset(Position(*each) for each in dropped)

    @property
    def is_altered(self) -> bool:
        """Whether its layers differ from its config: cut to different widths, or rewritten."""
        return any(getattr(self.model, mark, None) is not None for mark in ("lamella_counts", "lamella_rewrite"))

    @cached_property
    def _front(self) -> tuple[Any, Any]:
        """A sharing copy of the module that computes the layers' input, and its layers, which only record arguments."""
        architecture = self.architecture
        path = architecture.base if architecture.front is None else architecture.front
        front = share(self.model.get_submodule(path))
        inside = architecture.prefix.removesuffix(".").removeprefix(f"{path}.")
        layers = front.get_submodule(inside)
        for index, layer in enumerate(layers):
            stops = path != architecture.base and index == len(layers) - 1
            replace_forward(layer, _RecordCall(architecture, stops))
        return front, layers

    def context(self, inputs: Tensor | Mapping[str, Tensor]) -> Context:
        """Run the front of the model once.

        Args:
            inputs: token ids [batch, time], or the model's inputs by name (``input_ids`` and ``attention_mask``, or
                ``pixel_values``).

        Raises:
            ArchitectureError: if the inputs do not reach this stack.
        """
        given: dict[str, Any] = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if self.architecture.causal:
            given.setdefault("use_cache", False)
        calls: list[_Recorded] = []
        front, layers = self._front
        for layer in layers:
            layer.calls = calls
        try:
            front(**given)
        except _AllRecorded:
            pass
        finally:
            for layer in layers:
                del layer.calls
        if not calls:
            raise ArchitectureError(
                f"these inputs do not reach the {self.stack} of {self.name}: give its inputs as well"
            )
        h = calls[0].h
        added = {layer: after.h for layer, (call, after) in enumerate(pairwise(calls)) if after.h is not call.left}
        mask = given.get(self.architecture.mask)
        real = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device) if mask is None else mask.bool()
        return Context(h, tuple(each.arguments for each in calls), real, self._modalities(real, given), added)

    def _modalities(self, real: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
        architecture, ids = self.architecture, given.get("input_ids")
        if not architecture.images or ids is None:
            return {architecture.modality: real}
        images = ids == getattr(self.model.config, architecture.images)
        return {architecture.modality: real & ~images, "image": real & images}

    def walk(
        self,
        h: Hidden,
        start: Boundary,
        stop: Boundary,
        context: Context,
        skip: Collection[tuple[int, str]] = NO_POSITIONS,
    ) -> Iterator[tuple[Position, Hidden]]:
        """Run the sublayers between two boundaries, yielding each one's position with the hidden states after it.

        Args:
            h: hidden states at ``start`` [batch, time, hidden].
            start: layer or position to start with.
            stop: layer or position to stop before; ``len(stack)`` is the end.
            context: what :meth:`context` returned for these inputs.
            skip: positions to leave out.
        """
        last = self.architecture.names[-1]
        for position in self.positions[self._index(start) : self._index(stop)]:
            layer, name = position
            if position in skip or position in self.dropped:
                h = join(h) if name == last else h
            else:
                h = self.architecture[name].run(self.layers[layer], h, context.calls[layer])
            if name == last and layer in context.added:
                h = join(h) + context.added[layer]
            yield position, h

    def _index(self, point: Boundary) -> int:
        """Return the index of a boundary in the list of positions."""
        layer, name = (point, self.architecture.names[0]) if isinstance(point, int) else point
        if not 0 <= layer <= len(self):
            raise IndexError(f"point {point} is out of range: {self.name} has {len(self)} layers")
        return layer * len(self.architecture.names) + self.architecture.names.index(name)

    def run(
        self,
        h: Hidden,
        start: Boundary,
        stop: Boundary,
        context: Context,
        skip: Collection[tuple[int, str]] = NO_POSITIONS,
    ) -> Hidden:
        """Return the hidden states at ``stop``, given those at ``start``; see :meth:`walk`.

        Args:
            h: hidden states at ``start`` [batch, time, hidden].
            start: layer or position to start with.
            stop: layer or position to stop before.
            context: what :meth:`context` returned for these inputs.
            skip: positions to leave out.
        """
        for _, after in self.walk(h, start, stop, context, skip):
            h = after
        return h

    def execute(self, context: Context, order: Collection[int]) -> Hidden:
        """Return the hidden states after running whole layers in any order: skipped, repeated, reordered.

        Args:
            context: what :meth:`context` returned.
            order: layer indices in the order of execution.
        """
        h: Hidden = context.h
        for layer in order:
            h = self.run(h, layer, layer + 1, context)
        return h

    def normed(self, h: Hidden) -> Tensor:
        """Apply the final norm (and, if the model has one, the projection after it)."""
        h, name = join(h), self.architecture.norm
        norm = _at(self.base, name) if name else None  # also None in post-norm OPT
        h = h if norm is None else norm(h)
        project = getattr(self.base, "project_out", None)
        return h if project is None else project(h)

    def logits(self, normed: Tensor, unembedding: nn.Module | None = None) -> Tensor:
        """Return the prediction from final states [..., hidden]: logits [..., vocabulary], with the model's soft cap.

        If only other stacks read the states, they are returned unchanged.

        Args:
            normed: final normalised states.
            unembedding: another projection in place of the model's, such as :meth:`unembedding_of` some tokens.
        """
        head, readout = unembedding or self.unembedding, self.architecture.readout
        if head is None:
            return normed
        if readout is not None:
            return readout(self.model, normed, head)
        logits = head(normed)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def unembedding_of(self, tokens: Tensor) -> nn.Linear:
        """Return the output projection to some tokens only [hidden] -> [tokens], for :meth:`logits`."""
        weight, bias = self.unembedding.weight, getattr(self.unembedding, "bias", None)
        projection = nn.Linear(weight.shape[1], len(tokens), bias=bias is not None, device="meta")
        projection.weight = nn.Parameter(weight.detach()[tokens], requires_grad=False)
        if bias is not None:
            projection.bias = nn.Parameter(bias.detach()[tokens], requires_grad=False)
        return projection

    def head(self, h: Hidden) -> Tensor:
        """Return the logits of hidden states: final norm, then output projection [batch, time, vocabulary]."""
        return self.logits(self.normed(h))

    def hidden(self, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Tensor:
        """Return the final normalised states that the model itself computes for these inputs [batch, time, hidden].

        Args:
            inputs: token ids, or the model's inputs by name, including images.
            options: passed on to the model.
        """
        out = self.outputs(inputs, **options)
        whole = self.architecture.images and self.stack == "encoder"  # then the decoder has run after it
        return out.encoder_last_hidden_state if whole else out.last_hidden_state

    def outputs(self, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Any:
        """Return everything that the model without its head returns for inputs; see :meth:`hidden`.

        Args:
            inputs: token ids, or the model's inputs by name, including images.
            options: passed on to the model.
        """
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if self.architecture.causal:
            options.setdefault("use_cache", False)
        front = self.architecture.front if self.architecture.images else None
        runs = (
            self.base if front is None else self.model.get_submodule(front)
        )  # which inserts images between the tokens
        return runs(**given, **options)

    def check_finite(self, position: tuple[int, str], h: Hidden) -> None:
        """Raise an error that names the sublayer if its output is not finite.

        Args:
            position: the sublayer.
            h: its output.

        Raises:
            NumericsError: if the output is not finite.
        """
        if not torch.isfinite(join(h)).all():
            site = Position(*position).site
            raise NumericsError(
                f"non-finite activations after {site} of {self.name}: try float32, or check the weights"
            )


def last_stack(model: Any) -> Stack:
    """Return the stack of a transformers model that computes its logits: its only one, or the last of several."""
    *_, last = architectures_of(model)
    return Stack(model, stack=last)


def _at(module: Any, path: str) -> Any:
    """Return the attribute at a path inside a module; unlike a submodule, it may be None."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


class _AllRecorded(Exception):
    """Raised when all layers of a stack have recorded their arguments, because later code need not run."""


class _Recorded(NamedTuple):
    """What a layer has recorded: the hidden states that enter and leave it, and its keyword arguments."""

    h: Tensor
    left: Tensor
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _RecordCall:
    """The forward of a layer that records its arguments and returns zeros, so that what the model adds remains.

    Attributes:
        architecture: entry of its stack.
        stops: whether this is the last layer, after which the pass ends.
    """

    architecture: Architecture
    stops: bool

    def __call__(self, layer: Any, h: Tensor, call: dict[str, Any]) -> Any:
        complete_call, result = self.architecture.complete_call, self.architecture.result
        call = call if complete_call is None else complete_call(layer, h, call)
        left = h if layer.calls and h is layer.calls[-1].left else torch.zeros_like(h)
        layer.calls.append(_Recorded(h, left, call))
        if self.stops:
            raise _AllRecorded
        return left if result is None else result(left, call)
