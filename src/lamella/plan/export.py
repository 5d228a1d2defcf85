"""Exports: checkpoints of a model with a plan applied, which no longer need the original.

=========  ==================================================================  ==================================
form       expresses                                                           loads in
=========  ==================================================================  ==================================
plain      whole layers: removed, repeated, moved; widths that all layers have transformers, and all that reads its
           in common; masked weights, as zeros                                 checkpoints
portable   also single sublayers, as zeroed output projections, which gain no  the same
           speed
native     single sublayers, removed from the weights, and widths that differ  transformers, with remote code
           between layers, or a rewritten model; with a modelling file
native     plans that treat prompt and generated tokens differently, that      ``lamella.load``
           insert networks or adapters, or that remove single sublayers of
           one of several stacks: the whole model together with the plan
=========  ==================================================================  ==================================
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from lamella.errors import ArchitectureError, CheckpointError, ExportError, PlanError
from lamella.files import new_folder
from lamella.plan import checkpoint, native
from lamella.plan.chain import Run
from lamella.plan.checkpoint import Checkpoint, Progress
from lamella.plan.config import check_alike, common_sizes, cut_vocabulary_of, reindex, rename_tokens, resize
from lamella.plan.entries import WeightEdit
from lamella.plan.rotary import with_older_names
from lamella.plan.schema import Plan
from lamella.plan.tokenizer import cut_files
from lamella.plan.view import alter
from lamella.plan.weights import restored_ranges
from lamella.plan.width import Widths, cut_model, kept_entries, reorder
from lamella.progress import tracker
from lamella.stack import ASSEMBLIES, Model, Stack, auto_class, digest_of_files, silencers

Form = Literal["plain", "portable", "native"]
FormOrAuto = Literal["auto", "plain", "portable", "native"]
NOTES = {  # section of README.md on the form
    "plain": "An ordinary checkpoint: the removed parts are absent from the weights and the config.",
    "portable": "Removed sublayers have zeroed output projections: every program computes the same function, but "
    "they are still computed, so they save neither time nor memory. Removed whole layers are absent.",
    "native": "The removed parts are absent from the weights. The modelling file needs torch and transformers only.",
    "rewritten": "It computes the same as the original. No config of transformers describes its form, so a modelling "
    "file comes with the weights, which needs torch and transformers only.",
    "planned": "The weights are the whole model's. Opened with Lamella, it runs the plan in `plan.json`, which no "
    "config can express; opened without Lamella, it is the whole model.",
}
_COMPANIONS: tuple[str, ...] = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    *checkpoint.LICENCE,
)
_OWN_FILES = frozenset(
    {"config.json", "plan.json", "README.md", f"{native.MODULE}.py", checkpoint.SINGLE, checkpoint.INDEX}
)


@dataclass(frozen=True)
class Weights:
    """Weights and config to be written.

    Attributes:
        size: size of the weights in bytes.
        write: writes both into a folder, reporting progress.
    """

    size: int
    write: Callable[[Path, Progress | None], None]


def check_floats(model: Model) -> None:
    """Check that the weights of a model are floating-point values, which can be cut and written again.

    Raises:
        ExportError: for a model in int8.
    """
    if any(each.dtype == torch.int8 for each in model.model.parameters()):
        raise ExportError(f"{model.name} has integer weights: cut the original, and quantise the result")


def natural_form(plan: Plan, model: Model | None = None) -> Form:
    """Return the form that keeps the whole gain of a plan: plain if a standard config can express it, else native.

    Args:
        plan: the plan.
        model: the model that it is for, which matters if its layers have different widths or some cannot be removed.
    """
    even = _uneven(plan) is None and (model is None or getattr(model.model, "lamella_counts", None) is None)
    chains = [plan.chain(stack) for stack in plan.model.stacks]
    has_networks = bool(plan.modules or plan.adapters)
    is_plain = (
        plan.is_static
        and not has_networks
        and plan.rewrite is None
        and all(chain.in_layers for chain in chains)
        and even
    )
    if is_plain and model is not None and len(chains) > 1:
        is_plain = not any(_pinned(model.stacks[name], plan.chain(name).runs("prefill")) for name in model.stacks)
    return "plain" if is_plain else "native"


def _uneven(plan: Plan) -> str | None:
    """Return why no config can express the widths of a plan, or None if one can."""
    try:
        if plan.widths.cuts_layers:
            common_sizes(plan)
    except PlanError as error:
        return str(error)
    return None


def export(
    model: Model,
    plan: Plan,
    out: str | Path,
    *,
    form: str = "plain",
    overwrite: bool = False,
    tokenizer: Any = None,
    card: str | None = None,
    files: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model with ``plan`` applied as a checkpoint.

    Whole layers of a model that was opened from a safetensors folder are copied from there, byte by byte, in the dtype
    that they have on disk.

    Args:
        model: the opened model; it is not changed.
        plan: a plan for it.
        out: the folder to write; it appears when it is complete, see :mod:`lamella.files`.
        form: plain, portable or native; see the table of this module.
        overwrite: replace an earlier export.
        tokenizer: tokenizer or processor to save with the weights; if None, the files of the model's own folder are
            copied.
        card: text of README.md, to which a section on the form and on loading is added.
        files: additional text files by name, such as ``evidence.json``.
        progress: called with the number of bytes written so far and in total.

    Returns:
        The folder.

    Raises:
        PlanError: if the plan is for another model, or the form cannot express it; the message names one that can.
        ExportError: if ``out`` exists or does not fit on the disk.
        CheckpointError: if the folder of the model is damaged.
    """
    plan.check_fits(model)
    if form not in get_args(Form):
        raise ExportError(f"unknown form '{form}': choose plain, portable or native")
    check_floats(model)
    if (before := getattr(model.model, "lamella_rewrite", None)) is not None:
        raise PlanError(
            f"{model.name} was rewritten by {before.name}, so no further plan can be exported: "
            "apply it to the model that it was made from, and rewrite the result"
        )
    if plan.rewrite is not None:
        if form != "native":
            raise PlanError(
                f"{form}: no config can describe a model rewritten by {plan.rewrite.name}; use --form native"
            )
        rewritten = _rewritten(model, plan)
        return _write(rewritten, plan, out, "rewritten", model, overwrite, tokenizer, card, files, progress)
    several = len(model.stacks) > 1
    inside = any(stack.architecture.config for stack in model.stacks.values())  # language model of a model with images
    has_networks = bool(plan.modules or plan.adapters)
    planned = form == "native" and (not plan.is_static or has_networks or several or inside)
    if planned and plan.width:
        raise PlanError(
            "native: this plan combines widths with parts that no config can express: export the widths first"
        )
    if several and form == "portable":
        raise PlanError("portable: a model with several stacks is exported plain or native")
    runs = {name: _whole(stack) if planned else _check_form(plan, form, stack) for name, stack in model.stacks.items()}
    altered = model if planned else alter(model, plan)
    uneven = getattr(altered.model, "lamella_counts", None) is not None
    if form != "native" and uneven:
        raise PlanError(f"{form}: no config can express the widths of {model.name}; use --form native")
    whole = not uneven and all(
        run.sublayers == stack.architecture.names for name, stack in model.stacks.items() for run in runs[name]
    )
    if whole and not several and not inside and altered.path is not None and checkpoint.is_safetensors(altered.path):
        source = _open(altered.path)
        weights = _copied(source, [run.layer for run in runs[source.stack.stack]], source.stack.config)
    else:
        weights = _built(altered, runs, form)
    note = "planned" if planned else "plain" if whole else form
    return _write(weights, plan, out, note, model, overwrite, tokenizer, card, files, progress)


