"""Estimates of memory and time beside what runs take, at two sizes that differ fourfold.

Every run is a process of its own with one thread, on a Llama with random weights and SmolLM2's tokens. Memory is what
the process takes at most beyond Python and its libraries, weights included; time is that of its processor.

    python benchmarks/needs.py            # half an hour of one core; resumes after an interruption
    python benchmarks/needs.py --quick    # one command
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lamella.files import Finished
from lamella.needs import used_memory
from lamella.registry import get_method
from lamella.results import Record
from lamella.runner import needs_of, run
from lamella.zoo.cache import cache_folder
from lamella.zoo.pull import pull

EVERY = 0.01  # seconds between two looks at the memory
WITHIN, SLACK = 0.2, 0.2e9  # what an estimate may differ by: a fraction and bytes
BASE: dict[str, Any] = {"width": 512, "layers": 12, "sequences": 4, "length": 256}
VARIED = {"width": 1280, "layers": 48, "sequences": 16, "length": 1024}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "shortgpt": ({}, ("width", "layers", "sequences")),
    "finercut": ({"share": 0.05}, ("sequences",)),
    "lora": ({"steps": 3, "batch": 2}, ("width", "layers", "length")),
    "kore": ({"steps": 3, "batch": 2}, ("width", "layers")),
    "heal": ({"steps": 4, "loss": "kd", "batch": 2}, ("width", "length")),
    "switchlora": ({"steps": 3, "batch": 2}, ("layers",)),
}


def model(width: int, layers: int) -> Path:
    """Return the folder of a Llama with random weights and SmolLM2's tokens, created once."""
    folder = cache_folder() / "benchmarks" / f"llama-{width}-{layers}"
    if not folder.exists():
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=49152,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        for file in pull("smollm2").glob("*token*"):
            shutil.copy(file, folder)
    return folder


def child(what: str, command: str, options: dict[str, Any]) -> None:
    """Estimate or measure one run in this process, and print the result as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given = {name: value for name, value in options.items() if name not in ("width", "layers")}
    folder, entry = model(options["width"], options["layers"]), get_method(command)
    inputs = {next(iter(entry.signature.inputs)): folder}
    if what == "estimate":
        needs = needs_of(command, **inputs, **given)
        print(json.dumps({"bytes": needs.peak, "seconds": needs.seconds, "cut": needs.cut}))
        return
    idle = highest = used_memory()
    ended = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(EVERY):
            highest = max(highest, used_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory() as work:
        out = {"out": Path(work) / "out"} if getattr(entry.signature.result, "needs_folder", False) else {}
        begin = time.process_time()
        run(command, **inputs, **given, **out)
    ended.set()
    thread.join()
    print(json.dumps({"bytes": highest - idle, "seconds": time.process_time() - begin}))


def in_process(what: str, command: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the result of :func:`child` in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    call = [sys.executable, __file__, "--child", what, command, json.dumps(options)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one command")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, command, options = arguments.child
        child(what, command, json.loads(options))
        return 0
    cases = {"shortgpt": CASES["shortgpt"]} if arguments.quick else CASES
    suffix = "-quick" if arguments.quick else ""
    finished = Finished(cache_folder() / "benchmarks" / f"needs{suffix}.jsonl", {"base": BASE, "varied": VARIED})
    record = Record("needs", "Llamas with random weights; one thread", 0)
    rows: list[list[Any]] = []
    worst = 0.0
    for command, (options, names) in cases.items():
        for name in ("", *names):
            size = BASE | options | ({name: VARIED[name]} if name else {})
            known = f"{command} {json.dumps(size, sort_keys=True)}"
            found = {
                what: finished.once(f"{what} {known}", partial(in_process, what, command, size))
                for what in ("estimate", "measure")
            }
            estimated, measured = (found[what]["bytes"] for what in ("estimate", "measure"))
            times = [found[what]["seconds"] for what in ("estimate", "measure")]
            worst = max(worst, (abs(estimated - measured) - SLACK) / measured)
            varied = f"{name} {VARIED[name]}" if name else "as it is"
            sizes = [f"{each / 1e9:.2f}" for each in (measured, estimated)]
            rows.append([command, varied, *sizes, *(f"{each:.0f}" for each in reversed(times))])
            print(*rows[-1], flush=True)
    usual = ", ".join(f"{name} {value}" for name, value in BASE.items())
    record.table(
        f"Measured and estimated ({usual}, and one of them fourfold; width 2.5-fold)",
        ["command", "size", "measured, GB", "estimated, GB", "measured, s", "estimated, s"],
        rows,
    )
    record.check("memory", "every estimate is within 20 % + 200 MB", f"at most {worst:.0%} + 200 MB", worst <= WITHIN)
    return record.finish(Path(__file__).parent / "results" / f"needs{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
