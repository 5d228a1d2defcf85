"""Narrower models: channels, heads, hidden channels and tokens are removed from the tensors that have them.

The architecture table lists which axes each module of a layer reads and writes (:mod:`lamella.stack.wiring`). Keeping
some entries of an axis then means selecting them wherever the axis occurs, in weights and biases. Heads are runs of
``head_dim`` entries of ``queries`` and ``keys``; the size of a head never changes, so rotary positions stay correct. A
tied tensor is cut once. Tokens are rows of the embedding and of the output projection, which every model names itself,
so that a vocabulary needs no wiring.

This module imports only that one, torch and transformers: native exports include its source verbatim.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.stack.wiring import Part, Sizes, Wiring


@dataclass(frozen=True)
class Heads:
    """The query heads that a layer keeps.

    Attributes:
        keep: their indices, in their new order.
        kv_of: for each kept head, the key-value head that it reads. Key-value heads that no kept head reads are
            removed.
        merge: for each kept head, the head whose difference to it is added, or None (Minitron, section 2.3).
    """

    keep: Sequence[int]
    kv_of: Sequence[int]
    merge: Sequence[int | None] | None = None

    @property
    def kv_keep(self) -> list[int]:
        """The key-value heads that are kept, in the order in which they are first read."""
        return list(dict.fromkeys(self.kv_of))

    @property
    def new_kv_of(self) -> list[int]:
        """For each kept query head, the index of its key-value head among the kept ones."""
        position = {head: index for index, head in enumerate(self.kv_keep)}
        return [position[head] for head in self.kv_of]

    @property
    def regular(self) -> bool:
        """Whether equally many adjacent query heads read each key-value head, as in ordinary models."""
        group = len(self.keep) // len(self.kv_keep)
        return list(self.new_kv_of) == [index // group for index in range(len(self.kv_keep) * group)]


@dataclass(frozen=True)
class Widths:
    """The entries that are kept of each axis; other axes stay whole.

    Attributes:
        channels: by layer, the kept MLP channels in their new order.
        heads: by layer, the kept heads.
        hidden: the kept channels of the residual stream.
        rescale: multiply the gains of RMS norms by the square root of d / d_kept, and their epsilon by d / d_kept, so
            that removing channels that are always zero changes nothing.
        vocab: the ids of the kept tokens, ascending; the new id of a token is its index here.
    """

    channels: Mapping[int, Sequence[int]] = field(default_factory=dict)
    heads: Mapping[int, Heads] = field(default_factory=dict)
    hidden: Sequence[int] | None = None
    rescale: bool = False
    vocab: Sequence[int] | None = None

    @property
    def cuts_layers(self) -> bool:
        """Whether anything but the vocabulary is cut."""
        return bool(self.channels or self.heads or self.hidden is not None)

    def counts(self) -> dict[str, Any]:
        """Return the number of kept entries of each axis but the vocabulary as JSON; see :meth:`of_counts`."""
        return {
            "channels": {str(layer): len(kept) for layer, kept in self.channels.items()},
            "kv_of": {str(layer): heads.new_kv_of for layer, heads in self.heads.items()},
            "hidden": None if self.hidden is None else len(self.hidden),
            "rescale": self.rescale,
        }

    @classmethod
    def of_counts(cls, counts: Mapping[str, Any]) -> "Widths":
        """Return widths that keep the first entries of each axis, for a model without weights."""
        heads = {int(layer): Heads(range(len(kv_of)), kv_of) for layer, kv_of in counts["kv_of"].items()}
        channels = {int(layer): range(count) for layer, count in counts["channels"].items()}
        hidden = None if counts["hidden"] is None else range(counts["hidden"])
        return cls(channels, heads, hidden, counts["rescale"])


def reorder(counts: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Return the counts of :meth:`Widths.counts` for a model whose layer i is the original's layer ``order[i]``.

    Args:
        counts: counts of the original.
        order: index of the original layer for each new layer.
    """
    by_layer = {
        name: {str(new): counts[name][str(old)] for new, old in enumerate(order) if str(old) in counts[name]}
        for name in ("channels", "kv_of")
    }
    return {**counts, **by_layer}