def _whole(stack: Stack) -> list[Run]:
    return [Run(layer, stack.architecture.names) for layer in range(len(stack))]


def export_out_of_core(
    source: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    card: str | None = None,
    files: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the plain export of a safetensors folder without loading any weights; see :func:`export`.

    Memory does not depend on the size of the checkpoint: byte ranges are copied through a fixed buffer, and narrower
    tensors row by row.

    Args:
        source: folder of the model that the plan is for.
        plan: the plan.
        out: the folder to write; it appears when it is complete.
        overwrite: replace an earlier export.
        card: text of README.md, to which a section on the form and on loading is added.
        files: additional text files by name.
        progress: called with the number of bytes written so far and in total.

    Raises:
        CheckpointError: for a checkpoint that is damaged or incomplete, before anything is written.
        PlanError: for a plan that computes weights; weights restored from another checkpoint's folder are copied from
            there.
    """
    widths = plan.widths
    computed = widths.rescale or any(heads.merge is not None for heads in widths.heads.values())
    if computed or plan.modules or plan.adapters or plan.rewrite or any(not edit.is_folder for edit in plan.weights):
        raise PlanError("this plan changes weights, and an export out of core copies them unchanged: load the model")
    opened = _open(Path(source))
    plan.check_fits(opened.stack)
    if opened.stack.architecture.config:
        raise PlanError(f"{source}: is a model of images and text: export it from memory")
    for edit in plan.weights:
        opened = replace(opened, checkpoint=_restored(opened, edit))
    architecture = opened.stack.architecture
    runs = _check_form(plan, "plain", opened.stack)
    config = opened.stack.config
    if plan.width:
        config = copy.deepcopy(config)
        if widths.cuts_layers:
            resize([config], architecture, common_sizes(plan), eps=1)
        if widths.vocab is not None:
            cut_vocabulary_of(config, widths.vocab)
        opened = replace(opened, checkpoint=_narrowed(opened, plan))
    weights = _copied(opened, [run.layer for run in runs], config)
    return _write(weights, plan, out, "plain", opened.stack, overwrite, None, card, files, progress)


def _check_form(plan: Plan, form: str, stack: Stack) -> list[Run]:
    """Return the executions of a stack's layers in the export; raises if the form cannot express the plan."""
    chain, architecture = plan.chain(stack.stack), stack.architecture
    if not plan.is_static:
        raise PlanError(
            f"{form}: this plan treats prompt and generated tokens differently, which no config can express; "
            "use --form native"
        )
    if plan.modules:
        raise PlanError(f"{form}: no config can express the network at {min(plan.modules)}; use --form native")
    if plan.adapters:
        raise PlanError(
            f"{form}: the adapter of {plan.adapters[0].name} cannot be merged into its linear layers, "
            "since no weights express what it computes; use --form native, or run the model with the plan"
        )
    runs = list(chain.runs("prefill"))
    partial = [run for run in runs if run.sublayers != architecture.names]
    if form == "plain" and partial:
        gone = next(name for name in architecture.names if name not in partial[0].sublayers)
        forms = "native" if stack.prefix else "portable or native"
        raise PlanError(
            f"plain: no config can express that {stack.prefix}layers.{partial[0].layer} lacks its {gone} sublayer; "
            f"use --form {forms}"
        )
    uneven = _uneven(plan)
    if form != "native" and uneven is not None:
        raise PlanError(f"{form}: {uneven}; use --form native")
    if form == "portable" and partial and not all(_can_be_silent(stack, run) for run in partial):
        raise PlanError(
            f"portable: this {architecture.name} has norms after its sublayers, so zeroing does not silence them; "
            "use --form native"
        )
    moved = any(run.layer != index for index, run in enumerate(runs))
    if moved and getattr(stack.config, "scale_attn_by_inverse_layer_idx", False):
        raise PlanError(
            "this model scales attention by the layer's index (scale_attn_by_inverse_layer_idx), so layers change "
            "when they move; drop the last layers only"
        )
    if reason := _pinned(stack, runs):
        raise PlanError(f"{form}: {reason}; use --form native")
    return runs


def _can_be_silent(stack: Stack, run: Run) -> bool:
    if not stack.architecture.sources:
        return stack.architecture.silent_when_zeroed(stack.config)
    return all(silencers(stack, run.layer, name) for name in stack.architecture.names if name not in run.sublayers)


def _pinned(stack: Stack, runs: Sequence[Run]) -> str | None:
    """Return why a layer that is removed must stay in a plain checkpoint; None if all can be removed."""
    if stack.architecture.irremovable is None:
        return f"nothing of its {stack.stack} would be left" if stack.prefix and not runs else None
    kept = {run.layer for run in runs}
    for layer, reason in stack.architecture.irremovable(stack.model.config, len(stack)).items():
        if layer not in kept:
            return f"{stack.prefix}layers.{layer} {reason}, so it must stay"
    return None


@torch.no_grad()
def _check_padding(model: Model, embedding_of: Callable[[int], torch.Tensor]) -> None:
    """Check that the embedding of the padding token is loaded as it is written; some classes load zeros there.

    Their ``_init_weights`` fills it even where weights have been loaded: Youtu's, in transformers 5.24.

    Args:
        model: the model.
        embedding_of: returns the embedding of a token as it is to be written.

    Raises:
        ExportError: if it would be loaded as zeros but has other values.
    """
    whole: Any = model.model
    token = getattr(whole.get_input_embeddings(), "padding_idx", None)
    if token is None:
        return
    loaded: Any = nn.Embedding(1, 1, padding_idx=0)
    loaded.weight.fill_(1)
    loaded.weight._is_hf_initialized = True  # as transformers marks loaded parameters
    whole._init_weights(loaded)
    if not loaded.weight.any() and embedding_of(token).any():
        raise ExportError(
            f"a {type(whole).__name__} is loaded with zeros as the embedding of its padding token {token}, but "
            f"{model.name} has other values there: set that row of the embedding to zero first"
        )


# Whole layers, from disk to disk.


@dataclass(frozen=True)
class _Source:
    """A checkpoint on disk.

    Attributes:
        checkpoint: its tensors.
        stack: its model without weights.
        prefix: prefix of the layers' names in its files.
    """

    checkpoint: Checkpoint
    stack: Stack
    prefix: str

    def embedding_of(self, token: int) -> torch.Tensor:
        """Return the embedding of a token as it is stored [hidden]."""
        name = f"{self.stack.architecture.base}.{self.stack.architecture.embedding}.weight".removeprefix(".")
        # Checkpoints saved without the head have a shorter name for it.
        [stored] = [each for each in self.checkpoint.tensors if f".{name}".endswith(f".{each.name}")]
        with safe_open(stored.file, "pt") as file:
            return file.get_slice(stored.name)[token]


def _open(folder: Path) -> _Source:
    """Read the headers of a checkpoint and check that it is complete.

    Raises:
        CheckpointError: if it is not.
    """
    tensors = checkpoint.read(folder)
    settings = checkpoint.read_json(folder / "config.json")
    if "model_type" not in settings:
        raise CheckpointError(f"{folder / 'config.json'}: has no model_type, so it is damaged; get it again")
    if settings["model_type"] not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"unknown architecture '{settings['model_type']}': this version of transformers does not know it"
        )
    if settings["model_type"] in ASSEMBLIES and not settings.get("is_decoder"):
        raise CheckpointError(f"{folder}: has several stacks: export it from memory")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: is damaged ({' '.join(str(error).split())[:200]}); get it again"
        ) from error
    auto = getattr(transformers, auto_class(config))
    with torch.device("meta"):
        model = auto.from_config(config)
    stack = Stack(model, folder)
    prefix, layers = tensors.layers(stack.architecture.prefix, len(stack))
    _check_complete(tensors, stack, layers)
    return _Source(tensors, stack, prefix)


