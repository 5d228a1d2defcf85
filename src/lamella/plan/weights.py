"""Plans that change weights: masks, and the view's own tensors that carry them out.

A mask file is a safetensors file with one entry for each masked matrix, named like the parameter: one bit for each
weight, 1 where it is kept, eight in a byte, the first one highest. The shapes are in its metadata, under one key, since
the order of several is not the same in every run, and the file is named by its hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamella.errors import PlanError
from lamella.plan.schema import HEAD, Plan, WeightEdit
from lamella.stack import Stack, halves_of, matrices, share, sites_of

Masks = dict[str, Tensor]  # what is kept of each matrix, bool in its shape
SCHEMA = "lamella.masks/1"


def write_masks(masks: Mapping[str, Tensor], path: str | Path) -> str:
    """Write masks to a safetensors file, and return its SHA-256."""
    packed = {name: torch.from_numpy(np.packbits(keep.cpu().numpy().ravel())) for name, keep in masks.items()}
    shapes = json.dumps({name: list(keep.shape) for name, keep in masks.items()})
    save_file(packed, str(path), metadata={SCHEMA: shapes})
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_masks(path: str | Path, sha256: str | None = None) -> Masks:
    """Read the masks that :func:`write_masks` wrote.

    Args:
        sha256: what the file's hash must be.

    Raises:
        PlanError: for a file that is missing, damaged, another one, or no file of masks.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PlanError(
            f"masks: {path} cannot be read ({error.__class__.__name__}): keep the file beside its plan"
        ) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise PlanError(f"masks: {path} is not the one that the plan was made with: its hash differs")
    shapes = json.loads(metadata.get(SCHEMA, "{}"))
    if SCHEMA not in metadata or shapes.keys() != packed.keys():
        raise PlanError(f"masks: {path} is no file of masks: make the plan again")
    masks = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        if packed[name].size != -(-count // 8):
            raise PlanError(f"masks: {path}: '{name}' has {packed[name].size} bytes for {count} weights")
        bits = np.unpackbits(packed[name], count=count).astype(bool)
        masks[name] = torch.from_numpy(bits).view(shape)
    return masks


def mask_edit(stack: Stack, masks: Mapping[str, Tensor], folder: Path, name: str = "masks") -> WeightEdit:
    """The edit of a plan that carries out these masks, with its side file in ``folder``, named by its contents."""
    partial = folder / f".{name}.partial"
    digest = write_masks(masks, partial)
    file = partial.replace(folder / f"{name}-{digest[:12]}.safetensors")
    zeros = sum(int((~keep).sum()) for keep in masks.values())
    edit = WeightEdit(op="mask", sites=_sites(stack, masks), file=file.name, sha256=digest, zeros=zeros)
    edit._folder = folder
    return edit


def _sites(stack: Stack, names: Iterable[str]) -> list[str]:
    """The halves and layers that these matrices belong to, and ``head`` for what lies outside the layers."""
    halves: set[int] = set()
    outside = []
    family = stack.family
    for name in names:
        if not name.startswith(family.prefix):
            outside = [HEAD]
            continue
        layer, _, rest = name.removeprefix(family.prefix).partition(".")
        serves = [any(rest.startswith(f"{module}.") for module in modules)
                  for modules in (family.attn_modules, family.mlp_modules)]  # fmt: skip
        site = f"layers.{layer}" + {(True, False): ".attn", (False, True): ".mlp"}.get((serves[0], serves[1]), "")
        halves.update(halves_of(site, len(stack)))
    return sites_of(halves) + outside


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Any:
    """A copy of any torch model in which the masked weights are zero, and everything else is shared.

    Args:
        model: it is not changed.
        masks: what is kept of each matrix, bool in its shape, by the parameter's name.

    Raises:
        PlanError: for a mask of a matrix that the model does not have, or of another shape.
    """
    copy = share(model)
    found = matrices(copy)
    for name, keep in masks.items():
        if name not in found:
            raise PlanError(f"masks: this {type(model).__name__} has no matrix '{name}': the masks are another model's")
        weight = found[name].of(copy)
        if keep.shape != weight.shape:
            raise PlanError(
                f"masks: '{name}' is {list(keep.shape)}, but the matrix of this model is {list(weight.shape)}"
            )
        masked = weight.detach().masked_fill(~keep.to(weight.device), 0)
        found[name].put(copy, nn.Parameter(masked, requires_grad=weight.requires_grad))
    return copy


def masks_of(plan: Plan) -> Masks:
    """All masks of a plan, from its side files; a weight that one of them removes is removed.

    Raises:
        PlanError: for a side file that is missing, damaged or another one.
    """
    masks: Masks = {}
    for edit in plan.weights:
        for name, keep in read_masks(edit.located, edit.sha256).items():
            masks[name] = masks[name] & keep if name in masks else keep
    return masks


def edited(stack: Stack, plan: Plan) -> Stack:
    """The stack with the plan's weights, its own where the plan changes them; the same stack where it changes none.

    Raises:
        PlanError: see :func:`masks_of` and :func:`apply_masks`.
    """
    if not plan.weights:
        return stack
    return Stack(apply_masks(stack.model, masks_of(plan)), name=stack.name)  # no folder: its files have other weights
