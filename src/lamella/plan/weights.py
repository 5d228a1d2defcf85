"""Plans that change weights: their side files, and the view's own tensors with the changes.

=========  ============================================  ===========================================================
operation  the weights become                            the side file contains
=========  ============================================  ===========================================================
mask       0 where they are masked                       for each masked matrix one bit per weight, 1 if it is kept
scale      multiplied by factors                         for each parameter one bit per weight, 1 if it changes,
                                                         and the factors of those
replace    other values                                  the tensors
restore    those of another checkpoint                   the tensors; or ``file`` is the folder of that checkpoint, and
                                                         the hash covers the tensors that are taken from it
=========  ============================================  ===========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lamella.errors import CheckpointError, PlanError
from lamella.plan import checkpoint, sidefile
from lamella.plan.entries import WeightEdit
from lamella.plan.reference import EMBED, HEAD, NORM, ModelReference, StackReference
from lamella.plan.schema import Plan
from lamella.stack import Model, Position, Stack, matrices, open_model, share, weights

Masks = dict[str, Tensor]  # which weights of each matrix are kept, bool in its shape
Tensors = dict[str, Tensor]
MASKS, FACTORS, TENSORS = "lamella.masks/1", "lamella.factors/1", "lamella.tensors/1"


@dataclass(frozen=True)
class Factors:
    """The factors by which some weights of one parameter are multiplied.

    Attributes:
        where: the weights that change, bool in the parameter's shape.
        values: float32 factors [weights], in the order of ``where``.
    """

    where: Tensor
    values: Tensor


# Sites


def touched(model: Model, names: Iterable[str]) -> list[str]:
    """Return the sites that these parameters belong to: sublayers and layers, then ``embed``, ``norm`` and ``head``.

    Args:
        model: the model.
        names: names of parameters.
    """
    reference = _addresses(model)
    inside: dict[str, set[Position]] = {stack: set() for stack in reference.stacks}
    outside: set[tuple[str, str]] = set()
    for name in names:
        stack, site = _site(model, name)
        if site in (EMBED, NORM, HEAD):
            outside.add((stack, site))
        else:
            inside[stack].update(reference.at(f"{stack}.{site}")[1])
    found = reference.sites(inside)
    for stack in reference.stacks:
        prefix = "" if len(reference.stacks) == 1 or stack == reference.stack else f"{stack}."
        found += [prefix + site for site in (EMBED, NORM, HEAD) if (stack, site) in outside]
    return found


def parameters_at(model: Model, sites: Iterable[str]) -> list[str]:
    """Return the names of the parameters that belong to these sites; see :func:`touched`.

    Args:
        model: the model.
        sites: sites of the model.
    """
    reference = _addresses(model)
    requested: set[tuple[str, Position | str]] = set()
    for site in sites:
        stack, rest = reference.split(site)
        group = (rest,) if rest in (EMBED, NORM, HEAD) else reference.at(site)[1]
        requested.update((stack, each) for each in group)
    found = []
    for name in weights(model.model):
        stack, site = _site(model, name)
        group = (site,) if site in (EMBED, NORM, HEAD) else reference.at(f"{stack}.{site}")[1]
        if requested.issuperset((stack, each) for each in group):
            found.append(name)
    return found


def _addresses(model: Model) -> ModelReference:
    """Return a reference of the model's stacks that resolves sites."""
    stacks = {name: StackReference.of(stack) for name, stack in model.stacks.items()}
    chosen = model.stack if isinstance(model, Stack) and len(stacks) > 1 else None
    return ModelReference(architecture="", stacks=stacks, stack=chosen)


def _site(model: Model, name: str) -> tuple[str, str]:
    """Return the stack and the site of a parameter.

    The site is the only sublayer that uses it, else its layer, else ``embed``, ``norm`` or ``head``.
    """
    architectures = model.architectures
    for stack, architecture in architectures.items():
        if name.startswith(architecture.prefix):
            layer, _, rest = name.removeprefix(architecture.prefix).partition(".")
            served = [
                each.name
                for each in architecture.sublayers
                if any(rest.startswith(f"{module}.") for module in each.modules)
            ]
            return stack, f"layers.{layer}.{served[0]}" if len(served) == 1 else f"layers.{layer}"
    for stack, architecture in architectures.items():
        if architecture.head and name.startswith(f"{architecture.head}."):
            return stack, HEAD
        if architecture.norm and name.startswith(f"{architecture.base}.{architecture.norm}."):
            return stack, NORM
    inside = [stack for stack, architecture in architectures.items() if name.startswith(f"{architecture.base}.")]
    return (inside or list(architectures))[0], EMBED