def _check_complete(tensors: Checkpoint, stack: Stack, layers: list[dict[str, checkpoint.Range]]) -> None:
    """Check that layers with the same parameters in memory have the same tensors on disk, and that none is missing."""
    first: dict[Any, int] = {}
    for index, layer in enumerate(stack.layers):
        kind = tuple((name, tensor.shape) for name, tensor in layer.named_parameters())
        example = layers[first.setdefault(kind, index)]
        wrong = sorted({(n, t.shape) for n, t in example.items()} ^ {(n, t.shape) for n, t in layers[index].items()})
        if wrong:
            raise CheckpointError(
                f"{tensors.folder}: layers {first[kind]} and {index} should have the same tensors, but differ in "
                f"{wrong[0][0]}; get it again"
            )
    if getattr(stack.config, "quantization_config", None):
        return  # packed tensors have shapes of their own
    in_layers = {tensor.name for layer in layers for tensor in layer.values()}
    found = Counter(tensor.shape for tensor in tensors.tensors if tensor.name not in in_layers)
    for name, parameter in stack.model.named_parameters():
        if not name.startswith(stack.architecture.prefix):
            found[tuple(parameter.shape)] -= 1
            if found[tuple(parameter.shape)] < 0:
                raise CheckpointError(
                    f"{tensors.folder}: lacks a tensor such as {name}; give the folder of the whole model"
                )


