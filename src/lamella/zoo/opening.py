"""Opening a model of any library: from memory, a folder, a name of the zoo or of a library, or the hub.

Nothing in a folder is executed, whatever its files ask for: models are created from the installed libraries, native
exports from Lamella's own code, and tokenizers from installed classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from lamella.errors import ArchitectureError, CheckpointError, LamellaError
from lamella.extras import require
from lamella.needs import Recorder, current_recorder, has_values, without_values
from lamella.plan import Plan, checkpoint, native
from lamella.plan.filling import check_tensors, pretrained
from lamella.plan.quantize import NEEDS, run_by_torch
from lamella.plan.tokenizer import cut_tokenizer
from lamella.processes import local_rank
from lamella.progress import tracker
from lamella.registry import Method, fitting_stack
from lamella.runtime import apply
from lamella.stack import (
    ARCHITECTURES,
    ASSEMBLIES,
    PROJECTED,
    Model,
    Stack,
    auto_class,
    digest_of_proof,
    find_architecture,
    find_architectures,
    library_of,
    prove,
)
from lamella.stack import open_model as in_memory
from lamella.zoo.cache import cache_folder
from lamella.zoo.configs import CONFIG, native_metadata, open_config, register_class
from lamella.zoo.configs import load_from as _load
from lamella.zoo.libraries import LibraryName, build_named, open_timm, parse_name
from lamella.zoo.pipelines import INDEX, Pipeline, is_pipeline, open_network, torch_dtype
from lamella.zoo.published import is_published, open_processing, open_tokens, open_weights
from lamella.zoo.pull import ZOO, resolve
from lamella.zoo.quantised import dequantisation_options, mark_dequantised

ADAPTER = "adapter_config.json"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
PRECISIONS = ("float32", "bfloat16", "float16")
MOST_LAYERS = 10_000  # of a pickled checkpoint, which is not inspected
_ENTRIES = (*ARCHITECTURES.values(), *(part for each in ASSEMBLIES.values() for part in each.stacks))
STACK_NAMES = frozenset(each.stack for each in _ENTRIES if each.stack)
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.pkl")


def open_stack(model: Any, *, stack: str | None = None, **options: Any) -> Stack:
    """Open a model and return one of its stacks.

    Args:
        model: what :func:`open_model` takes.
        stack: which one, if the model has several.
        options: passed on to :func:`open_model`.

    Raises:
        ArchitectureError: also for a model of several stacks if none is named, or for one that it does not have.
    """
    if stack is None and isinstance(model, Stack):
        return model
    opened = open_model(model, **options)
    if stack is None and isinstance(opened, Stack):
        return opened
    return Stack(opened.model, opened.path, opened.name, stack)


def open_for(method: Method, model: Any, *, stack: str | None = None, **options: Any) -> Stack:
    """Open a model and return the stack that a method works on.

    Args:
        method: a method, or a command of one.
        model: what :func:`open_model` takes.
        stack: which one; by default the only one that the method works on.
        options: passed on to :func:`open_model`.

    Raises:
        MethodError: if the method works on none of several stacks, or on more than one and none is named.
        ArchitectureError: for a stack that the model does not have.
    """
    opened = open_model(model, **options)
    if stack is not None:
        return open_stack(opened, stack=stack)
    return opened if isinstance(opened, Stack) else fitting_stack(method.slug, method.on, opened)


def open_model(
    model: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    allow_pickle: bool = False,
    prove_again: bool = False,
    weights: bool = True,
    libraries: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Model:
    """Open a model of any library, a transformers model with its named stacks, or as its stack if there is only one.

    An architecture without an entry in the table is derived from its class, and verified by a short forward pass; the
    verification is remembered in the cache folder.

    Args:
        model: a model in memory; a folder written by transformers, diffusers (a network or a whole pipeline) or timm; a
            zoo name or a hub id of transformers; or ``timm:NAME`` or ``torchvision:NAME``, with random weights or, as
            ``timm:NAME@FILE.safetensors``, those of a file.
        dtype: of the weights; ``auto`` as they are stored. By default the preference set by :func:`prefer`, or else as
            stored, but float32 on the CPU for half-precision checkpoints that fit its memory twice. For an int8 model,
            the dtype of the activations. Models of timm and torchvision are in float32 by default.
        device: the device; by default the preference set by :func:`prefer`, or else the first accelerator if there is
            one, or that of this process among several.
        allow_pickle: also open pickle checkpoints of transformers, which can run their author's code.
        prove_again: verify a derived architecture even if an earlier verification is remembered; also set by
            :func:`prefer`.
        weights: whether the weights are loaded. Without, a transformers model in a folder whose tensors have the names
            of its parameters is created on the meta device; :func:`lamella.plan.filling.load_some` loads some of its
            weights. Other models are opened with their weights nevertheless.
        libraries: allowed libraries; any by default.
        classes: names of the allowed classes of a diffusers network; any by default. If transformers'
            ``CLIPVisionModelWithProjection`` is among them, CLIP is opened as its vision tower with the projection.

    Raises:
        CheckpointError: for a folder that is missing, damaged, incomplete or unsafe, or a model of another library.
        ArchitectureError: for an architecture that has no entry and cannot be derived or verified, or that comes with
            its own code.
        DownloadError: for a hub id or zoo name that cannot be fetched.
        LamellaError: for a model of a library that is not installed.
    """
    recorder = current_recorder()
    how: dict[str, Any] = {"dtype": dtype, "device": device, "allow_pickle": allow_pickle, "prove_again": prove_again}
    opened = _opened(model, weights and recorder is None, libraries, classes, **how)
    return opened if recorder is None else remove_values(opened, recorder)


def remove_values(opened: Model, recorder: Recorder) -> Model:
    """Return a model with its weights replaced by tensors without values, whose memory is counted.

    Args:
        opened: the model; the parts of a pipeline are replaced when they are opened.
        recorder: what counts.
    """
    if not isinstance(opened.model, torch.nn.Module) or not any(map(has_values, opened.model.parameters())):
        return opened
    empty = without_values(opened.model)
    recorder.open(empty)
    return in_memory(empty, opened.path, opened.name)


def _opened(
    model: Any,
    weights: bool,
    libraries: Sequence[str],
    classes: Sequence[str],
    *,
    dtype: torch.dtype | str | None,
    device: str | None,
    allow_pickle: bool,
    prove_again: bool,
) -> Model:
    """Open a model; see :func:`open_model`."""
    if not isinstance(model, str | Path):
        opened = model if isinstance(model, Model) else _from_memory(model, prove_again)
        _check_library(opened.library, libraries, opened.name)
        return opened
    if str(model) in STACK_NAMES and not Path(model).exists():
        raise ArchitectureError(
            f"'{model}' is the name of a stack, not of a model: give a model, and choose the stack with --stack "
            f"{model} (of_stack in Python)"
        )
    named = parse_name(model)
    if named is not None:
        _check_library(named.library, libraries, model)
        return _from_library(named, dtype, device, classes)
    if libraries and "transformers" not in libraries and not Path(model).expanduser().is_dir():
        raise CheckpointError(f"there is no folder {model}")
    place = resolve(model)
    library = library_in(place)
    _check_library(library, libraries, model)
    if isinstance(place, Path) and library != "transformers":
        return _from_library(place, dtype, device, classes)
    name = str(model) if str(model) in ZOO else Path(place).name
    metadata = None
    if isinstance(place, Path):
        check_folder(place, allow_pickle)
        metadata = native_metadata(place)
    config = open_config(place)
    is_clip = config.model_type == "clip"  # with a tower for images and one for texts
    is_projected = PROJECTED in classes and (is_clip or PROJECTED in (getattr(config, "architectures", None) or ()))
    config = config.vision_config if is_clip and is_projected else config
    if isinstance(place, Path):
        _check_layers(place, config)
    auto = PROJECTED if is_projected else auto_class(config)
    opener = getattr(transformers, auto)
    preferred = preference()
    device = device or default_device()
    integers = _is_int8(config)
    if integers:
        require("torchao", *NEEDS)
    dtype = dtype or preferred.dtype
    if dtype is None:
        stored = getattr(config, "dtype", None) or torch.float32
        dtype = torch.float32 if device == "cpu" and not integers and not _too_large(place, stored) else stored
    if metadata is not None and metadata.is_own_class:
        opener = native.native_class(config.model_type, auto)
    dequantise = dequantisation_options(config, place)
    if not weights and isinstance(place, Path) and metadata is None and not integers and not dequantise:
        empty = without_weights(opener, config, place, dtype)
        found = None if empty is None else in_memory(empty, place, name)
        if found is not None and not any(each.sources for each in found.architectures.values()):
            return found  # a derived architecture is verified with its weights
    options = {"dtype": dtype, "use_safetensors": None if allow_pickle else True, "config": config} | dequantise
    with tracker(f"opening {name}"):
        if is_published(place):
            loaded = _load(open_weights, place, config=config, dtype=dtype)
        else:
            loaded = _load(partial(pretrained, opener), place, **options)
    loaded = mark_dequantised(loaded) if dequantise else loaded
    loaded = loaded.eval().to(device)
    loaded = run_by_torch(loaded) if integers else loaded
    opened = in_memory(loaded, _snapshot(place) if isinstance(place, str) else place, name)
    return _proved(opened, prove_again or integers)


def without_weights(opener: Any, config: Any, folder: Path, dtype: Any) -> Any:
    """Create a model with parameters on the meta device; None if the tensors in its folder have other names or shapes.

    Args:
        opener: model class of transformers, or an auto class.
        config: config of the model.
        folder: folder of the checkpoint.
        dtype: of the weights.
    """
    if not checkpoint.is_safetensors(folder):
        return None
    with init_empty_weights():  # buffers are computed
        model = opener.from_config(config, dtype=dtype).eval()
    model.tie_weights()
    try:
        check_tensors(model, {each.name: each.shape for each in checkpoint.read(folder).tensors}, folder)
    except CheckpointError:
        return None
    return model


def library_in(place: Path | str) -> str:
    """Return the library of the model in a folder; transformers for a hub id.

    Raises:
        CheckpointError: for a config that is damaged.
    """
    if not isinstance(place, Path):
        return "transformers"
    if is_pipeline(place):
        return "diffusers"
    config = checkpoint.read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    if "model_type" in config:
        return "transformers"
    return "diffusers" if "_class_name" in config else "timm" if "architecture" in config else "transformers"


def _check_library(library: str, allowed: Sequence[str], model: str | Path) -> None:
    if not allowed or library in allowed:
        return
    if Path(model).is_dir() and not (Path(model) / CONFIG).is_file() and not is_pipeline(Path(model)):
        raise CheckpointError(f"{model} has no {CONFIG} or {INDEX}")
    raise CheckpointError(f"{model} is a model of {library}, where one of {' or '.join(allowed)} is needed")


def _from_memory(model: Any, prove_again: bool) -> Model:
    if library_of(model) == "diffusers" and not isinstance(model, torch.nn.Module):
        return Pipeline(model)
    opened = in_memory(model)
    return _proved(opened, prove_again) if opened.architectures else opened


def _from_library(
    place: LibraryName | Path, dtype: torch.dtype | str | None, device: str | None, classes: Sequence[str]
) -> Model:
    """Return a model of a library other than transformers, by its name or from its folder."""
    dtype, device = dtype or preference().dtype, device or default_device()
    name = place.name
    if isinstance(place, LibraryName) or library_in(place) == "timm":
        with tracker(f"opening {name}"):
            module = build_named(place) if isinstance(place, LibraryName) else open_timm(place)
        module = module if dtype in (None, "auto") else module.to(torch_dtype(dtype))
        return Model(module.to(device), place if isinstance(place, Path) else None, name)
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    if is_pipeline(place):
        return Pipeline(path=place, device=device, dtype=dtype)
    with tracker(f"opening {name}"):
        return Model(open_network(place, classes, dtype, device), place)


def _proved(opened: Model, again: bool) -> Model:
    """Return the model after verifying derived architectures, now or earlier.

    Raises:
        ArchitectureError: if the verification fails.
    """
    for stack in opened.stacks.values():
        # Reduced or altered models were verified before the change.
        is_made = hasattr(stack.model, "lamella_dropped") or stack.is_altered
        if not stack.architecture.sources or is_made or stack.device.type == "meta":
            continue
        known = cache_folder() / "proofs" / digest_of_proof(stack)
        if again or preference().prove_again or not known.is_file():
            prove(stack)
            with suppress(OSError):  # without a writable cache, verification is repeated each time
                known.parent.mkdir(parents=True, exist_ok=True)
                known.touch()
    return opened


def computes_well(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Return whether a device multiplies faster in a precision than in float32, with dedicated hardware units.

    Args:
        dtype: the precision.
        device: the device; a CPU is always this machine's.
    """
    if dtype == torch.float32:
        return True
    if torch.device(device).type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.9
    return dtype == torch.bfloat16 and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class Preference:
    """Default options for opening models."""

    dtype: torch.dtype | None = None
    device: str | None = None
    prove_again: bool = False


