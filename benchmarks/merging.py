"""The cost of merging a pool: 32 adapters of SmolLM2-135M with one coefficient per adapter and module.

With factors, one module after the other, compared with the straightforward merge: each adapter's dense update, added to
the weights one adapter after the other. Memory is the peak of a new process beyond the model and the adapters; 32 dense
models would be 32 times the weights.

    python benchmarks/merging.py            # about five minutes
    python benchmarks/merging.py --quick    # 8 adapters
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import lamella
from lamella.methods.lora_recycling import AdapterPool, Mixing, mixture
from lamella.needs import peak_used_memory
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Adapter, merge
from lamella.train.adapters import with_updates

RANKS = (4, 8, 16)
MEGABYTE = 1e6


def pool(stack: Stack, count: int) -> list[Adapter]:
    """Adapters of mixed ranks in all linear maps of all layers."""
    found = [AdapterPool.open(f"random:count={count},r={rank}").members(stack) for rank in RANKS]
    return [found[number % len(RANKS)].load(f"random-{number}") for number in range(count)]


def coefficients(adapters: list[Adapter]) -> dict[str, Tensor]:
    """Return one coefficient for each adapter in each module."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(len(adapters), generator=generator) / 10 for name in adapters[0].modules}


@torch.no_grad()
def in_factors(stack: Stack, adapters: list[Adapter], chosen: dict[str, Tensor]) -> Stack:
    """Merge as the method does: one concatenated adapter, and its dense update for one module at a time."""
    mixed = mixture(stack, adapters, Mixing(activation="identity"), 0)
    for name, weights in chosen.items():
        mixed.tensors[name].copy_(weights)
    return merge(stack, mixed.adapter())


@torch.no_grad()
def one_by_one(stack: Stack, adapters: list[Adapter], chosen: dict[str, Tensor]) -> Stack:
    """Merge the adapters one after the other."""
    for place, adapter in enumerate(adapters):
        stack = with_updates(
            stack, ((name, float(chosen[name][place]) * adapter.delta(name)) for name in adapter.modules)
        )
    return stack


WAYS = {"in factors": in_factors, "one by one": one_by_one}


def peak(way: str, count: int) -> float:
    """Return the peak memory of a merge in a new process beyond its start, in megabytes."""
    done = subprocess.run([sys.executable, __file__, "--peak-of", way, "--count", str(count)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def measured_peak(way: str, count: int) -> None:
    """Measure the peak in the new process, reset after model and adapters are loaded."""
    stack = lamella.open("smollm2")
    adapters = pool(stack, count)
    chosen = coefficients(adapters)
    for each in stack.model.parameters():
        each.sum()  # weights are memory-mapped until they are read
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current memory
    before = peak_used_memory()
    merged = WAYS[way](stack, adapters, chosen)
    print(json.dumps((peak_used_memory() - before) / MEGABYTE))
    del merged


@torch.no_grad()
def compare(record: Record, count: int, rounds: int) -> None:
    stack = lamella.open("smollm2")
    adapters = pool(stack, count)
    chosen = coefficients(adapters)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    weights: dict[str, dict[str, Tensor]] = {}
    for _ in range(rounds):
        for way, work in WAYS.items():
            begin = time.process_time()
            merged = work(stack, adapters, chosen)
            times[way].append(time.process_time() - begin)
            weights[way] = {name: merged.model.get_submodule(name).weight for name in adapters[0].modules[:14]}
    apart = max(float((ours - weights["one by one"][name]).abs().max() / ours.abs().max())
                for name, ours in weights["in factors"].items())  # fmt: skip
    record.check("both merges", "the same weights within 1e-5", apart, apart <= 1e-5)
    ratios = [slow / fast for fast, slow in zip(times["in factors"], times["one by one"], strict=True)]
    record.check("time of one by one / in factors", "above 1", statistics.median(ratios), statistics.median(ratios) > 1)

    peaks = {way: peak(way, count) for way in WAYS}
    whole = sum(each.numel() * each.element_size() for each in stack.model.parameters()) / MEGABYTE
    factors = sum(4 * each.parameters for each in adapters) / MEGABYTE
    rows = [[way, statistics.median(times[way]), min(times[way]), max(times[way]), peaks[way]] for way in WAYS]
    columns = ["merge", "seconds, median", "least", "most", "peak, MB above the start"]
    record.table(f"{count} adapters of ranks {', '.join(map(str, RANKS))}, {rounds} interleaved rounds", columns, rows)
    sizes = [["the model", whole], ["all adapters", factors], [f"{count} dense models", count * whole]]
    record.table("Sizes in float32", ["of", "MB"], sizes)
    bound = whole + 3 * factors
    record.check("peak of the merge in factors", f"at most the new weights and three times the factors, {bound:.0f} MB",
                 peaks["in factors"], peaks["in factors"] <= bound)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 adapters, one round")
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=32, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.peak_of:
        measured_peak(chosen.peak_of, chosen.count)
        return 0
    record = Record("merging", "SmolLM2-135M-Instruct in float32; adapters with random weights", 0)
    compare(record, 8 if chosen.quick else 32, 1 if chosen.quick else 3)
    return record.finish(Path(__file__).parent / "results" / f"merging{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
