"""The cost of KORE's calibration on SmolLM2: input covariances of all linear layers, over 64 windows of 128 tokens.

Besides the model, only the matrices are in memory, four for each layer, whatever the amount of text; the inputs
themselves would be many times larger. Then the null bases and the factors of all maps are computed.

    python benchmarks/kore.py            # about three minutes on one core
    python benchmarks/kore.py --quick    # eight windows
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import lamella
from lamella.methods.kore import input_covariance
from lamella.methods.kore.method import split_weights
from lamella.results import Record
from lamella.train import linear_at
from lamella.zoo import open_tokenizer

LENGTH, RANK = 128, 64
ROOM = 1.25  # memory limit relative to the matrices and a forward pass


def peak() -> int:
    """Return the peak memory of this process in bytes since :func:`forget_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> int:
    """Reset the peak, and return the current memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def measure(record: Record, windows: int) -> None:
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    tokens = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), windows, LENGTH, record.seed)
    names = linear_at(stack.model)
    with torch.no_grad():
        stack.model(tokens[:1], use_cache=False)  # allocate the memory of a forward pass
        held = forget_peak()
        stack.model(tokens[:1], use_cache=False)
        passing = peak() - held
    held, begin = forget_peak(), time.perf_counter()
    found = input_covariance(stack.model, names, tokens)
    seconds, added = time.perf_counter() - begin, peak() - held
    matrices = sum(each.nbytes for each in found.matrices.values())
    inputs = 4 * tokens.numel() * sum(len(each) for each in found.matrices.values())
    begin = time.perf_counter()
    split_weights(stack.model, names, found, RANK)
    factored = time.perf_counter() - begin
    rows = [
        ["seconds of calibration passes", seconds],
        ["seconds for bases and factors", factored],
        ["bytes of the matrices", matrices],
        ["peak bytes beyond the model", added],
        ["bytes of one pass", passing],
        ["bytes of the inputs, not stored", inputs],
    ]
    what = f"{len(names)} linear layers of SmolLM2 with {len(found.matrices)} inputs"
    record.table(f"{what}; {windows} windows of {LENGTH} tokens, rank {RANK}", ["", "measured"], rows)
    bound = int(ROOM * (matrices + passing))
    record.check("peak bytes", f"at most {bound}", str(added), added <= bound)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight windows")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("kore", "pydoc, SmolLM2-135M-Instruct, float32", 0)
    measure(record, 8 if chosen.quick else 64)
    return record.finish(Path(__file__).parent / "results" / f"kore{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
