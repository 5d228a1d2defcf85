"""The rewrite: modules that write to the residual stream are recentred, so that LayerNorms need not subtract a mean.

    C = I - 1 1^T / d            subtracts the mean over the d features
    writer    W [d, m], b [d]    W <- C W,  b <- C b                   so every x_l becomes C x_l
              scaled by s [d]    W <- C diag(s) W,  b <- C s b         and s is removed (LayerScale)
    norm      LN(C x)            = RMSNorm(C x), with the same gain g, bias b and eps
    reader    W [m, d], c [m]    c <- c + W b, then W <- W diag(g)     where the norm is to have neither

For CRMSNorm the residual stream lacks its last channel, which is the negative sum of the others. A writer loses its
last row, and a reader W becomes W[:, :-1] - W[:, -1:], since z_d = -(z_1 + ... + z_{d-1}).

This module depends on the wiring, torch and transformers only: checkpoints contain a verbatim copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lamella.stack.wiring import Part, Wiring

EXACT = True  # the rewritten model computes the same function
Norm = Literal["rms", "crms"]
Fold = Literal["nothing", "bias", "affine"]
Tied = Literal["recentre", "untie"]


@dataclass(frozen=True)
class Form:
    """The form that a model is rewritten to.

    Attributes:
        norm: ``rms`` for RMSNorm; ``crms`` for CRMSNorm, whose residual stream has one channel less.
        fold: part of a norm that is folded into its readers: ``nothing``, its ``bias``, or all of its ``affine``.
        tied: an embedding that shares its weight with the head is recentred after every lookup, or untied (``untie``);
            for a model without tied weights, ``untie``.

    Raises:
        ValueError: for unknown or incompatible values.
    """

    norm: Norm = "rms"
    fold: Fold = "nothing"
    tied: Tied = "recentre"

    def __post_init__(self) -> None:
        if self.norm == "crms" and self.fold != "affine":
            raise ValueError("a CRMSNorm has no gain and no bias: fold the affine")
        if self.fold == "affine" and self.tied != "untie":
            raise ValueError("a tied head would be scaled twice, as an embedding too: untie it")


class RMSNorm(nn.RMSNorm):
    """y = g x / sqrt(mean(x^2) + eps) + b, over the last axis; it has a bias if the LayerNorm had one."""

    def __init__(self, width: int, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        super().__init__(width, eps=eps, elementwise_affine=False)
        self.weight = weight  # type: ignore[assignment]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        out = super().forward(x)
        return out if self.bias is None else out + self.bias


class CRMSNorm(nn.Module):
    """y = u / sqrt((|u|^2 + (sum u)^2) / (n + 1) + eps): an RMSNorm of [u, -sum u] without its last channel.

    Sums are computed in float32 at least, since the missing channel is one.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, u: Tensor) -> Tensor:
        """Normalise u [..., n]."""
        return self.normed(u).to(u.dtype)

    def normed(self, u: Tensor) -> Tensor:
        """Normalise u [..., n], in float32 or float64."""
        u = u if u.dtype == torch.float64 else u.float()
        squares = u.square().sum(-1, keepdim=True) + u.sum(-1, keepdim=True).square()
        return u * torch.rsqrt(squares / (self.width + 1) + self.eps)

    def extra_repr(self) -> str:
        """Return the width and eps for the module's printout."""
        return f"{self.width}, eps={self.eps}"


class WideCRMSNorm(CRMSNorm):
    """A CRMSNorm that returns all n + 1 channels with gain and bias, for a norm that no module of the model reads."""

    def __init__(self, width: int, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        super().__init__(width, eps)
        self.weight, self.bias = weight, bias

    def forward(self, u: Tensor) -> Tensor:
        """Normalise u [..., n] and restore the last channel: [..., n + 1]."""
        out = self.normed(u)
        out = torch.cat([out, -out.sum(-1, keepdim=True)], -1).to(u.dtype)
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Recentre:
    """Hook that subtracts the mean at the start of the residual stream: after a module, or before the first layer.

    Attributes:
        compress: drop the last channel as well.
    """

    compress: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor | None = None) -> Any:
        """Subtract the mean of a module's output, or of a layer's input."""
        if out is None:  # before a layer
            return (self.of(args[0]), *args[1:])
        return self.of(out)

    def of(self, x: Tensor) -> Tensor:
        """Subtract the mean of x over its last axis."""
        for _ in range(2):  # a large mean leaves a rounding error, which would affect an RMSNorm
            x = x - x.mean(-1, keepdim=True)
        return x[..., :-1] if self.compress else x