def _restored(source: _Source, edit: WeightEdit) -> Checkpoint:
    """Return the checkpoint with the tensors of another one at some sites."""
    theirs = {tensor.name: tensor for tensor in restored_ranges(source.stack, edit)}
    tensors = []
    for ours in source.checkpoint.tensors:
        other = theirs.pop(ours.name, ours)
        if (other.dtype, other.shape) != (ours.dtype, ours.shape):
            raise CheckpointError(
                f"{other.file}: {other.name} is {other.dtype} {list(other.shape)}, but {ours.dtype} "
                f"{list(ours.shape)} in {source.checkpoint.folder}: export it from memory"
            )
        tensors.append(other)
    if theirs:
        raise CheckpointError(f"{source.checkpoint.folder}: has no tensor {min(theirs)}: export it from memory")
    return Checkpoint(source.checkpoint.folder, tuple(tensors))


def _narrowed(source: _Source, plan: Plan) -> Checkpoint:
    """Return the checkpoint with the entries that a width plan keeps of each tensor."""
    stack, folder = source.stack, source.checkpoint.folder
    if getattr(stack.config, "quantization_config", None):
        raise ExportError(f"{folder}: is quantised, and packed tensors cannot be narrowed; export it from memory")
    architecture, widths = stack.architecture, plan.widths
    wiring = architecture.wiring if widths.cuts_layers else None
    kept = kept_entries(stack.model, stack.layers, wiring, widths)
    keep = {}
    for name, dims in kept.items():
        inside = name.startswith(architecture.prefix)
        keep[source.prefix + name.removeprefix(architecture.prefix) if inside else name] = tuple(
            None if entries is None else entries.numpy() for entries in dims
        )
    named = {tensor.name for tensor in source.checkpoint.tensors}
    for name in set(keep) - named:  # checkpoints saved without the head have shorter names for the rest
        keep[name.removeprefix(f"{architecture.base}.")] = keep.pop(name)
    return Checkpoint(folder, tuple(replace(each, keep=keep.get(each.name, ())) for each in source.checkpoint.tensors))


