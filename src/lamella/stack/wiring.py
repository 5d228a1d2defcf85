"""What the modules of a layer read and write, and how wide they are: the data that surgery on weights needs.

    stream --q_proj--> queries        stream --gate_proj, up_proj--> channels --down_proj--> stream
    stream --k_proj, v_proj--> keys   queries --o_proj--> stream

    channels --fc2--> branch --layer_scale--> stream        where a vector scales what is added to the stream

What reads the stream reads it behind the norm that stands before it in the list. Where an encoder's states are read,
their axis is called ``encoded``; what a vector scales before it is added is on the axis ``branch``; and what is not yet
the stream, because a norm or another function that is not linear makes the stream of it, is on the axis ``embedded``.

This module stands alone: native exports carry it with them, word for word.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module, or a parameter by itself, whose tensors lie on known axes.

    Attributes:
        path: where it is, inside the layer or inside the model.
        reads: the axis of its input, or None for an embedding, a constant or a norm on the stream, which are always
            there.
        writes: the axes of its output, side by side; none for the head, whose output is the vocabulary.
    """

    path: str
    reads: str | None
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Wiring:
    """What the modules of one architecture read and write.

    Attributes:
        sublayers: parts of every layer, by the sublayer that they serve; those that read nothing are norms on the
            stream.
        outside: parts outside the layers: embeddings, final norm, head.
        attention: the module of a layer that holds its heads; empty where heads and channels cannot be cut.
        grouped: whether key-value heads may be fewer than query heads.
        centred: whether norms subtract the mean, so that removing a silent channel cannot be compensated.
        shared_eps: whether the config's epsilon also serves norms that are not on the stream.
        divides: whether the config wants the stream to be a multiple of the query heads, though it says a head's size.
        bent: whether what enters the first layer comes from a function that is not linear and no module of its own.
    """

    sublayers: Mapping[str, tuple[Part, ...]]
    outside: tuple[Part, ...]
    attention: str = ""
    grouped: bool = True
    centred: bool = False
    shared_eps: bool = False
    divides: bool = False
    bent: bool = False

    @property
    def layer(self) -> tuple[Part, ...]:
        """The parts of a layer, in their order."""
        return tuple(part for parts in self.sublayers.values() for part in parts)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer that read the stream, in the order of its sublayers."""
        return tuple(part.path for part in self.layer if part.reads is None)


@dataclass(frozen=True)
class Sizes:
    """The widths of a model whose layers are all alike: stream, MLP channels, query and key-value heads, head size."""

    hidden: int
    channels: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def axes(self) -> dict[str, int]:
        """The length of every axis."""
        heads = {"queries": self.heads * self.head_dim, "keys": self.kv_heads * self.head_dim}
        return {"hidden": self.hidden, "channels": self.channels, **heads}
