"""The entries of a plan: widths, paths, weight edits, networks, adapters and policies."""

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
        keep: indices of the kept query heads.
        kv_of: for each kept query head, the index of its key-value head in the original.
        merge: for each kept query head, the head whose difference to it is added, or None.
    """

    keep: Kept
    kv_of: Kept
    merge: list[LayerIndex | None] | None = None

    def heads(self) -> Heads:
        """Return the heads as the surgery takes them."""
        return Heads(self.keep, self.kv_of, self.merge)


class HiddenWidth(JsonDocument):
    """The kept channels of the residual stream, in their new order.

    Attributes:
        keep: indices of the kept channels.
        rescale: whether norms compensate for the removed channels; see :class:`lamella.plan.width.Widths`.
    """

    keep: Kept
    rescale: bool = False


Width = dict[str, Kept | HeadWidth | HiddenWidth]


class PhasedPath(JsonDocument):
    """The layers that run in each phase, in order.

    Attributes:
        prefill: indices of the layers that run for the prompt.
        decode: indices of the layers that run for generated tokens.
        keys: what a layer that only generated tokens run knows of the prompt. ``fill`` computes the prompt's keys and
            values there, and nothing else; with ``local`` the layer attends to generated tokens only.
    """

    prefill: Annotated[list[LayerIndex], Field(min_length=1)]
    decode: Annotated[list[LayerIndex], Field(min_length=1)]
    keys: Literal["fill", "local"] = "fill"


class PolicyReference(SidefileDocument):
    """A policy that decides at run time.

    Attributes:
        name: slug of its method.
        params: its settings.
        file: safetensors side file of its trained parameters; None if it has none.
        sha256: SHA-256 of that file.
        work: for each layer, the expected fraction of generated tokens that run each of its sublayers, measured on
            calibration text; empty if unknown.
    """

    name: Slug
    params: dict[str, Any] = Field(default_factory=dict)
    work: list[tuple[float, ...]] = Field(default_factory=list)


class WeightEdit(SidefileDocument):
    """A change of weights that the view owns; all other weights stay shared. See :mod:`lamella.plan.weights`.

    Attributes:
        op: ``mask`` sets weights to zero, ``scale`` multiplies them, ``replace`` and ``restore`` substitute other
            values.
        sites: sites of the weights: layers and sublayers, ``embed``, ``norm`` or ``head``.
        file: safetensors side file; for ``restore``, alternatively the absolute path of a checkpoint's folder.
        sha256: SHA-256 of that file, or of the tensors that are taken from the folder.
        zeros: number of weights that it sets to zero.
    """

    op: Literal["mask", "scale", "replace", "restore"]
    sites: Annotated[list[str], Field(min_length=1)]
    file: str
    sha256: str
    zeros: Annotated[int, Field(ge=0)] = 0

    def model_post_init(self, context: Any) -> None:
        """Check the name of the side file."""
        super().model_post_init(context)
        if not self.is_folder:
            plain_name(self.file)

    @property
    def is_folder(self) -> bool:
        """Whether it restores from another checkpoint, which is named by the absolute path of its folder."""
        return self.op == "restore" and Path(self.file).is_absolute()


class RewriteReference(JsonDocument):
    """A rewriting of the whole model by a method; see :mod:`lamella.plan.rewriting`.

    Attributes:
        name: slug of the method.
        params: its settings.
    """

    name: Slug
    params: dict[str, Any] = Field(default_factory=dict)


class AdapterReference(SidefileDocument):
    """Adapters on the linear layers of some sites; see :mod:`lamella.plan.adapters`.

    Attributes:
        name: slug of their method.
        kind: class name of the adapters, if the method has several kinds.
        params: their settings, the same for every linear layer.
        sites: their sites: layers and sublayers.
        base: revision of the weights that they were trained with, see :func:`lamella.plan.fingerprint.revision`; None
            if unknown.
        file: safetensors side file of their tensors, which are named by the linear layer, a dot, and the adapter's own
            name.
        sha256: SHA-256 of that file.
    """

    name: Slug
    kind: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    sites: Annotated[list[str], Field(min_length=1)]
    base: str | None = None
    file: Annotated[str, AfterValidator(plain_name)]
    sha256: str


class ModuleReference(SidefileDocument):
    """A network that a plan inserts at a site.

    Attributes:
        name: slug of its method.
        kind: class name of the network, if the method has several kinds.
        params: its settings.
        keep_sublayers: whether the sublayers at the site run as well, in which case the network is given their output.
        file: safetensors side file of its parameters; None if it has none.
        sha256: SHA-256 of that file.
    """

    name: Slug
    kind: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    keep_sublayers: bool = False