def _copied(source: _Source, order: Sequence[int], config: Any) -> Weights:
    """Return the weights of a checkpoint's layers in another order; the config has all other changes already."""
    if list(order) != list(range(len(source.stack))):
        quantization = json.dumps(getattr(config, "quantization_config", None), default=str)
        if re.search(r"\.\d+\b", quantization):
            raise ExportError(
                f"{source.checkpoint.folder}: its quantization_config names single layers, which cannot be re-indexed"
            )
        narrower, config = config is not source.stack.config, reindex(config, order, source.stack.architecture)
        if not narrower:
            with torch.device("meta"):
                check_alike(type(source.stack.model)(copy.deepcopy(config)), source.stack, order)
    _check_padding(source.stack, source.embedding_of)
    tensors = source.checkpoint.reordered(source.prefix, order)

    def write(folder: Path, progress: Progress | None) -> None:
        config.save_pretrained(folder)
        checkpoint.write(tensors, folder, progress)

    return Weights(sum(tensor.kept_size for tensor in tensors), write)


# From memory: sublayers zeroed (portable) or removed (native).


def _built(model: Model, runs: Mapping[str, Sequence[Run]], form: str) -> Weights:
    name, stack = next(iter(model.stacks.items()))
    partial = any(run.sublayers != stack.architecture.names for run in runs[name])
    uneven = getattr(model.model, "lamella_counts", None) is not None
    file = native.modelling_file(model.model) if (partial or uneven) and form == "native" else None
    if file is None:
        whole: Any = model.model
        _check_padding(model, lambda token: whole.get_input_embeddings().weight[token])
    elif stack.architecture.sources:
        native.check_buffers(model.model, stack.layers)
    built = _assemble(model, runs, zero=form == "portable")
    counts = getattr(built, "lamella_counts", None)
    kept = [run.sublayers for run in runs[name]]
    architecture = stack.architecture
    if file is not None:
        layers = built.get_submodule(architecture.prefix.removesuffix("."))
        native.remove_sublayers(layers, kept, {each.name: each.modules for each in architecture.sublayers})
    size = sum(tensor.numel() * tensor.element_size() for tensor in built.parameters())

    def write(folder: Path, progress: Progress | None) -> None:
        # transformers converts layouts for its own classes only, so native weights keep the layout that they have in
        # memory.
        built.save_pretrained(folder, max_shard_size=checkpoint.SHARD_SIZE, save_original_format=file is None)
        if file is not None:
            (folder / f"{native.MODULE}.py").write_text(file, encoding="utf-8")
            _extend_config(folder, native.config_entries(model.model, architecture.auto, kept, counts))
        if progress is not None:
            progress(size, size)

    return Weights(size, write)


