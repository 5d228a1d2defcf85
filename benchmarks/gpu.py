"""A few commands on a GPU: time, memory, and whether a part of the conformance tests passes there.

This script has not been run on a GPU yet, only with `--device cpu --quick`; see docs/estimates.md for what is known of
processors. Models have the shapes of published ones and random weights in bfloat16, as in `dry_runs.py`:

    conformance    planning methods, as their tests run them, with models on the device
    decoding       a prompt of 128 tokens and 64 more
    healing        some steps of continued training
    laptop-diff    the effect of each block of Stable Diffusion 1.5
    refacade       a step of training of a texture remover, on the built-in video transformer

    python benchmarks/gpu.py                        # minutes, on a machine with a GPU; 10 GB of disk
    python benchmarks/gpu.py --device cpu --quick   # the same on small models
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dry_runs import command, llama, stable_diffusion
from full_size import USUAL

import lamella
from lamella.needs import peak_used_memory
from lamella.results import Record
from lamella.zoo import prefer

ROOT = Path(__file__).parents[1]
TESTED = "shortgpt or finercut or void"  # methods whose conformance is tested
PROMPT, TOKENS = 128, 64


def conformance(device: str) -> bool:
    """Return whether a part of the conformance tests passes. They have no option for a device and use a visible GPU."""
    visible = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    call = [sys.executable, "-m", "pytest", "-q", "tests/conformance/test_plans.py", "-k", TESTED]
    return subprocess.run(call, cwd=ROOT, env=os.environ | visible).returncode == 0


@torch.no_grad()
def decoding(folder: Path) -> None:
    """Generate some tokens after a random prompt."""
    model: Any = lamella.open(folder).model
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT), device=model.device)
    model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)


def measured(work: Callable[[], Any], on_gpu: bool) -> tuple[float, float]:
    """Return the seconds that some work takes, and the most memory in GB: of the GPU, or of this process so far."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, (torch.cuda.max_memory_allocated() if on_gpu else peak_used_memory()) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--quick", action="store_true", help="small models")
    chosen = parser.parse_args()
    device, quick = chosen.device, chosen.quick
    prefer("bfloat16", device)
    steps, sequences = (2, 4) if quick else (20, 32)
    small, pictures = llama(USUAL, quick), stable_diffusion(quick)
    healing = {"steps": steps, "train": "pydoc", "batch": 4, "length": 32 if quick else 512, "sequences": sequences}
    blocks = {"images": "digits", "tuples": 4, "sets": 0, "draws": 0, "count": 5}
    remover = {"further": "remover", "objects": "textured", "steps": 1, "batch": 2, "count": 4}
    works = {
        "decoding": (USUAL, f"{TOKENS} tokens after {PROMPT}", lambda: decoding(small)),
        "healing": (USUAL, f"{steps} steps", command("heal", small, **healing)),
        "laptop-diff": ("Stable Diffusion 1.5", "4 samples for each block", command("laptop-diff", pictures, **blocks)),
        "refacade": ("the built-in transformer", "one step", command("refacade", "untrained", **remover)),
    }
    record = Record("gpu", f"random weights in bfloat16, on {device}", 0)
    rows = []
    for name, (model, unit, work) in works.items():
        seconds, memory = measured(work, device != "cpu")
        rows.append([name, "a small model" if quick else model, unit, f"{seconds:.1f}", f"{memory:.1f}"])
        print(*rows[-1], flush=True)
    record.table(f"On {device}", ["what", "model", "unit of work", "seconds", "memory, GB"], rows)
    passed = conformance(device)
    record.check(f"conformance of {TESTED}", "all tests pass", "passed" if passed else "failed", passed)
    return record.finish(Path(__file__).parent / "results" / f"gpu{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