@dataclass
class Component:
    """A module, or a parameter of its own, with its path in a model.

    Attributes:
        path: its path.
        module: the module or parameter.
    """

    path: str
    module: Any

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Its own parameters by name; a bare parameter has the empty name."""
        if isinstance(self.module, nn.Parameter):
            return {"": self.module}
        return dict(self.module.named_parameters(recurse=False))


@dataclass
class ResidualWriter(Component):
    """A projection, table or constant that writes to the residual stream.

    Attributes:
        scaled: the module that multiplies the result by a vector, if there is one.
    """

    scaled: Component | None = None


@dataclass
class NormComponent(Component):
    """A norm on the residual stream, with the modules that read its output.

    Attributes:
        readers: the modules that read its output.
    """

    readers: list[Component] = field(default_factory=list)


@dataclass
class Branch:
    """One residual stream: the modules that write to it, its norms, and the non-linear modules at its start.

    Attributes:
        writers: projections, tables and constants, scaled or not.
        norms: in their order.
        entrances: non-linear modules whose output starts the residual stream.
        first: the first layer, if its input comes from elsewhere and is not linear.
    """

    writers: list[ResidualWriter] = field(default_factory=list)
    norms: list[NormComponent] = field(default_factory=list)
    entrances: list[Component] = field(default_factory=list)
    first: Component | None = None


LINEAR = (nn.Linear, Conv1D, _ConvNd, nn.Embedding, nn.Parameter)


def rewrite(model: Any, wirings: Mapping[str, Wiring], form: Form) -> None:
    """Rewrite a model in place; changed parameters are new objects, all others stay the same objects.

    A model without weights gets the modules and shapes that it would have.

    Args:
        model: a copy that may be changed.
        wirings: which parts of it read and write what, by the path of each list of layers.
        form: the form to rewrite it to.

    Raises:
        ValueError: for a model that cannot take this form.
    """
    branches = find_branches(model, wirings)
    compress = form.norm == "crms"
    lookup: Any = model.get_input_embeddings() if form.tied == "recentre" else None
    if form.tied == "untie" and isinstance(model, PreTrainedModel):  # a model of timm has no embedding to tie
        untie(model)
    check_single(model, branches, form, lookup)
    for branch in branches:
        if form.fold != "nothing":
            for norm in branch.norms:
                fold_into_readers(norm, gain=form.fold == "affine")
        for writer in branch.writers:
            if writer.module is lookup:
                writer.module.register_forward_hook(Recentre(compress))
            else:
                recentre(model, writer, compress)
        for entrance in branch.entrances:
            entrance.module.register_forward_hook(Recentre(compress))
        if branch.first is not None:
            branch.first.module.register_forward_pre_hook(Recentre(compress))
        for norm in branch.norms:
            model.set_submodule(norm.path, replacement(norm, form))
            for reader in norm.readers if compress else ():
                narrow(reader)


# Where


def find_branches(model: Any, wirings: Mapping[str, Wiring], norm: type[nn.Module] = nn.LayerNorm) -> list[Branch]:
    """Return the residual streams of a model, in the order of its stacks.

    Args:
        model: the model.
        wirings: which parts of it read and write what, by the path of each list of layers.
        norm: class of its norms.

    Raises:
        ValueError: for parts that no wiring names, a norm of another class, or a writer that is not linear.
    """
    check_known(model, wirings)
    branches: list[Branch] = []
    for layers, wiring in wirings.items():
        encoded = branches[-1].norms[-1] if branches else None  # the encoder's last norm
        first = Component(f"{layers}.0", model.get_submodule(f"{layers}.0")) if wiring.bent else None
        branch = Branch(first=first)
        for path, part in parts_of(model, layers, wiring):
            _sort(branch, Component(path, _at(model, path)), part, encoded, norm)
        branches.append(branch)
    return branches


def parts_of(model: Any, layers: str, wiring: Wiring) -> list[tuple[str, Part]]:
    """Return the parts of a stack with their paths in the model, layer by layer, then those outside.

    Args:
        model: a model that contains the stack.
        layers: path of the list of layers in the model.
        wiring: the parts of the architecture that read from or write to the residual stream.
    """
    indices = range(len(model.get_submodule(layers)))
    inside = [(f"{layers}.{index}.{part.path}", part) for index in indices for part in wiring.layer]
    return inside + [(part.path, part) for part in wiring.outside]


def check_known(model: Any, wirings: Mapping[str, Wiring]) -> None:
    """Check that the wirings name every part with parameters.

    Args:
        model: the model to rewrite.
        wirings: the wiring of each stack, by the path of its list of layers.

    Raises:
        ValueError: for an unknown part, such as an adapter.
    """
    known = {path for layers, wiring in wirings.items() for path, _ in parts_of(model, layers, wiring)}
    for name, _ in model.named_parameters():
        if name not in known and name.rpartition(".")[0] not in known:
            raise ValueError(f"it is not known what {name} reads or writes: merge or remove it first")


def _at(model: Any, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    found = getattr(_module(model, parent), name, None)
    return found if isinstance(found, nn.Module | nn.Parameter) else None  # a BEiT may have a factor of 1 instead


def _module(model: Any, path: str) -> Any:
    """Return a submodule; None if an optional one is missing."""
    for name in path.split(".") if path else ():
        model = getattr(model, name, None)
    return model


def _sort(
    branch: Branch, component: Component, part: Part, encoded: NormComponent | None, norm: type[nn.Module]
) -> None:
    """Add a part to its residual stream as a writer, norm, entrance or reader."""
    if component.module is None:
        if part.reads is None:
            raise ValueError(
                f"there is no {component.path}, so the module after it reads the residual stream without a norm"
            )
    elif part.reads == "branch":
        scale(branch.writers[-1], component)
    elif part.reads is None and part.writes == ("hidden",) and not isinstance(component.module, LINEAR):
        if not isinstance(component.module, norm):
            raise ValueError(f"{component.path} is a {_kind(component)}, and not a {norm.__name__}")
        branch.norms.append(NormComponent(component.path, component.module))
    elif part.writes in (("hidden",), ("branch",)):
        if isinstance(component.module, LINEAR):
            branch.writers.append(ResidualWriter(component.path, component.module))
        elif part.reads == "embedded" and isinstance(component.module, nn.LayerNorm):
            branch.entrances.append(component)
        else:
            raise ValueError(
                f"{component.path} writes to the residual stream and is a {_kind(component)}, which is not linear"
            )
    elif part.reads in ("hidden", "encoded"):
        before = branch.norms[-1] if part.reads == "hidden" else encoded
        if not isinstance(component.module, nn.Linear | Conv1D):
            raise ValueError(
                f"{component.path} reads the residual stream and is a {_kind(component)}, which is no linear layer"
            )
        assert before is not None
        before.readers.append(component)


def scale(writer: ResidualWriter, component: Component) -> None:
    """Record the module that scales a writer: a module with one vector, or without parameters once that is folded.

    Args:
        writer: a module that writes to the residual stream; its ``scaled`` is set.
        component: the module that scales its output, such as a LayerScale.
    """
    shapes = [each.ndim for each in component.parameters.values()]
    if shapes not in ([], [1]):
        raise ValueError(
            f"{component.path} is a {_kind(component)}, not a vector that scales the update of the residual stream"
        )
    writer.scaled = component if shapes else None


def _kind(component: Component) -> str:
    return type(component.module).__name__


def untie(model: Any) -> None:
    """Give the head its own copy of the weight if it shares the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    if embedding.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def check_single(model: Any, branches: Sequence[Branch], form: Form, lookup: Any) -> None:
    """Check that no tensor to be changed is also used elsewhere.

    Args:
        model: the model.
        branches: its residual streams.
        form: the form to rewrite it to.
        lookup: the embedding that is recentred after the lookup instead, or None.

    Raises:
        ValueError: when one is.
    """
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    changed: list[Component] = [
        writer for branch in branches for writer in branch.writers if writer.module is not lookup
    ]
    if form.fold == "affine":
        changed += [reader for branch in branches for norm in branch.norms for reader in norm.readers]
    for component in changed:
        for parameter in component.parameters.values():
            names = held[id(parameter)]
            if len(names) > 1:
                raise ValueError(f"{' and '.join(names)} share one tensor, which would change for both: untie them")


