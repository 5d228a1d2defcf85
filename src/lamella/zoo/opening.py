"""Opening a model: from memory, a folder, a zoo name or the hub."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from lamella.errors import ArchitectureError, CheckpointError, DownloadError
from lamella.plan import Plan
from lamella.processes import local_rank
from lamella.runtime import apply
from lamella.stack import Stack, find_family
from lamella.zoo.pull import ZOO, resolve

PLAN_FILE = "plan.json"
NATIVE_KEY = "lamella"  # what marks the config.json of a native export
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.pkl")


def open_stack(
    model: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Stack:
    """Open a model as a stack.

    Args:
        model: a transformers model in memory, a checkpoint folder, a zoo name, or a hub id.
        dtype: of the weights; as stored when left out, but float32 on the CPU for half-precision checkpoints.
        device: where to put it; the first accelerator when there is one, or that of this process among several.
        allow_pickle: also open pickle checkpoints, which can run code of their author.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        CheckpointError: for a folder that is missing, damaged, incomplete or unsafe.
        ArchitectureError: for an architecture that the family table does not know.
        DownloadError: for a hub id or zoo name that cannot be fetched.
    """
    if isinstance(model, Stack):
        return model
    if not isinstance(model, str | Path):
        return Stack(model)
    place = resolve(model)
    name = str(model) if str(model) in ZOO else Path(place).name
    if isinstance(place, Path):
        check_folder(place, allow_pickle)
    config = _load(AutoConfig, place, trust_remote_code=trust_remote_code)
    family = find_family(config)
    device = device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        stored = getattr(config, "dtype", None) or torch.float32
        dtype = torch.float32 if device == "cpu" else stored
    auto = AutoModelForCausalLM if family.causal else AutoModelForImageClassification
    options = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": None if allow_pickle else True,
    }
    loaded, report = _load(auto, place, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        # Transformers would go on with random numbers in their place.
        raise CheckpointError(f"{place} lacks {len(missing)} tensors, such as {missing[0]}: fetch the checkpoint again")
    loaded = loaded.eval().to(device)
    if isinstance(place, str):
        return Stack(loaded, _snapshot(place), name)
    return Stack(loaded, place, name)


def load(folder: str | Path, **options: Any) -> Stack:
    """Open what Lamella exported, or any checkpoint, ready to run.

    A folder with a plan that no plain checkpoint can express, such as one that skips layers while generating, is
    opened with the plan applied; every other folder is opened as it is.

    Args:
        folder: an exported folder, or anything that :func:`open_stack` takes.
        options: passed on to :func:`open_stack`.
    """
    place = resolve(folder)
    if not isinstance(place, Path) or not is_native(place):
        return open_stack(folder, **options)
    plan = Plan.read(place / PLAN_FILE)
    if plan.is_static:  # the weights already say what the plan says
        return open_stack(folder, trust_remote_code=True, **options)
    stack = open_stack(folder, **options)
    return Stack(apply(stack, plan), stack.path, stack.name)


def open_tokenizer(model: str | Path) -> Any:
    """The tokenizer that belongs to a folder, zoo name or hub id."""
    place = resolve(model)
    return _load(AutoTokenizer, place, trust_remote_code=isinstance(place, Path) and is_native(place))


def is_native(folder: Path) -> bool:
    """Whether a folder is a native export, whose modelling file Lamella wrote."""
    config = folder / "config.json"
    return config.is_file() and NATIVE_KEY in _read_json(config)


def chat_inputs(tokenizer: Any, messages: list[dict[str, str]], device: torch.device) -> dict[str, torch.Tensor]:
    """A conversation as model inputs: through the chat template where there is one, as plain text elsewhere."""
    text, special = chat_text(tokenizer, messages)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, bool]:
    """A conversation as text, up to where the answer begins, and whether it still lacks the special tokens."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
    return "\n".join(message["content"] for message in messages), True


def check_folder(folder: Path, allow_pickle: bool = False) -> None:
    """Check that a checkpoint folder is complete and safe, without reading its weights.

    Raises:
        CheckpointError: one line that names the file and the mend.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{folder} has no config.json: give the folder of a transformers checkpoint")
    _read_json(config)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map: the checkpoint is damaged, fetch it again")
        named = {folder / name for name in weight_map.values()}
        missing = sorted(named - set(files))
        if missing:
            raise CheckpointError(
                f"{folder} lacks {missing[0].name} of {len(named)} shards: fetch the checkpoint again"
            )
    if not files:
        pickles = [file for pattern in _PICKLES for file in folder.glob(pattern)]
        if pickles and not allow_pickle:
            raise CheckpointError(
                f"{folder} has only pickled weights ({pickles[0].name}), which can run code: convert them to "
                "safetensors, or add --allow-pickle if you trust their author"
            )
        if not pickles:
            raise CheckpointError(f"{folder} has no weights (*.safetensors): the checkpoint is incomplete")
    for file in files:
        _check_safetensors(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no JSON object: the checkpoint is damaged, fetch it again")
    return content


def _check_safetensors(file: Path) -> None:
    """Compare a file's length with what its header promises."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            if length > size - 8:
                raise ValueError
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{file} has no valid safetensors header: the file is damaged, fetch it again"
            ) from None
    if 8 + length + end != size:
        raise CheckpointError(
            f"{file} is {size} bytes, its header says {8 + length + end}: half-written, fetch it again"
        )


def _load(auto: Any, place: Path | str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(place, **options)
    except (ArchitectureError, CheckpointError):
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())
        if "model type" in reason or "Unrecognized" in reason:
            raise ArchitectureError(
                f"{place}: this transformers does not know the architecture; {reason[:200]}"
            ) from error
        raise CheckpointError(f"{place}: cannot be loaded: {reason[:300]}") from error
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        if isinstance(place, Path):
            raise CheckpointError(f"{place}: cannot be loaded: {reason[:300]}") from error
        raise DownloadError(
            f"'{place}' is no folder and no zoo name ({', '.join(n for n, e in ZOO.items() if e.kind == 'model')}), "
            f"and the hub did not answer for it: check the name, the network, or give a local folder ({reason[:120]})"
        ) from error


def _snapshot(hub_id: str) -> Path | None:
    """The cached folder of a hub model, which fingerprints and out-of-core exports read."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return Path(config).parent if isinstance(config, str) else None