@dataclass(frozen=True)
class _Kept:
    """The kept entries of one axis, and for each the entry whose difference is added to it (-1 for none)."""

    index: Tensor
    merge: Tensor | None = None


@torch.no_grad()
def cut_model(model: nn.Module, layers: Iterable[nn.Module], wiring: Wiring, widths: Widths) -> None:
    """Cut a model in place: modules get new, smaller parameters; unchanged tensors stay the same objects.

    Args:
        model: a copy that may be changed; its tensors may be shared with another model.
        layers: its layers.
        wiring: the axes of its modules.
        widths: the kept entries.
    """
    known: dict[nn.Parameter, nn.Parameter] = {}
    heads = []
    for number, layer in enumerate(layers):
        attention: Any = layer.get_submodule(wiring.attention)
        kept = _kept(widths, number, attention)
        for part in wiring.layer:
            _cut(layer.get_submodule(part.path), part, kept, known, widths.rescale)
        if number in widths.heads:
            _regroup(attention, widths.heads[number], wiring.grouped)
        heads.append(_count_heads(layer, attention, wiring, widths.heads.get(number)))
    for part in wiring.outside:
        _cut(model.get_submodule(part.path), part, _kept(widths), known, widths.rescale)
    model.lamella_heads = tuple(heads)  # type: ignore[assignment]


@torch.no_grad()
def cut_vocabulary(model: Any, kept: Sequence[int]) -> None:
    """Keep some rows of embedding and output projection in place; both get new parameters, one if they are tied.

    Args:
        model: a copy that may be changed; its tensors may be shared with another model.
        kept: ids of the kept tokens, ascending.
    """
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in _of_tokens(model):
        own: list[tuple[str, nn.Parameter]] = list(module.named_parameters(recurse=False))
        for name, parameter in own:
            if parameter not in known:
                rows = parameter.index_select(0, torch.tensor(list(kept), device=parameter.device))
                known[parameter] = nn.Parameter(rows, requires_grad=parameter.requires_grad)
            setattr(module, name, known[parameter])
        _note_shape(module)
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = list(kept).index(module.padding_idx)


def _of_tokens(model: Any) -> list[Any]:
    """Return the modules with a row for each token."""
    return [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]


def kept_entries(
    model: nn.Module, layers: Iterable[nn.Module], wiring: Wiring | None, widths: Widths
) -> dict[str, list[Tensor | None]]:
    """Return the entries that :func:`cut_model` and :func:`cut_vocabulary` select of each dimension, without merging.

    Args:
        model: the whole model; its tensors may be on the ``meta`` device.
        layers: its layers.
        wiring: the axes of its modules; None if only the vocabulary is cut.
        widths: the kept entries.

    Returns:
        Entries [kept], or None for a dimension that stays whole; parameters that stay whole are omitted.
    """
    path = {module: name for name, module in model.named_modules()}
    at: list[tuple[nn.Module, Part, dict[str, _Kept]]] = []
    if wiring is not None:
        at = [(layer.get_submodule(part.path), part, _kept(widths, number, layer.get_submodule(wiring.attention)))
              for number, layer in enumerate(layers) for part in wiring.layer]  # fmt: skip
        at += [(model.get_submodule(part.path), part, _kept(widths)) for part in wiring.outside]
    found = {}
    for module, part, kept in at:
        for name, parameter in module.named_parameters(recurse=False):
            dims = [
                _entries(length, axes, kept)
                for length, axes in zip(parameter.shape, _axes(module, part, parameter), strict=True)
            ]
            if any(entries is not None for entries in dims):
                found[f"{path[module]}.{name}"] = dims
    for module in [] if widths.vocab is None else _of_tokens(model):
        for name, parameter in module.named_parameters(recurse=False):
            dims = found.setdefault(f"{path[module]}.{name}", [None] * parameter.ndim)
            dims[0] = torch.tensor(list(widths.vocab or ()))
    return found


