"""The entries of a plan: what it says of a width, a path, weights, networks and policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lamella.plan.document import JsonDocument, SidefileDocument, plain_name
from lamella.plan.width import Heads

LayerIndex = Annotated[int, Field(ge=0)]
Kept = Annotated[list[LayerIndex], Field(min_length=1)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class HeadWidth(JsonDocument):
    """The query heads that a layer keeps, in their new order; see :class:`lamella.plan.width.Heads`.

    Attributes:
        kv_of: for each of them, the key-value head that it reads, by its number in the original.
        merge: for each of them, the head whose difference to it is added, or None.
    """

    keep: Kept
    kv_of: Kept
    merge: list[LayerIndex | None] | None = None

    def heads(self) -> Heads:
        return Heads(self.keep, self.kv_of, self.merge)


class HiddenWidth(JsonDocument):
    """The kept channels of the stream, in their new order.

    Attributes:
        rescale: let norms make up for the channels that no longer count; see :class:`lamella.plan.width.Widths`.
    """

    keep: Kept
    rescale: bool = False


Width = dict[str, Kept | HeadWidth | HiddenWidth]


class PhasedPath(JsonDocument):
    """The layers that run, in order, in each phase.

    Attributes:
        keys: what a layer that only generated tokens run knows of the prompt: ``fill`` computes the prompt's keys and
            values there, and nothing else; with ``local`` it sees generated tokens alone.
    """

    prefill: Annotated[list[LayerIndex], Field(min_length=1)]
    decode: Annotated[list[LayerIndex], Field(min_length=1)]
    keys: Literal["fill", "local"] = "fill"


class PolicyReference(SidefileDocument):
    """What decides while the model runs.

    Attributes:
        name: the slug of its method.
        params: its settings.
        file: the safetensors side file of its trained parameters, beside the plan; None where it has none.
        sha256: of that file.
        work: for each layer, the shares of generated tokens that are expected to run its sublayers, as measured on
            calibration text; empty where nothing is known.
    """

    name: Slug
    params: dict[str, Any] = Field(default_factory=dict)
    work: list[tuple[float, ...]] = Field(default_factory=list)


class WeightEdit(SidefileDocument):
    """A change of weights that the view owns; everything else stays shared. See :mod:`lamella.plan.weights`.

    Attributes:
        op: ``mask`` sets weights to zero, ``scale`` multiplies them, ``replace`` and ``restore`` put others there.
        sites: where: sublayers and layers, ``embed``, ``norm`` or ``head``.
        file: the safetensors side file, beside the plan; to restore, also the folder of a checkpoint.
        sha256: of that file, or of the tensors that are taken from the folder.
        zeros: how many weights it sets to zero.
    """

    op: Literal["mask", "scale", "replace", "restore"]
    sites: Annotated[list[str], Field(min_length=1)]
    file: str
    sha256: str
    zeros: Annotated[int, Field(ge=0)] = 0

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if not self.is_folder:
            plain_name(self.file)

    @property
    def is_folder(self) -> bool:
        """Whether it restores from another checkpoint, which is named by the absolute path of its folder."""
        return self.op == "restore" and Path(self.file).is_absolute()


class RewriteReference(JsonDocument):
    """The whole model written otherwise, by what a method computes of its weights; see :mod:`lamella.plan.rewriting`.

    Attributes:
        name: the slug of the method.
        params: its settings.
    """

    name: Slug
    params: dict[str, Any] = Field(default_factory=dict)


class AdapterReference(SidefileDocument):
    """Small networks beside the linear maps of some sites; see :mod:`lamella.plan.adapters`.

    Attributes:
        name: the slug of their method.
        kind: which of the method's adapters, where it has several.
        params: their settings, the same at every map.
        sites: where: layers and sublayers.
        base: which weights they were trained beside, see :func:`lamella.plan.fingerprint.revision`; None where that is
            not known.
        file: the safetensors side file of their tensors, beside the plan: the name of a map, a dot, a tensor's own.
        sha256: of that file.
    """

    name: Slug
    kind: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    sites: Annotated[list[str], Field(min_length=1)]
    base: str | None = None
    file: Annotated[str, AfterValidator(plain_name)]
    sha256: str


class ModuleReference(SidefileDocument):
    """A network that a plan puts at a site.

    Attributes:
        name: the slug of its method.
        kind: which of the method's networks, where it has several.
        params: its settings.
        keep_sublayers: whether what is at the site runs, too, and the network is given what came of it.
        file: the safetensors side file of its parameters, beside the plan; None where it has none.
        sha256: of that file.
    """

    name: Slug
    kind: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    keep_sublayers: bool = False
