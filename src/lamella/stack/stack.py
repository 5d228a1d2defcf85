"""A trained model as addressable stacks of layers.

Three calls carry everything else: :meth:`Stack.context` runs the model's own front (embedding, positions, masks) and
notes what each layer is called with; :meth:`Stack.run` executes any stretch of the stack, from any sublayer to any
other; :meth:`Stack.head` finishes. Restarts in the middle, lens readings and ablations are all made of these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
Boundary = int | tuple[int, str]  # the place in the stream before a layer, or before a sublayer of it
NOTHING: frozenset[Position] = frozenset()
LIBRARIES = ("diffusers", "timm", "torchvision")  # beside transformers


@dataclass(frozen=True)
class Context:
    """What the front of a model made of its inputs.

    Attributes:
        h: the stream that enters the first layer [batch, time, hidden]; of some vision towers [patches, hidden].
        calls: for each layer, the keyword arguments that the model passes to it.
        real: which positions are tokens, not padding, in the shape of the stream's [batch, time] bool.
        modalities: which of those are ``text``, ``image`` or ``audio``, for each that the stack may carry.
    """

    h: Tensor
    calls: tuple[dict[str, Any], ...]
    real: Tensor
    modalities: Mapping[str, Tensor] = field(default_factory=dict)


def library_of(model: Any) -> str:
    """The library that a model in memory is of: ``transformers``, ``diffusers``, ``timm`` or ``torchvision``.

    Raises:
        ArchitectureError: for anything else.
    """
    packages = {each.__module__.partition(".")[0] for each in type(model).__mro__}
    if isinstance(model, nn.Module) or "diffusers" in packages:  # a pipeline of diffusers is no module
        if found := next((each for each in LIBRARIES if each in packages), None):
            return found
        if hasattr(model, "config"):
            return "transformers"
        if hasattr(model, "pretrained_cfg"):  # a class from elsewhere that is registered with timm
            return "timm"
    raise ArchitectureError(
        f"cannot open a {type(model).__name__}: give a transformers model, one of {', '.join(LIBRARIES)}, or its folder"
    )


class Model:
    """A model of any library, and its named stacks. Nothing in here writes to the model.

    A model with one stack is that stack: :class:`Stack` is a model, too. Models of other libraries than transformers
    are not divided into stacks.

    Args:
        model: a transformers model of a known architecture, or a model of diffusers, timm or torchvision.
        path: the folder it was loaded from, when there is one.
        name: what to call it in messages and reports.

    Attributes:
        library: the library that the model is of.

    Raises:
        ArchitectureError: for a model of another library, or one that the architecture table does not know.
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
        """The name, the library and the number of parameters, for provenance and evidence."""
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
        return next(each.device for module in self.modules for each in module.parameters())

    @cached_property
    def files_digest(self) -> str | None:
        """The SHA-256 over the tensors in the safetensors files that the model was loaded from, or None without any."""
        return None if self.path is None else digest_of_files(self.path)


def open_model(model: Any, path: Path | None = None, name: str | None = None) -> Model:
    """A model in memory with its stacks: where there is one, that stack."""
    opened = Model(model, path, name)
    return Stack(model, path, name) if len(opened.architectures) == 1 else opened


