"""The surgery: what writes the stream is recentred, then its LayerNorms need not subtract a mean.

    C = I - 1 1^T / d            the mean of what it is given, over the d features, taken away
    writer    W [d, m], b [d]    W <- C W,  b <- C b                   so every x_l becomes C x_l
              scaled by s [d]    W <- C diag(s) W,  b <- C s b         and s is gone (LayerScale)
    norm      LN(C x)            = RMSNorm(C x), with the same gain g, bias b and eps
    reader    W [m, d], c [m]    c <- c + W b, then W <- W diag(g)     where the norm is to have neither

For CRMSNorm the stream lacks its last entry, which is the negative sum of the others. A writer lacks its last row, and
a reader W becomes W[:, :-1] - W[:, -1:], since z_d = -(z_1 + ... + z_{d-1}).

This module stands on the wiring, torch and transformers alone: checkpoints carry it with them, word for word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lamella.stack.wiring import Part, Wiring

EXACT = True  # what it makes of a model computes the same
Norm = Literal["rms", "crms"]
Fold = Literal["nothing", "bias", "affine"]
Tied = Literal["recentre", "untie"]


@dataclass(frozen=True)
class Form:
    """What a model is rewritten to.

    Attributes:
        norm: ``rms`` for RMSNorm; ``crms`` for CRMSNorm, whose stream is one entry narrower.
        fold: what of a norm moves into its readers: ``nothing``, its ``bias``, or all of its ``affine``.
        tied: an embedding that is also the head's weight is recentred after every lookup, or gets a copy of its own; of
            a model that ties nothing, ``untie``.

    Raises:
        ValueError: for values that are none of these, or do not go together.
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
    """y = g x / sqrt(mean(x^2) + eps) + b, over the last axis, with a bias where the LayerNorm had one."""

    def __init__(self, width: int, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        super().__init__(width, eps=eps, elementwise_affine=False)
        self.weight = weight  # type: ignore[assignment]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.bias is None else out + self.bias


class CRMSNorm(nn.Module):
    """y = u / sqrt((|u|^2 + (sum u)^2) / (n + 1) + eps): the first n entries of an RMSNorm of [u, -sum u], n + 1 wide.

    Sums are taken in float32 at least, since the entry that is not there is one.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, u: Tensor) -> Tensor:
        return self.normed(u).to(u.dtype)

    def normed(self, u: Tensor) -> Tensor:
        u = u if u.dtype == torch.float64 else u.float()
        squares = u.square().sum(-1, keepdim=True) + u.sum(-1, keepdim=True).square()
        return u * torch.rsqrt(squares / (self.width + 1) + self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


class WideCRMSNorm(CRMSNorm):
    """A CRMSNorm that gives all n + 1 entries with gain and bias: where nothing of the model reads what it gives."""

    def __init__(self, width: int, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        super().__init__(width, eps)
        self.weight, self.bias = weight, bias

    def forward(self, u: Tensor) -> Tensor:
        out = self.normed(u)
        out = torch.cat([out, -out.sum(-1, keepdim=True)], -1).to(u.dtype)
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Recentre:
    """Takes the mean away where the stream begins: a hook behind a module, or before the first layer.

    Attributes:
        compress: leave the last entry out, too.
    """

    compress: bool = False

    def __call__(self, module: nn.Module, given: tuple[Any, ...], out: Tensor | None = None) -> Any:
        if out is None:  # before a layer
            return (self.of(given[0]), *given[1:])
        return self.of(out)

    def of(self, x: Tensor) -> Tensor:
        for _ in range(2):  # of a large mean the first leaves its rounding, which an RMSNorm would see
            x = x - x.mean(-1, keepdim=True)
        return x[..., :-1] if self.compress else x


@dataclass
class Place:
    """A module, or a parameter by itself, somewhere in a model."""

    path: str
    module: Any

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Its own parameters by name; of a parameter, itself under the empty one."""
        if isinstance(self.module, nn.Parameter):
            return {"": self.module}
        return dict(self.module.named_parameters(recurse=False))


@dataclass
class Writer(Place):
    """A linear map, table or constant that writes the stream.

    Attributes:
        scaled: what multiplies the result by a vector, if anything does.
    """

    scaled: Place | None = None


@dataclass
class NormPlace(Place):
    """A norm on the stream with the places that read the stream behind it."""

    readers: list[Place] = field(default_factory=list)


@dataclass
class Branch:
    """One stream: what writes it, the norms on it, and where it begins with what is not linear.

    Attributes:
        writers: linear maps, tables and constants, scaled or not.
        norms: in their order.
        entrances: modules whose output is its beginning, and that are not linear.
        first: the first layer, where its input is that beginning, and is not linear.
    """

    writers: list[Writer] = field(default_factory=list)
    norms: list[NormPlace] = field(default_factory=list)
    entrances: list[Place] = field(default_factory=list)
    first: Place | None = None


LINEAR = (nn.Linear, Conv1D, _ConvNd, nn.Embedding, nn.Parameter)


def rewrite(model: Any, wirings: Mapping[str, Wiring], form: Form) -> None:
    """Rewrite a model in place; parameters that change are new, all others stay the same objects.

    Of a model without weights it makes the modules and shapes that it would have.

    Args:
        model: a copy that may be changed.
        wirings: what its modules read and write, by the path of each list of layers.

    Raises:
        ValueError: for a model that has no such form.
    """
    branches = find_branches(model, wirings)
    compress = form.norm == "crms"
    lookup: Any = model.get_input_embeddings() if form.tied == "recentre" else None
    if form.tied == "untie":
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
            model.set_submodule(norm.path, replaced(norm, form))
            for reader in norm.readers if compress else ():
                narrow(reader)


# Where


def find_branches(model: Any, wirings: Mapping[str, Wiring], norm: type[nn.Module] = nn.LayerNorm) -> list[Branch]:
    """The streams of a model, in the order of its stacks.

    Args:
        norm: what its norms are.

    Raises:
        ValueError: for what no wiring names, a norm that is no LayerNorm, or a writer that is not linear.
    """
    check_known(model, wirings)
    branches: list[Branch] = []
    for layers, wiring in wirings.items():
        encoded = branches[-1].norms[-1] if branches else None  # what the encoder's last norm gives
        first = Place(f"{layers}.0", model.get_submodule(f"{layers}.0")) if wiring.bent else None
        branch = Branch(first=first)
        for path, part in parts_of(model, layers, wiring):
            _sort(branch, Place(path, _at(model, path)), part, encoded, norm)
        branches.append(branch)
    return branches


def parts_of(model: Any, layers: str, wiring: Wiring) -> list[tuple[str, Part]]:
    """The parts of a stack with their paths in the model, layer by layer, then those outside."""
    numbers = range(len(model.get_submodule(layers)))
    inside = [(f"{layers}.{number}.{part.path}", part) for number in numbers for part in wiring.layer]
    return inside + [(part.path, part) for part in wiring.outside]


def check_known(model: Any, wirings: Mapping[str, Wiring]) -> None:
    """Check that a wiring names whatever has parameters.

    Raises:
        ValueError: for what none names, such as an adapter.
    """
    known = {path for layers, wiring in wirings.items() for path, _ in parts_of(model, layers, wiring)}
    for name, _ in model.named_parameters():
        if name not in known and name.rpartition(".")[0] not in known:
            raise ValueError(f"nothing says what {name} reads or writes: merge or remove it first")


def _at(model: Any, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name, None)


def _sort(branch: Branch, place: Place, part: Part, encoded: NormPlace | None, norm: type[nn.Module]) -> None:
    """Note what a part is to its stream."""
    if place.module is None:
        if part.reads is None:
            raise ValueError(f"there is no {place.path}, so what stands behind it reads the stream itself")
    elif part.reads == "branch":
        scale(branch.writers[-1], place)
    elif part.reads is None and part.writes == ("hidden",) and not isinstance(place.module, LINEAR):
        if not isinstance(place.module, norm):
            raise ValueError(f"{place.path} is a {_kind(place)}, and not a {norm.__name__}")
        branch.norms.append(NormPlace(place.path, place.module))
    elif part.writes in (("hidden",), ("branch",)):
        if isinstance(place.module, LINEAR):
            branch.writers.append(Writer(place.path, place.module))
        elif part.reads == "embedded" and isinstance(place.module, nn.LayerNorm):
            branch.entrances.append(place)
        else:
            raise ValueError(f"{place.path} writes the stream and is a {_kind(place)}, which is not linear")
    elif part.reads in ("hidden", "encoded"):
        before = branch.norms[-1] if part.reads == "hidden" else encoded
        if not isinstance(place.module, nn.Linear | Conv1D):
            raise ValueError(f"{place.path} reads the stream and is a {_kind(place)}, which is no linear map")
        assert before is not None
        before.readers.append(place)


def scale(writer: Writer, place: Place) -> None:
    """Note what scales a writer: a module with a vector, or with nothing once that is folded."""
    shapes = [each.ndim for each in place.parameters.values()]
    if shapes not in ([], [1]):
        raise ValueError(f"{place.path} is a {_kind(place)}, and not a vector that scales what is added to the stream")
    writer.scaled = place if shapes else None


def _kind(place: Place) -> str:
    return type(place.module).__name__


def untie(model: Any) -> None:
    """Give the head a weight of its own where it is the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    if embedding.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def check_single(model: Any, branches: Sequence[Branch], form: Form, lookup: Any) -> None:
    """Check that no tensor would be changed in one place and stay, or change again, in another.

    Raises:
        ValueError: when one would.
    """
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    changed: list[Place] = [writer for branch in branches for writer in branch.writers if writer.module is not lookup]
    if form.fold == "affine":
        changed += [reader for branch in branches for norm in branch.norms for reader in norm.readers]
    for place in changed:
        for parameter in place.parameters.values():
            names = held[id(parameter)]
            if len(names) > 1:
                raise ValueError(f"{' and '.join(names)} are one tensor, which would change for both: untie them")


# What


def recentre(model: Any, writer: Writer, compress: bool) -> None:
    """W <- C W, b <- C b, of what is scaled C diag(s); for CRMSNorm without the last entry of what they write."""
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
        model.set_submodule(writer.scaled.path, nn.Identity())
    note_shape(writer.module)


def centre(tensor: Tensor, axis: int) -> Tensor:
    """A tensor without its mean over one axis."""
    return tensor - tensor.mean(axis, keepdim=True)


def written_axis(module: Any, parameter: Tensor) -> int:
    """The axis of what a module writes: the first of a linear map's weight, the last of a table or of a Conv1D."""
    return 0 if parameter.ndim == 1 or isinstance(module, nn.Linear | _ConvNd) else parameter.ndim - 1


def fold_into_readers(norm: NormPlace, gain: bool) -> None:
    """c <- c + W b and, with the gain, W <- W diag(g), for every reader of a norm."""
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
    """The axis of what a linear map reads."""
    return 0 if isinstance(module, Conv1D) else 1


def narrow(reader: Place) -> None:
    """W[:, :-1] - W[:, -1:]: a reader of the stream without its last entry."""
    axis = read_axis(reader.module)
    old = reader.module.weight.detach().double()
    most = old.shape[axis] - 1
    new = old.narrow(axis, 0, most) - old.narrow(axis, most, 1)
    reader.module.weight = parameter_like(new, reader.module.weight)
    note_shape(reader.module)


def replaced(norm: NormPlace, form: Form) -> nn.Module:
    """The norm that takes the place of a LayerNorm."""
    old = norm.module
    [width], eps = old.normalized_shape, old.eps
    folds = bool(norm.readers)  # else what it gives is the model's own output
    if form.norm == "crms":
        return CRMSNorm(width - 1, eps) if folds else WideCRMSNorm(width - 1, eps, old.weight, old.bias)
    weight = None if folds and form.fold == "affine" else old.weight
    return RMSNorm(width, eps, weight, None if folds and form.fold != "nothing" else old.bias)


def put(model: Any, path: str, tensor: Tensor, like: Tensor) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, parameter_like(tensor, like))


def parameter_like(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(like.dtype).contiguous(), requires_grad=like.requires_grad)


def note_shape(module: Any) -> None:
    """Let a module's own numbers agree with its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, _ConvNd):
        module.out_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
