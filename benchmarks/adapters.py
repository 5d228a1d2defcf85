"""Adaptation methods compared on one model, one new text and the same tokens: what each learns and forgets.

`lamella compare` trains SmolLM2 on the docstrings of Python's standard library with LoRA, layra, kore, smora and
switchlora, each at the best of four learning rates, and measures the loss on two other texts. The logs record how many
tokens each method has read.

    python benchmarks/adapters.py            # about an hour on one core; resumes after an interruption
    python benchmarks/adapters.py --quick    # LoRA and layra at one rate, two steps
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

import lamella
from lamella.results import Record
from lamella.zoo.cache import cache_folder

NEW, OLD = "stdlib", ("pydoc", "general")
FULL: dict[str, Any] = {
    "method": ("lora", "layra", "kore", "smora", "switchlora"),
    "lr": (3e-4, 1e-3, 3e-3, 1e-2),
    "steps": 32,
    "batch": 4,
    "length": 64,
}
QUICK = FULL | {"method": ("lora", "layra"), "lr": (1e-3,), "steps": 2, "batch": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="LoRA and layra at one rate, two steps")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    given = QUICK if chosen.quick else FULL
    name = f"adapters{'-quick' if chosen.quick else ''}"
    out = cache_folder() / "benchmarks" / name
    compared = lamella.run("compare", "smollm2", new=NEW, old=OLD, out=out, overwrite=True, **given)
    shutil.rmtree(out)
    record = Record("adapters", f"SmolLM2-135M-Instruct, float32; {NEW} to learn, {' and '.join(OLD)} to keep", 0)
    for each in compared.summary.tables:
        record.table(each.title, list(each.columns), [list(row) for row in each.rows])
    points = compared.evidence.findings["points"]
    tokens = given["steps"] * given["batch"] * given["length"]
    read = sorted({run[-1]["tokens"] for run in points.values()})
    record.check("tokens that each method has read", str(tokens), ", ".join(map(str, read)), read == [tokens])
    before = compared.evidence.findings["before"]["new"]
    learnt = min(before - run[-1]["new"] for run in points.values())
    record.check("smallest reduction of the loss on the new text, nats", "above 0", f"{learnt:.3f}", learnt > 0)
    return record.finish(Path(__file__).parent / "results" / f"{name}.json")


if __name__ == "__main__":
    raise SystemExit(main())