# Masks


def write_masks(masks: Mapping[str, Tensor], path: str | Path) -> str:
    """Write masks to a safetensors file, and return its SHA-256.

    Args:
        masks: which weights are kept, bool in the matrix's shape, by the parameter's name.
        path: the file.
    """
    packed, shapes = _packed(masks)
    return sidefile.write(packed, path, MASKS, shapes)


def read_masks(path: str | Path, sha256: str | None = None) -> Masks:
    """Read the masks that :func:`write_masks` wrote.

    Args:
        path: the file.
        sha256: expected hash of the file; None if any is accepted.

    Raises:
        PlanError: for a file that is missing, damaged, of another hash, or not a file of masks.
    """
    packed, shapes = sidefile.read(path, MASKS, "masks", sha256)
    _check_names(path, "masks", shapes, packed)
    return {name: sidefile.unpack(packed[name], shape, f"masks: {path}: '{name}'") for name, shape in shapes.items()}


def _packed(bits: Mapping[str, Tensor]) -> tuple[Tensors, sidefile.Shapes]:
    return {name: sidefile.pack(each) for name, each in bits.items()}, {n: list(b.shape) for n, b in bits.items()}


def _check_names(path: str | Path, what: str, shapes: sidefile.Shapes, found: Iterable[str]) -> None:
    if shapes.keys() != set(found):
        raise PlanError(f"{what}: {path} is not a file of {what}: make the plan again")


def mask_edit(stack: Stack, masks: Mapping[str, Tensor], folder: Path, name: str = "masks") -> WeightEdit:
    """Return the edit of a plan that applies these masks; its side file is written to ``folder``.

    Args:
        stack: the stack.
        masks: which weights are kept, bool in the matrix's shape, by the parameter's name.
        folder: folder of the side file, whose name contains its hash.
        name: start of the file name.
    """
    zeros = sum(int((~keep).sum()) for keep in masks.values())
    return _edit(stack, "mask", masks, folder, name, MASKS, *_packed(masks), zeros=zeros)


def _edit(
    stack: Stack,
    op: str,
    names: Iterable[str],
    folder: Path,
    name: str,
    schema: str,
    tensors: Tensors,
    shapes: sidefile.Shapes,
    **more: int,
) -> WeightEdit:
    file, digest = sidefile.named(folder, name, tensors, schema, shapes)
    edit = WeightEdit(op=op, sites=touched(stack, names), file=file, sha256=digest, **more)
    edit._folder = folder
    return edit


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Any:
    """Return a copy of any torch model in which the masked weights are zero, and everything else is shared.

    Args:
        model: the model, which is not changed.
        masks: which weights are kept, bool in the matrix's shape, by the parameter's name.

    Raises:
        PlanError: for a mask of a matrix that the model does not have, or of another shape.
    """

    def masked(weight: Tensor, keep: Tensor) -> Tensor:
        return weight.masked_fill(~keep.to(weight.device), 0)

    return _changed(model, matrices(model), "masks", "matrix", masks, lambda keep: keep.shape, masked)


def _changed(
    model: nn.Module,
    found: Mapping[str, Any],
    what: str,
    kind: str,
    changes: Mapping[str, Any],
    shape: Callable[[Any], torch.Size],
    change: Callable[[Tensor, Any], Tensor],
) -> Any:
    """Return a copy of a model whose named weights are changed, and which shares all others."""
    copy = share(model)
    for name, each in changes.items():
        if name not in found:
            raise PlanError(f"{what}: this {type(model).__name__} has no {kind} '{name}': they are for another model")
        weight = found[name].of(copy)
        if shape(each) != weight.shape:
            raise PlanError(
                f"{what}: '{name}' is {list(shape(each))}, but the {kind} of this model is {list(weight.shape)}"
            )
        found[name].put(copy, nn.Parameter(change(weight.detach(), each), requires_grad=weight.requires_grad))
    return copy