def _rewritten(model: Model, plan: Plan) -> Weights:
    """Return the weights of a rewritten model, with its modelling file."""
    assert plan.rewrite is not None
    reference = plan.rewrite
    built: Any = alter(model, plan).model
    file = native.rewritten_file(model.model, reference)
    size = sum(tensor.numel() * tensor.element_size() for tensor in built.parameters())

    def write(folder: Path, progress: Progress | None) -> None:
        built.save_pretrained(folder, max_shard_size=checkpoint.SHARD_SIZE, save_original_format=False)
        (folder / f"{native.MODULE}.py").write_text(file, encoding="utf-8")
        _extend_config(folder, native.rewritten_entries(model.model, auto_class(model.model.config), reference))
        if progress is not None:
            progress(size, size)

    return Weights(size, write)


def _assemble(model: Model, runs: Mapping[str, Sequence[Run]], zero: bool) -> Any:
    """Return a model that consists of these executions of each stack's layers and shares the original's tensors.

    Args:
        model: the original.
        runs: executions by stack.
        zero: set the output projections of the sublayers that do not run to zero.
    """
    config = model.model.config
    for name, stack in model.stacks.items():
        config = _reindexed(config, stack, [run.layer for run in runs[name]])
    config.__dict__.pop("quantization_config", None)  # the tensors in memory are not quantised
    with torch.device("meta"):
        built: Any = type(model.model)(config)
    counts = getattr(model.model, "lamella_counts", None)
    if (
        getattr(model.model, "lamella_heads", None) is None
    ):  # the modules of narrowed layers do not all record their new sizes
        for name, stack in model.stacks.items():
            check_alike(built, stack, [run.layer for run in runs[name]])
    if counts is not None:
        [(name, stack)] = model.stacks.items()
        built.lamella_counts = reorder(counts, [run.layer for run in runs[name]])
        layers = built.get_submodule(stack.architecture.prefix.removesuffix("."))
        cut_model(built, layers, stack.architecture.wiring, Widths.of_counts(built.lamella_counts))
    prefixes = tuple(stack.architecture.prefix for stack in model.stacks.values())
    state = {name: tensor for name, tensor in model.model.state_dict().items() if not name.startswith(prefixes)}
    for name, stack in model.stacks.items():
        state |= _layers(stack, runs[name], zero)
    built.load_state_dict(state, assign=True)
    built.tie_weights()
    built.generation_config = getattr(model.model, "generation_config", None)
    return built


def _reindexed(config: Any, stack: Stack, order: Sequence[int]) -> Any:
    """Return a copy of a model's config with these layers of one stack."""
    architecture, new = stack.architecture, copy.deepcopy(config)
    if list(order) == list(range(len(stack))):
        return new
    if not architecture.config:
        return reindex(config, order, architecture)
    setattr(new, architecture.config, reindex(getattr(config, architecture.config), order, architecture))
    return new