# What


def recentre(model: Any, writer: ResidualWriter, compress: bool) -> None:
    """Apply W <- C W and b <- C b, or C diag(s) if scaled; for CRMSNorm without the last output channel.

    Args:
        model: the model of the writer; changed in place.
        writer: a module that writes to the residual stream, with the module that scales its output.
        compress: whether to remove the last output channel, for CRMSNorm.
    """
    for name, parameter in writer.parameters.items():
        axis = written_axis(writer.module, parameter)
        written = parameter.detach().double()
        if writer.scaled is not None:
            [s] = writer.scaled.parameters.values()
            written = (written.movedim(axis, -1) * s.detach().double()).movedim(-1, axis)
        centred = centre(written, axis)
        if compress:
            centred = centred.narrow(axis, 0, centred.shape[axis] - 1)
        path = f"{writer.path}.{name}" if name else writer.path
        put(model, path, centred, like=parameter)
    if writer.scaled is not None:
        neutralise(model, writer.scaled)
    update_sizes(writer.module)


def neutralise(model: Any, scaled: Component) -> None:
    """Replace a module that scales by the identity, and a parameter that scales by the factor 1.

    Args:
        model: the model, changed in place.
        scaled: the module or parameter, which is folded.
    """
    if isinstance(scaled.module, nn.Module):
        model.set_submodule(scaled.path, nn.Identity())
        return
    parent, _, name = scaled.path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    setattr(model.get_submodule(parent), name, 1.0)