def masks_of(plan: Plan) -> Masks:
    """Return all masks of a plan, from its side files; a weight is masked if any of them masks it.

    Args:
        plan: the plan.

    Raises:
        PlanError: for a side file that is missing, damaged or of another hash.
    """
    masks: Masks = {}
    for edit in plan.weights:
        if edit.op == "mask":
            for name, keep in read_masks(edit.located, edit.sha256).items():
                masks[name] = masks[name] & keep if name in masks else keep
    return masks


# Factors


def scale_edit(stack: Stack, factors: Mapping[str, Factors], folder: Path, name: str = "factors") -> WeightEdit:
    """Return the edit of a plan that multiplies weights; its side file is written to ``folder``.

    Args:
        stack: the stack.
        factors: the factors by the parameter's name.
        folder: folder of the side file, whose name contains its hash.
        name: start of the file name.
    """
    packed, shapes = _packed({name: each.where for name, each in factors.items()})
    tensors = {f"{name}.where": bits for name, bits in packed.items()}
    tensors |= {f"{name}.values": each.values.float().cpu().contiguous() for name, each in factors.items()}
    zeros = sum(int((each.values == 0).sum()) for each in factors.values())
    return _edit(stack, "scale", factors, folder, name, FACTORS, tensors, shapes, zeros=zeros)


def read_factors(path: str | Path, sha256: str | None = None) -> dict[str, Factors]:
    """Read the factors that :func:`scale_edit` wrote, by the parameter's name.

    Args:
        path: the file.
        sha256: expected hash of the file; None if any is accepted.

    Raises:
        PlanError: for a file that is missing, damaged, of another hash, or not a file of factors.
    """
    tensors, shapes = sidefile.read(path, FACTORS, "factors", sha256)
    expected = {f"{name}.{part}": shape for name, shape in shapes.items() for part in ("where", "values")}
    _check_names(path, "factors", expected, tensors)
    found = {}
    for name, shape in shapes.items():
        where_found = f"factors: {path}: '{name}'"
        where, values = sidefile.unpack(tensors[f"{name}.where"], shape, where_found), tensors[f"{name}.values"]
        if values.shape != (int(where.sum()),) or not values.is_floating_point():
            raise PlanError(
                f"{where_found} has {list(values.shape)} factors ({values.dtype}) for {int(where.sum())} weights: "
                "make the plan again"
            )
        found[name] = Factors(where, values)
    return found


def apply_factors(model: nn.Module, factors: Mapping[str, Factors]) -> Any:
    """Return a copy of any torch model in which some weights are multiplied by factors, and everything else is shared.

    Args:
        model: the model, which is not changed.
        factors: the factors by the parameter's name; products are computed in float32 and rounded once.

    Raises:
        PlanError: for factors of a parameter that the model does not have, or of another shape.
    """

    def scaled(weight: Tensor, each: Factors) -> Tensor:
        where = each.where.to(weight.device)
        product = weight[where].float() * each.values.to(weight.device)
        return weight.clone().masked_scatter_(where, product.to(weight.dtype))

    return _changed(model, weights(model), "factors", "parameter", factors, lambda each: each.where.shape, scaled)


# Tensors


def replace_edit(stack: Stack, tensors: Mapping[str, Tensor], folder: Path, name: str = "tensors") -> WeightEdit:
    """Return the edit of a plan that replaces tensors of the model; its side file is written to ``folder``.

    Args:
        stack: the stack.
        tensors: the new tensors by the parameter's name.
        folder: folder of the side file, whose name contains its hash.
        name: start of the file name.
    """
    return _tensors_edit(stack, "replace", tensors, folder, name)