def _layers(stack: Stack, runs: Sequence[Run], zero: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of one stack's layers for these executions."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for index, run in enumerate(runs):
        silenced = _silenced(stack, run) if zero else frozenset()
        for name, tensor in stack.layers[run.layer].state_dict().items():
            silent = name in silenced
            again = run.layer in seen  # a file cannot hold one tensor under two names
            state[f"{stack.architecture.prefix}{index}.{name}"] = (
                torch.zeros_like(tensor) if silent else tensor.clone() if again else tensor
            )
        seen.add(run.layer)
    return state


def _silenced(stack: Stack, run: Run) -> frozenset[str]:
    """Return the tensors of a layer that are zero in a portable export.

    They are the output projections of the sublayers that do not run.
    """
    gone = [name for name in stack.architecture.names if name not in run.sublayers]
    if stack.architecture.sources:
        return frozenset().union(*(silencers(stack, run.layer, name) for name in gone))
    paths = [stack.architecture[name].out for name in gone]
    paths += [path.replace(".experts", "") for path in paths]  # dense layers of a model with experts
    return frozenset(name for path in paths for name in (path, f"{path}.weight", f"{path}.bias"))


# The folder around the weights.


def _write(
    weights: Weights,
    plan: Plan,
    out: str | Path,
    note: str,
    model: Model,
    overwrite: bool,
    tokenizer: Any,
    card: str | None,
    files: dict[str, str] | None,
    progress: Progress | None,
) -> Path:
    files, source = files or {}, model.path
    for name in files:
        if name in _OWN_FILES or Path(name).name != name:
            raise ExportError(f"a file in an export cannot be named '{name}': choose another plain file name")
    out = Path(out)
    with new_folder(out, size=weights.size, overwrite=overwrite, source=source) as folder:
        if source is not None:
            _copy_companions(source, folder, plan.vocab)
        with tracker(f"writing {out.name}"):
            weights.write(folder, progress)
        settings = json.loads((folder / "config.json").read_bytes())
        _extend_config(folder, with_older_names(settings, model.model.config))
        if note == "planned":
            _extend_config(folder, {"lamella": {"form": "native", "plan": "plan.json"}})
            plan = _bound(plan, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if plan.vocab is not None:
            cut_files(folder, plan.vocab)
        plan.write(folder / "plan.json")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_readme(card, plan, note, model), encoding="utf-8")
    return out


def _bound(plan: Plan, folder: Path) -> Plan:
    """Return the plan bound to the weights in its folder, whose dtype is that of the model in memory."""
    if plan.model.weights is None:
        return plan
    return plan.model_copy(update={"model": plan.model.model_copy(update={"weights": digest_of_files(folder)})})


def _copy_companions(source: Path, folder: Path, vocab: Sequence[int] | None) -> None:
    """Copy tokenizer, generation settings and licence files unchanged, except for the ids of tokens in the settings."""
    for path in sorted({path for pattern in _COMPANIONS for path in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    generation = folder / "generation_config.json"
    if vocab is not None and generation.is_file():
        settings = checkpoint.read_json(generation)
        generation.write_text(json.dumps(settings | rename_tokens(settings, vocab), indent=2) + "\n", encoding="utf-8")


def _extend_config(folder: Path, entries: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | entries, indent=2) + "\n", encoding="utf-8")


def _readme(card: str | None, plan: Plan, note: str, model: Model) -> str:
    auto = auto_class(model.model.config)
    if note == "planned" or (note not in ("native", "rewritten") and native.is_own(model.model)):
        code = 'import lamella\n\nmodel = lamella.load("FOLDER").model'
    else:
        options = ", trust_remote_code=True" if note in ("native", "rewritten") else ""
        loaders = {"text": "AutoTokenizer", "vision": "AutoImageProcessor"}
        loader = loaders.get("".join(model.stacks), "AutoProcessor")
        code = f"from transformers import {auto}, {loader}\n\n"
        code += f'model = {auto}.from_pretrained("FOLDER"{options})\n'
        code += (
            f'{"tokenizer" if loader == "AutoTokenizer" else "processor"} = {loader}.from_pretrained("FOLDER"{options})'
        )
    return f"{(card or _default_card(plan)).rstrip()}\n\n## Loading\n\n{NOTES[note]}\n\n```python\n{code}\n```\n"


def _default_card(plan: Plan) -> str:
    chains = [plan.chain(stack) for stack in plan.model.stacks]
    name = plan.model.name or " and ".join(chain.stack.family for chain in chains)
    masked = f" {plan.masked} of its weights are zero, which alone does not make it faster." if plan.masked else ""
    return (
        f"# {name}, cut by Lamella\n\n{plan.effect[:1].upper()}{plan.effect[1:]}; `plan.json` has the details.{masked}"
    )