NO_PREFERENCE = Preference()
_preferred: ContextVar[Preference] = ContextVar("preferred", default=NO_PREFERENCE)


def preference() -> Preference:
    """Return the preference set by the last call of :func:`prefer`."""
    return _preferred.get()


def prefer(dtype: str | None = None, device: str | None = None, prove_again: bool = False) -> None:
    """Set the default options for opening models in this process.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: such as ``cpu`` or ``cuda:1``.
        prove_again: verify derived architectures even if a verification is remembered.

    Raises:
        LamellaError: for another precision, or a device that this machine does not have.
    """
    if dtype is not None and dtype not in PRECISIONS:
        raise LamellaError(f"unknown dtype '{dtype}': choose one of {', '.join(PRECISIONS)}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise LamellaError(f"no device '{device}' here: {str(error).splitlines()[0]}") from None
    _preferred.set(Preference(None if dtype is None else getattr(torch, dtype), device, prove_again))


def default_device() -> str:
    """Return the default device: the preference of :func:`prefer`, else this process's accelerator, else the CPU."""
    return preference().device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")


def _too_large(place: Path | str, stored: torch.dtype) -> bool:
    """Return whether a checkpoint would take more than half of the memory in float32, and can be opened otherwise."""
    if not isinstance(place, Path) or not computes_well(stored, "cpu"):
        return False
    size = sum(file.stat().st_size for file in place.glob("*.safetensors")) * 4 / stored.itemsize
    return size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


@dataclass(frozen=True)
class SavedModel:
    """A model from a folder, with the folder's plan.

    Attributes:
        whole: the model without the plan.
        plan: a plan that a plain checkpoint cannot express; None if there is none.
    """

    whole: Model
    plan: Plan | None = None

    @cached_property
    def running(self) -> Model:
        """The model with its plan applied."""
        if self.plan is None:
            return self.whole
        return in_memory(apply(self.whole, self.plan), self.whole.path, self.whole.name)

    def describe(self) -> dict[str, Any]:
        """Return its description for provenance."""
        return self.whole.describe()

    def view(self, changed: str | Path) -> Any:
        """Return a model to compare with this one: a plan, applied to the whole of it, or any other model."""
        if names_plan(changed):
            return apply(self.whole, Plan.read(changed))
        return load(changed).model


def names_plan(name: str | Path) -> bool:
    """Return whether a name is that of a plan: a file, or a folder with a plan and without a model."""
    path = Path(name).expanduser()
    return str(name).endswith(".json") or ((path / "plan.json").is_file() and not (path / CONFIG).is_file())


def open_saved(folder: str | Path, **options: Any) -> SavedModel:
    """Open a folder exported by Lamella, or any checkpoint, with the folder's plan; see :func:`load`.

    Args:
        folder: an exported folder, or anything that :func:`open_model` takes.
        options: passed on to :func:`open_model`.
    """
    place = folder if parse_name(folder) is not None else resolve(folder)
    metadata = native_metadata(place) if isinstance(place, Path) and (place / CONFIG).is_file() else None
    opened = open_model(folder, **options)
    if metadata is None or metadata.plan is None:
        return SavedModel(opened)
    assert isinstance(place, Path)
    return SavedModel(opened, Plan.read(place / metadata.plan))


def load(folder: str | Path, **options: Any) -> Model:
    """Open a folder exported by Lamella, or any checkpoint, ready to run.

    A folder with a plan that a plain checkpoint cannot express, such as skipping layers during generation, is opened
    with the plan applied; every other folder is opened as it is.

    Args:
        folder: an exported folder, or anything that :func:`open_model` takes.
        options: passed on to :func:`open_model`.
    """
    return open_saved(folder, **options).running


def open_tokenizer(model: str | Path) -> Any:
    """Return the tokenizer of a folder, zoo name or hub id."""
    place = resolve(model)
    options = {}
    if is_published(place):
        return _load(open_tokens, place)
    if isinstance(place, Path) and (place / CONFIG).is_file():
        metadata = native_metadata(place)
        if metadata is not None and metadata.is_own_class:  # its model type is Lamella's: use the original one
            options["config"] = AutoConfig.for_model(find_architecture(open_config(place)).name)
    tokenizer = _load(AutoTokenizer.from_pretrained, place, trust_remote_code=False, **options)
    try:
        tokenizer("Some settings are only validated on first use.")
    except Exception as error:  # damaged files can cause errors of any type
        raise CheckpointError(f"{place}: its tokenizer does not work ({' '.join(str(error).split())[:200]})") from error
    return tokenizer


def tokenizer_of(changed: str | Path, original: Any) -> Any:
    """Return the tokenizer of a changed model: the original's for a folder without one, and for a plan what it keeps.

    Args:
        changed: a plan, an exported folder or any other model.
        original: tokenizer of the original.
    """
    if names_plan(changed):
        kept = Plan.read(changed).vocab
        return original if kept is None else cut_tokenizer(original, kept)
    try:
        return open_tokenizer(changed)
    except LamellaError:
        return original


def open_processor(model: str | Path) -> Any:
    """Return the processor of a model of images and text, or its tokenizer if it has no processor.

    Args:
        model: a folder, zoo name or hub id.

    Raises:
        CheckpointError: for one that is damaged.
        ArchitectureError: for one that comes with its own code.
    """
    place = resolve(model)
    if is_published(place):
        return _load(open_processing, place)
    if isinstance(place, Path) and not any((place / file).is_file() for file in PROCESSORS):
        return open_tokenizer(model)
    register_class(place)
    processor = _load(AutoProcessor.from_pretrained, place, trust_remote_code=False)
    return processor if hasattr(processor, "image_processor") else open_tokenizer(model)


def parameters_of(model: str | Path) -> int:
    """Return the number of parameters of a checkpoint, tied ones counted once, without reading its weights."""
    config = open_config(resolve(model))
    with torch.device("meta"):
        empty = getattr(transformers, auto_class(config)).from_config(config)
    return sum(each.numel() for each in empty.parameters())


def size_in_memory(model: str | Path) -> int:
    """Return the bytes of a checkpoint's weights once they are opened; 0 where they are not in a folder of safetensors.

    Args:
        model: a folder, zoo name or hub id.
    """
    place = resolve(model) if parse_name(model) is None else None
    if not isinstance(place, Path) or library_in(place) != "transformers" or not (place / CONFIG).is_file():
        return 0
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    config = open_config(place)
    stored = getattr(config, "dtype", None) or torch.float32
    kept = preference().dtype or (
        torch.float32
        if default_device() == "cpu" and not _is_int8(config) and not _too_large(place, stored)
        else stored
    )
    return int(size * kept.itemsize / stored.itemsize)


def _is_int8(config: Any) -> bool:
    """Return whether a checkpoint is in torchao's int8 format."""
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == "torchao"


def chat_inputs(tokenizer: Any, messages: list[dict[str, str]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a conversation as model inputs: with the chat template if there is one, else as plain text.

    Args:
        tokenizer: tokenizer of the model.
        messages: the conversation, each message with ``role`` and ``content``.
        device: device of the tensors.
    """
    text, special = chat_text(tokenizer, messages)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, bool]:
    """Return a conversation as text, up to the start of the answer, and whether special tokens must be added.

    Args:
        tokenizer: tokenizer of the model.
        messages: the conversation, each message with ``role`` and ``content``.
    """
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
    return "\n".join(message["content"] for message in messages), True


def _check_layers(folder: Path, config: Any) -> None:
    """Check the number of layers before they are built, since a damaged config may ask for millions.

    Raises:
        CheckpointError: if there are more of them than tensors, or none.
    """
    most = len(checkpoint.read(folder).tensors) if checkpoint.is_safetensors(folder) else MOST_LAYERS
    for architecture in find_architectures(config).values():
        part = getattr(config, architecture.config) if architecture.config else config
        layers = getattr(part, architecture.sizes["layers"], None)
        if not isinstance(layers, int) or not 0 < layers <= most:
            raise CheckpointError(
                f"{folder / CONFIG}: {layers} layers do not fit the weights in the folder: download it again"
            )


def check_folder(folder: Path, allow_pickle: bool = False) -> None:
    """Check that a checkpoint folder is complete and safe, without reading its weights.

    Args:
        folder: folder of the checkpoint.
        allow_pickle: accept pickled weights, which can run code when they are loaded.

    Raises:
        CheckpointError: a one-line message with the file and how to fix it.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no config.json: give the folder of a transformers checkpoint")
    checkpoint.read_json(folder / CONFIG)
    if (folder / ADAPTER).is_file():  # transformers would load the base model that it names, from any location
        raise CheckpointError(
            f"{folder} contains an adapter ({ADAPTER}) and a model: merge it with peft, and give the merged model"
        )
    if checkpoint.is_safetensors(folder):
        checkpoint.read(folder)
        return
    pickles = [file for pattern in _PICKLES for file in folder.glob(pattern)]
    if pickles and not allow_pickle:
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickles[0].name}), which can run code: convert them to "
            "safetensors, or add --allow-pickle if you trust their author"
        )
    if not pickles:
        raise CheckpointError(f"{folder} has no weights ({checkpoint.SINGLE}): the checkpoint is incomplete")


def _snapshot(hub_id: str) -> Path | None:
    """Return the cached folder of a hub model, for fingerprints and out-of-core exports."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return Path(config).parent if isinstance(config, str) else None