def _entries(length: int, axes: tuple[str, ...], kept: Mapping[str, _Kept]) -> Tensor | None:
    """Return the kept entries of one dimension, which consists of these axes one after another."""
    if not any(axis in kept for axis in axes):
        return None
    size = length // len(axes)
    pieces = [kept[axis].index if axis in kept else torch.arange(size) for axis in axes]
    return pieces[0] if len(axes) == 1 else torch.cat([index * size + piece for index, piece in enumerate(pieces)])


def _kept(widths: Widths, number: int = -1, attention: Any = None) -> dict[str, _Kept]:
    """Return the kept entries of each axis that is cut, in one layer or outside the layers."""
    kept = {} if widths.hidden is None else {"hidden": _Kept(torch.tensor(list(widths.hidden)))}
    if number in widths.channels:
        kept["channels"] = _Kept(torch.tensor(list(widths.channels[number])))
    if number in widths.heads:
        kept |= _head_entries(widths.heads[number], attention)
    return kept


def _head_entries(heads: Heads, attention: Any) -> dict[str, _Kept]:
    """Return the entries of the kept heads on the axes of queries and of keys."""
    size = attention.head_dim

    def entries(indices: Iterable[int | None]) -> Tensor:
        runs = [[-1] * size if n is None else range(n * size, (n + 1) * size) for n in indices]
        return torch.tensor([entry for run in runs for entry in run])

    merge = None if heads.merge is None else entries(heads.merge)
    queries = _Kept(entries(heads.keep), merge)
    if not hasattr(attention, "num_key_value_groups"):  # always one key-value head per query head
        return {"queries": queries, "keys": _Kept(entries(heads.kv_of), merge)}
    whole = attention.num_key_value_groups == 1 and heads.kv_keep == list(heads.kv_of)
    return {"queries": queries, "keys": _Kept(entries(heads.kv_keep), merge if whole else None)}


def _cut(
    module: Any, part: Part, kept: Mapping[str, _Kept], known: dict[nn.Parameter, nn.Parameter], rescale: bool
) -> None:
    """Replace the parameters of one module by their kept part."""
    own: list[tuple[str, nn.Parameter]] = list(module.named_parameters(recurse=False))
    for name, parameter in own:
        if parameter not in known:
            tensor: Tensor = parameter
            for dim, axes in enumerate(_axes(module, part, parameter)):
                if any(axis in kept for axis in axes):
                    tensor = _select(tensor, dim, axes, kept, merges=axes == part.writes)
            if tensor is not parameter and rescale and hasattr(module, "variance_epsilon"):
                tensor = tensor * (parameter.numel() / tensor.numel()) ** 0.5
            new = parameter if tensor is parameter else nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            known[parameter] = new
            known[new] = new  # for a module that occurs twice
        if rescale and hasattr(module, "variance_epsilon"):
            module.variance_epsilon = module.variance_epsilon * parameter.numel() / known[parameter].numel()
        setattr(module, name, known[parameter])
    _note_shape(module)


def _axes(module: nn.Module, part: Part, parameter: Tensor) -> list[tuple[str, ...]]:
    """Return the axes of each dimension of a parameter, in order; empty for a dimension without a named axis."""
    if parameter.ndim == 1:
        return [part.writes]
    reads = () if part.reads is None else (part.reads,)
    return [reads, part.writes] if isinstance(module, Conv1D | nn.Embedding) else [part.writes, reads]