def restore_edit(stack: Stack, base: Stack, sites: Iterable[str], folder: Path) -> WeightEdit:
    """Return the edit of a plan that restores weights of another checkpoint of the same architecture at some sites.

    Args:
        stack: the stack.
        base: the stack with the other weights. If it was opened from a safetensors folder with the model's tensor
            names, the edit refers to that folder; else its tensors are written to a side file in ``folder``.
        sites: the sites.
        folder: folder of the side file.

    Raises:
        PlanError: if a site has no parameters.
    """
    sites = list(sites)
    names = parameters_at(stack, sites)
    if not names:
        raise PlanError(f"restore: no parameters at {', '.join(sites) or 'no site'}: name layers such as layers.3")
    if base.path is not None and checkpoint.is_safetensors(base.path):
        ranges = {each.name: each for each in checkpoint.read(base.path).tensors}
        if ranges.keys() >= set(names):
            digest = checkpoint.digest([ranges[name] for name in names])
            return WeightEdit(op="restore", sites=touched(stack, names), file=str(base.path.resolve()), sha256=digest)
    return _tensors_edit(stack, "restore", {name: base.model.get_parameter(name) for name in names}, folder, "restored")


def _tensors_edit(stack: Stack, op: str, tensors: Mapping[str, Tensor], folder: Path, name: str) -> WeightEdit:
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    shapes = {key: list(tensor.shape) for key, tensor in kept.items()}
    return _edit(stack, op, kept, folder, name, TENSORS, kept, shapes)


def read_tensors(model: Model, edit: WeightEdit) -> Tensors:
    """Return the tensors of an edit that replaces or restores weights, by the parameter's name.

    Args:
        model: the model.
        edit: the edit.

    Raises:
        PlanError: for a file or a folder that is missing, damaged or of another hash.
    """
    if not edit.is_folder:
        return sidefile.read(edit.located, TENSORS, "tensors", edit.sha256)[0]
    tensors = {}
    for each in restored_ranges(model, edit):
        try:
            with safe_open(str(each.file), framework="pt") as file:
                tensors[each.name] = file.get_tensor(each.name)
        except (OSError, SafetensorError) as error:
            raise PlanError(f"restore: {each.file} cannot be used ({error}): make the plan again") from None
    return tensors


def restored_ranges(model: Model, edit: WeightEdit) -> list[checkpoint.Range]:
    """Return the byte ranges of the tensors of an edit that restores from a checkpoint's folder.

    Args:
        model: the model.
        edit: the edit.

    Raises:
        PlanError: if the folder is not a complete checkpoint, or its weights have changed since the plan was made.
    """
    try:
        ranges = {each.name: each for each in checkpoint.read(edit.located).tensors}
        found = [ranges[name] for name in parameters_at(model, edit.sites)]
        if checkpoint.digest(found) == edit.sha256:
            return found
    except (CheckpointError, KeyError) as error:
        raise PlanError(f"restore: {edit.located} cannot be used ({error}): make the plan again") from None
    raise PlanError(f"restore: {edit.located} has other weights than when the plan was made: make the plan again")


def apply_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Return a copy of any torch model in which some parameters have other values, and everything else is shared.

    Args:
        model: the model, which is not changed.
        tensors: the new values by the parameter's name, in its shape; they are converted to its dtype and device.

    Raises:
        PlanError: for a parameter that the model does not have, or of another shape.
    """

    def replaced(weight: Tensor, other: Tensor) -> Tensor:
        return other.detach().to(weight)

    return _changed(model, weights(model), "tensors", "parameter", tensors, lambda each: each.shape, replaced)


# Plans


def with_edits(opened: Model, plan: Plan) -> Model:
    """Return the model with the plan's weight edits applied; the same model if the plan has none.

    Args:
        opened: the model, which is not changed.
        plan: the plan.

    Raises:
        PlanError: for a side file that is missing, damaged, of another hash, or for another model.
    """
    if not plan.weights:
        return opened
    model = opened.model
    for edit in plan.weights:
        if edit.op == "mask":
            model = apply_masks(model, read_masks(edit.located, edit.sha256))
        elif edit.op == "scale":
            model = apply_factors(model, read_factors(edit.located, edit.sha256))
        else:
            model = apply_tensors(model, read_tensors(opened, edit))
    return open_model(model, name=opened.name)  # without its folder, whose files have other weights
