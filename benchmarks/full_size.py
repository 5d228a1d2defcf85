"""What commands need at the size of published models, from the shapes of these models alone.

A checkpoint folder has the config and the tensor names of a published model, with SmolLM2's tokens, and a file of
weights without content. Every command that takes a decoder runs on it without values, with its default options; see
docs/estimates.md. Memory is that of all tensors, and time is that of this machine.

    python benchmarks/full_size.py            # twenty minutes of one core; resumes after an interruption
    python benchmarks/full_size.py --quick    # one command
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lamella.errors import LamellaError
from lamella.files import Finished
from lamella.needs import recorder
from lamella.registry import Method, all_commands
from lamella.results import Record
from lamella.runner import needs_of
from lamella.signature import EMPTY, is_stack, kind_of
from lamella.zoo import prefer
from lamella.zoo.cache import cache_folder
from lamella.zoo.pull import pull

LIMIT = 45.0  # seconds of a recording
USUAL = "Llama 3.2 1B"
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    USUAL: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "tie_word_embeddings": True},
    "Llama 3.2 3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "tie_word_embeddings": True},
    "Llama 3.1 8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32},
}  # fmt: skip
CHECKPOINTED = {"steps": 100, "batch": 1, "length": 512, "gradient_checkpointing": True}
LARGER = [  # model, command and options
    ("Llama 3.2 3B", "shortgpt", {"sequences": 16, "length": 512}),
    ("Llama 3.2 3B", "finercut", {"sequences": 10, "share": 0.1}),
    ("Llama 3.2 3B", "depth-efficiency", {}),
    ("Llama 3.1 8B", "shortgpt", {"sequences": 16, "length": 512}),
    (USUAL, "lora", {"steps": 100, "batch": 1, "length": 512}),
    (USUAL, "lora", CHECKPOINTED),
    (USUAL, "switchlora", CHECKPOINTED),
    ("Llama 3.1 8B", "lora", CHECKPOINTED),
]
PLANNING = 24  # GB in which a model of 3 billion parameters is planned


def checkpoint(name: str) -> Path:
    """Return the folder of a published model whose weights have no content, created once."""
    folder = cache_folder() / "benchmarks" / "shapes" / name.replace(" ", "-")
    if folder.exists():
        return folder
    config = AutoConfig.for_model("llama", **LLAMA | SHAPES[name], bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    with init_empty_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.tie_weights()
    header, size = header_of(network)
    folder.mkdir(parents=True)
    config.architectures = [type(network).__name__]
    config.save_pretrained(folder)
    for file in pull("smollm2").glob("*token*"):
        shutil.copy(file, folder)
    with (folder / "model.safetensors").open("wb") as weights:
        weights.write(header)
        weights.truncate(len(header) + size)
    return folder


def header_of(network: nn.Module) -> tuple[bytes, int]:
    """Return the header of a safetensors file of a network in bfloat16, and the size of its tensors in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, parameter in network.named_parameters():
        end = size + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text, size


def given(entry: Method, folder: Path) -> dict[str, Any] | None:
    """Return the inputs of a command: the model, and examples of what has no default; None if it needs more."""
    found: dict[str, Any] = {}
    for each in entry.signature.inputs.values():
        kind = kind_of(each)
        if is_stack(kind):
            found |= {each.name: folder} if not found or each.default is EMPTY else {}
        elif each.default is EMPTY and not each.source and not hasattr(kind, "default"):
            example = getattr(kind, "example", None)
            if example is None or example.content is None:
                return None
            file = Path(tempfile.mkdtemp()) / example.source
            file.write_text(example.content)
            found[each.name] = {each.name: file} if each.is_mapping else file
    return found


def needs(name: str, command: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what a command needs, or why that is not known."""
    slug, _, further = command.partition(" ")
    inputs = given(all_commands()[slug][further], checkpoint(name))
    if inputs is None:
        return {"refused": "it needs an input without an example"}
    try:
        found = needs_of(slug, command=further, **inputs, **options)
    except LamellaError as error:
        return {"refused": str(error)}
    return {"weights": found.weights, "peak": found.peak, "seconds": found.seconds, "cut": found.cut}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one command")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recorder.LIMIT = LIMIT
    prefer("bfloat16")
    suffix = "-quick" if quick else ""
    finished = Finished(cache_folder() / "benchmarks" / f"full_size{suffix}.jsonl", {"limit": LIMIT})
    every = [
        (USUAL, f"{slug} {further}".strip(), {})
        for slug, known in all_commands().items()
        for further, entry in known.items()
        if any(is_stack(kind_of(each)) for each in entry.signature.inputs.values())
        and set(("decoder", "any")) & set([entry.on] if isinstance(entry.on, str) else entry.on)
    ]
    rows, planning = [], 0.0
    for name, command, options in every[:1] if quick else [*LARGER, *every]:
        key = f"{name}, {command}, {json.dumps(options)}"
        found = finished.once(key, partial(needs, name, command, options))
        if "refused" in found:
            print(f"{command}: {found['refused'][:150]}", flush=True)
            continue
        work = ", ".join(f"{each} {value}" for each, value in options.items()) or "default options"
        sizes = [f"{found[each] / 1e9:.1f}" for each in ("weights", "peak")]
        whole = "yes" if not found["cut"] else f"up to: {found['cut']}"
        rows.append([command, name, work, *sizes, f"{found['seconds'] / 60:.0f}", whole])
        planning = max(planning, found["peak"] / 1e9 if name == "Llama 3.2 3B" else 0.0)
        print(*rows[-1], flush=True)
    record = Record("full_size", "shapes of published models in bfloat16, one thread", 0)
    columns = ["command", "model", "work", "weights, GB", "all tensors, GB", "minutes", "recorded in full"]
    record.table("Needs at the size of published models", columns, rows)
    if not quick:
        measured = f"{planning:.1f} GB as far as it was recorded"
        expected = f"at most {PLANNING} GB"
        record.check("planning a model of 3 billion parameters", expected, measured, planning <= PLANNING)
    return record.finish(Path(__file__).parent / "results" / f"full_size{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