def _select(tensor: Tensor, dim: int, axes: tuple[str, ...], kept: Mapping[str, _Kept], merges: bool) -> Tensor:
    """Return the kept part of one dimension."""
    size = tensor.shape[dim] // len(axes)
    pieces = []
    for index, axis in enumerate(axes):
        piece = tensor.narrow(dim, index * size, size)
        if axis in kept:
            selected = piece.index_select(dim, kept[axis].index.to(tensor.device))
            merge = kept[axis].merge
            if merges and merge is not None:
                merged = (merge >= 0).nonzero().flatten().to(tensor.device)
                other = piece.index_select(dim, merge.to(tensor.device)[merged])
                selected.index_add_(dim, merged, selected.index_select(dim, merged) - other)
            piece = selected
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _note_shape(module: Any) -> None:
    """Update a module's size attributes to the shape of its tensors."""
    shape = module.weight.shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(shape)


def _regroup(attention: Any, heads: Heads, grouped: bool) -> None:
    """Set which key-value heads the query heads of an attention read."""
    if not grouped:
        attention.num_heads = len(heads.keep)
        attention.split_size = attention.embed_dim = len(heads.keep) * attention.head_dim
    elif heads.regular:
        attention.num_key_value_groups = len(heads.keep) // len(heads.kv_keep)
    else:
        attention.num_key_value_groups = 1
        attention.register_forward_pre_hook(_Spread(tuple(heads.new_kv_of)), with_kwargs=True)


@dataclass(frozen=True)
class _Spread:
    """Passes keys and values to an attention through an explicit mapping, one head per query head.

    The cache stores the existing key-value heads; the attention sees them repeated.
    """

    kv_of: tuple[int, ...]

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"cache": _SpreadCache(kwargs.get("cache"), list(self.kv_of))}


@dataclass(frozen=True)
class _SpreadCache:
    cache: Any
    kv_of: list[int]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return keys[:, self.kv_of], values[:, self.kv_of]


def _count_heads(layer: nn.Module, attention: Any, wiring: Wiring, heads: Heads | None) -> tuple[int, int]:
    """Return the numbers of query and key-value heads that a layer has now."""
    if heads is not None:
        return len(heads.keep), len(heads.kv_keep if wiring.grouped else heads.kv_of)
    [part] = [part for part in wiring.layer if part.reads == "queries"]
    out: Any = layer.get_submodule(part.path)
    count = out.weight.shape[_axes(out, part, out.weight).index(("queries",))] // attention.head_dim
    return count, count // getattr(attention, "num_key_value_groups", 1)


def counter(model: nn.Module, layers: Sequence[nn.Module], wiring: Wiring) -> Callable[[Sequence[Sizes], int], int]:
    """Return a function from the sizes of each layer, and the hidden size, to the number of parameters.

    Args:
        model: the model to count; a tied tensor counts once.
        layers: its layers, which must be alike.
        wiring: the axes of its modules.
    """
    inside = _products(layers[0], wiring.layer)
    within = {parameter for layer in layers for parameter in layer.parameters()}
    outside = _products(model, wiring.outside, without=within)

    def count(sizes: Sequence[Sizes], hidden: int) -> int:
        total = _total(outside, {"hidden": hidden})
        totals: dict[Sizes, int] = {}
        for layer in sizes:
            if layer not in totals:
                totals[layer] = _total(inside, layer.axes | {"hidden": hidden})
            total += totals[layer]
        return total

    return count


_Product = list[tuple[str, ...] | int]


def _products(root: nn.Module, parts: Sequence[Part], without: Iterable[nn.Parameter] = ()) -> list[_Product]:
    """Return every parameter under ``root`` once, as a product of lengths: integers, or concatenated axes."""
    at = {root.get_submodule(part.path): part for part in parts}
    seen = set(without)
    found: list[_Product] = []
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            axes = _axes(module, at[module], parameter) if module in at else [()] * parameter.ndim
            found.append([names or length for names, length in zip(axes, parameter.shape, strict=True)])
    return found


def _total(products: Sequence[_Product], lengths: Mapping[str, int]) -> int:
    return sum(
        prod(each if isinstance(each, int) else sum(lengths[axis] for axis in each) for each in product)
        for product in products
    )