def centre(tensor: Tensor, axis: int) -> Tensor:
    """Return a tensor without its mean over one axis.

    Args:
        tensor: any tensor.
        axis: the axis over which the mean is subtracted.
    """
    return tensor - tensor.mean(axis, keepdim=True)


def written_axis(module: Any, parameter: Tensor) -> int:
    """Return the output axis of a parameter: the first of a linear layer's weight, the last of a table or a Conv1D.

    Args:
        module: the module that writes to the residual stream.
        parameter: its weight, or its bias.
    """
    return 0 if parameter.ndim == 1 or isinstance(module, nn.Linear | _ConvNd) else parameter.ndim - 1


def fold_into_readers(norm: NormComponent, gain: bool) -> None:
    """Apply c <- c + W b and, with the gain, W <- W diag(g) to every reader of a norm.

    Args:
        norm: a LayerNorm, with the linear layers that read its output; they are changed in place.
        gain: whether to fold the weight g of the norm in addition to its bias b.
    """
    weight, bias = norm.module.weight, norm.module.bias
    for reader in norm.readers:
        linear, read = reader.module, read_axis(reader.module)
        old = linear.weight.detach().double()
        if bias is not None:
            added = torch.tensordot(old, bias.detach().double(), dims=([read], [0]))
            own = linear.bias
            total = added if own is None else own.detach().double() + added
            linear.bias = parameter_like(total, linear.weight if own is None else own)
        if gain and weight is not None:
            g = weight.detach().double()
            linear.weight = parameter_like(old * (g[:, None] if read == 0 else g), linear.weight)


def read_axis(module: Any) -> int:
    """Return the input axis of a linear layer's weight."""
    return 0 if isinstance(module, Conv1D) else 1


def narrow(reader: Component) -> None:
    """Replace W by W[:, :-1] - W[:, -1:]: a reader of the residual stream without its last channel."""
    axis = read_axis(reader.module)
    old = reader.module.weight.detach().double()
    most = old.shape[axis] - 1
    new = old.narrow(axis, 0, most) - old.narrow(axis, most, 1)
    reader.module.weight = parameter_like(new, reader.module.weight)
    update_sizes(reader.module)


def replacement(norm: NormComponent, form: Form) -> nn.Module:
    """Return the norm that replaces a LayerNorm.

    Args:
        norm: a LayerNorm, with the linear layers that read its output.
        form: the form that the model is rewritten to.
    """
    old = norm.module
    [width], eps = old.normalized_shape, old.eps
    folds = bool(norm.readers)  # otherwise its output is the model's output
    if form.norm == "crms":
        return CRMSNorm(width - 1, eps) if folds else WideCRMSNorm(width - 1, eps, old.weight, old.bias)
    weight = None if folds and form.fold == "affine" else old.weight
    return RMSNorm(width, eps, weight, None if folds and form.fold != "nothing" else old.bias)


def put(model: Any, path: str, tensor: Tensor, like: Tensor) -> None:
    """Set a tensor at a path of a model, as a parameter with the dtype and gradient flag of another one.

    Args:
        model: the model, changed in place.
        path: dotted path of the parameter.
        tensor: the new values.
        like: the parameter whose dtype and gradient flag are copied.
    """
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, parameter_like(tensor, like))


def parameter_like(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter with the dtype and gradient flag of another one.

    Args:
        tensor: the values, of any dtype.
        like: the parameter whose dtype and gradient flag are used.
    """
    return nn.Parameter(tensor.to(like.dtype).contiguous(), requires_grad=like.requires_grad)


def update_sizes(module: Any) -> None:
    """Update a module's size attributes to the shape of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, _ConvNd):
        module.out_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
