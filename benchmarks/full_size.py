"""What methods need at the size of published models, from the shapes of these models alone.

Models are created from their published sizes without weights, and the commands run on tensors without values; see
docs/estimates.md. Memory is that of all tensors, and time is that of this machine.

    python benchmarks/full_size.py            # ten minutes of one core; resumes after an interruption
    python benchmarks/full_size.py --quick    # one row
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from lamella.data import InputContext, Samples
from lamella.files import Finished
from lamella.needs import recorder
from lamella.results import Record
from lamella.runner import needs_of
from lamella.stack import open_model
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder

LIMIT = 600.0  # seconds of a recording
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.2 1B": ("llama", LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                       "num_attention_heads": 32, "tie_word_embeddings": True}),
    "Llama 3.2 3B": ("llama", LLAMA | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                                       "num_attention_heads": 24, "tie_word_embeddings": True}),
    "Llama 3.1 8B": ("llama", LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                       "num_attention_heads": 32}),
}  # fmt: skip


def tokens(rows: int, length: int) -> torch.Tensor:
    """Return token ids of a text [rows, length]; their values do not matter."""
    return torch.randint(3, 30_000, (rows, length), generator=torch.Generator().manual_seed(0))


def samples(rows: int, length: int) -> Samples:
    """Return blocks of a text to train on, in SmolLM2's tokens."""
    context = InputContext(partial(open_tokenizer, "smollm2"))
    return Samples.open("stdlib", context, sequences=rows, length=length)


TRAINED = {"steps": 100, "batch": 1}
CASES: list[tuple[str, str, str, Callable[[], dict[str, Any]]]] = [
    ("Llama 3.2 3B", "shortgpt", "16 x 512 tokens", lambda: {"calibration": tokens(16, 512)}),
    ("Llama 3.2 3B", "finercut", "10 x 256 tokens, 10 % removed",
     lambda: {"calibration": tokens(10, 256), "share": 0.1}),
    ("Llama 3.1 8B", "shortgpt", "16 x 512 tokens", lambda: {"calibration": tokens(16, 512)}),
    ("Llama 3.2 1B", "lora", "100 steps of 1,024 tokens", lambda: {"train": samples(100, 1024), **TRAINED}),
    ("Llama 3.2 1B", "lora", "the same, checkpointed",
     lambda: {"train": samples(100, 1024), "gradient_checkpointing": True, **TRAINED}),
    ("Llama 3.2 1B", "switchlora", "100 steps of 1,024 tokens, checkpointed",
     lambda: {"train": samples(100, 1024), "gradient_checkpointing": True, **TRAINED}),
    ("Llama 3.1 8B", "lora", "100 steps of 1,024 tokens, checkpointed",
     lambda: {"train": samples(100, 1024), "gradient_checkpointing": True, **TRAINED}),
    ("Llama 3.2 3B", "depth-efficiency", "4 x 256 tokens", lambda: {"calibration": tokens(4, 256)}),
    ("Llama 3.2 1B", "kore", "100 steps of 512 tokens, covariances of 8,192 old ones",
     lambda: {"train": samples(100, 512), "old": tokens(32, 256), **TRAINED}),
]  # fmt: skip


def model(name: str) -> Any:
    """Return a model without weights, in bfloat16."""
    kind, sizes = SHAPES[name]
    with init_empty_weights():
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
    network.tie_weights()
    return open_model(network.eval(), name=name)


def needs(name: str, slug: str, given: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a command needs."""
    found = needs_of(slug, model(name), **given())
    return {"weights": found.weights, "peak": found.peak, "seconds": found.seconds, "cut": found.cut}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one row")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recorder.LIMIT = LIMIT
    suffix = "-quick" if quick else ""
    finished = Finished(cache_folder() / "benchmarks" / f"full_size{suffix}.jsonl", {})
    rows = []
    for name, slug, what, given in CASES[:1] if quick else CASES:
        found = finished.once(f"{name}, {slug}, {what}", partial(needs, name, slug, given))
        whole = "yes" if not found["cut"] else f"up to: {found['cut']}"
        sizes = [f"{found[each] / 1e9:.1f}" for each in ("weights", "peak")]
        rows.append([name, slug, what, *sizes, f"{found['seconds'] / 60:.0f}", whole])
        print(*rows[-1], flush=True)
    record = Record("full_size", "shapes of published models in bfloat16, one thread", 0)
    columns = ["model", "command", "work", "weights, GB", "all tensors, GB", "minutes", "recorded in full"]
    record.table("Needs at the size of published models", columns, rows)
    planning = max(float(row[4]) for row in rows if row[0] == "Llama 3.2 3B")
    record.check("planning a model of 3 billion parameters", "at most 24 GB", f"{planning} GB", planning <= 24)
    return record.finish(Path(__file__).parent / "results" / f"full_size{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