class Stack(Model):
    """A chain of layers inside a model, and their addresses.

    Args:
        model, path, name: see :class:`Model`.
        stack: which stack, of a model with several.

    Raises:
        ArchitectureError: for a model that the architecture table does not know, or for several stacks and none named.
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
        return {name: self if name == self.stack else Stack(self.model, self.path, self.name, name)
                for name in self.architectures}  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"family": self.architecture.name, "layers": len(self)}

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Stack({self.name}: {self.architecture.name}, {len(self)} layers)"

    @property
    def config(self) -> Any:
        """The part of the model's config that is this stack's."""
        part = self.architecture.config
        return getattr(self.model.config, part) if part else self.model.config

    @property
    def prefix(self) -> str:
        """What its sites begin with: its name, in a model with several stacks."""
        return f"{self.stack}." if len(self.architectures) > 1 else ""

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

    @property
    def vocabulary(self) -> list[nn.Module]:
        """The modules with an entry for each token: embedding and output projection, tied or not."""
        embedding = self.base.get_submodule(self.architecture.embedding)
        return [embedding] if self.unembedding is None else [embedding, self.unembedding]

    @cached_property
    def experts(self) -> Experts | None:
        """Where its experts are: what the entry says, or else what is found and proved when it is first asked for."""
        if not self.architecture.sources or self.device.type == "meta":
            return self.architecture.experts
        return find_experts(self)

    @cached_property
    def dropped(self) -> frozenset[Position]:
        """The sublayers that do not run, where the model is a view with a static plan or a native export."""
        dropped = getattr(self.model, "lamella_dropped", ())
        if isinstance(dropped, Mapping):
            dropped = dropped.get(self.stack, ())
        return frozenset(Position(*each) for each in dropped)

    @property
    def is_altered(self) -> bool:
        """Whether its layers are others than its config says: cut to different widths, or rewritten."""
        return any(getattr(self.model, mark, None) is not None for mark in ("lamella_counts", "lamella_rewrite"))

    @cached_property
    def _front(self) -> tuple[Any, Any]:
        """What makes the stream out of inputs, in a sharing copy, and its layers, which only note their calls."""
        architecture = self.architecture
        path = architecture.base if architecture.front is None else architecture.front
        front = share(self.model.get_submodule(path))
        inside = architecture.prefix.removesuffix(".").removeprefix(f"{path}.")
        layers = front.get_submodule(inside)
        for index, layer in enumerate(layers):
            stops = path != architecture.base and index == len(layers) - 1
            replace_forward(layer, _NoteCall(architecture, stops))
        return front, layers

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
        front, layers = self._front
        for layer in layers:
            layer.calls = calls
        try:
            front(**given)
        except _Noted:
            pass
        finally:
            for layer in layers:
                del layer.calls
        if not calls:
            raise ArchitectureError(
                f"these inputs do not reach the {self.stack} of {self.name}: give what it reads too"
            )
        h = calls[0].pop("h")
        for call in calls[1:]:
            del call["h"]
        mask = given.get(self.architecture.mask)
        real = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device) if mask is None else mask.bool()
        return Context(h, tuple(calls), real, self._modalities(real, given))

    def _modalities(self, real: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
        architecture, ids = self.architecture, given.get("input_ids")
        if not architecture.images or ids is None:
            return {architecture.modality: real}
        images = ids == getattr(self.model.config, architecture.images)
        return {architecture.modality: real & ~images, "image": real & images}

    def walk(
        self, h: Hidden, start: Boundary, stop: Boundary, context: Context, skip: Collection[tuple[int, str]] = NOTHING
    ) -> Iterator[tuple[Position, Hidden]]:
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

    def _place(self, point: Boundary) -> int:
        """Where in the list of positions a point is."""
        layer, name = (point, self.architecture.names[0]) if isinstance(point, int) else point
        if not 0 <= layer <= len(self):
            raise IndexError(f"point {point} is out of range: {self.name} has {len(self)} layers")
        return layer * len(self.architecture.names) + self.architecture.names.index(name)

    def run(
        self, h: Hidden, start: Boundary, stop: Boundary, context: Context, skip: Collection[tuple[int, str]] = NOTHING
    ) -> Hidden:
        """The stream at ``stop``, given the stream at ``start``; see :meth:`walk`."""
        for _, after in self.walk(h, start, stop, context, skip):
            h = after
        return h

    def execute(self, context: Context, order: Collection[int]) -> Hidden:
        """The stream after running whole layers in any order: left out, repeated, reordered.

        Args:
            context: what :meth:`context` returned.
            order: layer numbers in the order of execution.
        """
        h: Hidden = context.h
        for layer in order:
            h = self.run(h, layer, layer + 1, context)
        return h

    def normed(self, h: Hidden) -> Tensor:
        """The final norm (and, where the model has one, the projection behind it)."""
        h, name = join(h), self.architecture.norm
        norm = _at(self.base, name) if name else None  # None in post-norm OPT, too
        h = h if norm is None else norm(h)
        project = getattr(self.base, "project_out", None)
        return h if project is None else project(h)

    def logits(self, normed: Tensor, unembedding: nn.Module | None = None) -> Tensor:
        """What the model reads from final states [..., hidden]: logits [..., vocabulary], with its own soft cap.

        Where nothing reads them but other stacks, they are what is read.

        Args:
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
        """The output projection to some tokens alone [hidden] -> [tokens], for :meth:`logits`."""
        weight, bias = self.unembedding.weight, getattr(self.unembedding, "bias", None)
        some = nn.Linear(weight.shape[1], len(tokens), bias=bias is not None, device="meta")
        some.weight = nn.Parameter(weight.detach()[tokens], requires_grad=False)
        if bias is not None:
            some.bias = nn.Parameter(bias.detach()[tokens], requires_grad=False)
        return some

    def head(self, h: Hidden) -> Tensor:
        """The logits of a stream: final norm, then output projection [batch, time, vocabulary]."""
        return self.logits(self.normed(h))

    def hidden(self, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Tensor:
        """The final normed states that the model itself computes for these inputs [batch, time, hidden].

        Args:
            inputs: token ids, or all that the model takes by name, images too.
            options: passed on to the model.
        """
        out = self.outputs(inputs, **options)
        whole = self.architecture.images and self.stack == "encoder"  # then the decoder has run behind it
        return out.encoder_last_hidden_state if whole else out.last_hidden_state

    def outputs(self, inputs: Tensor | Mapping[str, Tensor], **options: Any) -> Any:
        """All that the model without its head returns for inputs; see :meth:`hidden`."""
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if self.architecture.causal:
            options.setdefault("use_cache", False)
        front = self.architecture.front if self.architecture.images else None
        runs = self.base if front is None else self.model.get_submodule(front)  # which puts images between the tokens
        return runs(**given, **options)

    def check_finite(self, position: tuple[int, str], h: Hidden) -> None:
        """Raise a :class:`NumericsError` that names the sublayer whose output is not finite."""
        if not torch.isfinite(join(h)).all():
            site = Position(*position).site
            raise NumericsError(
                f"non-finite activations after {site} of {self.name}: try float32, or check the weights"
            )


def last_stack(model: Any) -> Stack:
    """The stack of a transformers model whose logits are what the model says: its only one, or the last of several."""
    *_, last = architectures_of(model)
    return Stack(model, stack=last)


def _at(module: Any, path: str) -> Any:
    """What lies at a path inside a module; unlike a submodule, it may be None."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


class _Noted(Exception):
    """All layers of a stack have noted their calls; what comes behind them is not wanted."""


@dataclass(frozen=True)
class _NoteCall:
    """The forward of a layer that notes what it is called with and hands on the stream as it is."""

    architecture: Architecture
    stops: bool

    def __call__(self, layer: Any, h: Tensor, call: dict[str, Any]) -> Any:
        complete_call, result = self.architecture.complete_call, self.architecture.result
        call = call if complete_call is None else complete_call(layer, h, call)
        layer.calls.append(call | {"h": h})
        if self.stops:
            raise _Noted
        return h if result is None else result(h, call)
