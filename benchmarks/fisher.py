"""Importances: one pass over chunks of samples compared with a loop over samples, in time and memory.

The loop is the straightforward implementation: a backward pass for each sample, with squared gradients summed. The
results must agree with an exact sum, up to less than the loop's own rounding error. On the digit classifier of the
reproduction of SSD; needs scikit-learn.

Memory is the peak of a separate process beyond the model, in copies of the parameters: for a sequence of linear layers,
untied and with two of them tied, which forces one sample at a time.

    python benchmarks/fisher.py            # about two minutes
    python benchmarks/fisher.py --quick    # fewer samples and rounds
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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.measure import fisher
from lamella.results import Record

_CHILD = """
import json, sys
import torch
from torch import nn
from lamella.measure import fisher
from lamella.needs import peak_used_memory
width, depth, way = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
layers = [nn.Linear(width, width) for _ in range(depth)]
if way == "tied":
    layers[1].weight = layers[0].weight
model = nn.Sequential(*layers)
images, labels = torch.randn(8, width), torch.arange(8)
fisher(nn.Linear(4, 4), (torch.randn(2, 4), torch.arange(2)))  # brings the libraries in
copy = 4 * sum(parameter.numel() for parameter in model.parameters())
idle = peak_used_memory()
if way == "loop":
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for x, y in zip(images, labels):
        model.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        for total, parameter in zip(sums, model.parameters()):
            total += parameter.grad.square()
else:
    fisher(model, (images, labels))
print(json.dumps((peak_used_memory() - idle) / copy))
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, pools in ((1, 32, False), (32, 64, True), (64, 64, True)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def by_loop(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    totals = {name: torch.zeros_like(parameter, dtype=dtype) for name, parameter in model.named_parameters()}
    for x, y in zip(images, labels, strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            totals[name] += parameter.grad.to(dtype).square()
    return {name: total / len(images) for name, total in totals.items()}


def speed(record: Record, samples: int, rounds: int) -> None:
    data = load_digits()
    images = torch.tensor(data.images[:samples] / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target[:samples])
    model = network()
    ours, theirs = fisher(model, (images, labels)).tensors, by_loop(model, images, labels)  # and both are warm now
    exact = by_loop(model, images, labels, torch.float64)
    apart, of_loop = (
        max(float((found[name] - total).abs().max() / total.abs().max()) for name, total in exact.items())
        for found in (ours, theirs)
    )
    times = []
    for turn in range(rounds):
        taken = {}
        for way in ("chunks", "loop") if turn % 2 else ("loop", "chunks"):
            begin = time.process_time()  # what else the machine does need not count
            _ = fisher(model, (images, labels)) if way == "chunks" else by_loop(model, images, labels)
            taken[way] = time.process_time() - begin
        times.append((taken["loop"], taken["chunks"]))
    ratios = [loop / chunks for loop, chunks in times]
    milliseconds = [1000 * statistics.median(each) / len(images) for each in zip(*times, strict=True)]
    rows = [
        ["the loop", milliseconds[0], 1.0, 1.0, 1.0],
        ["chunks", milliseconds[1], statistics.median(ratios), min(ratios), max(ratios)],
    ]
    columns = ["importances of the digit classifier", "ms per sample", "speed-up", "least", "most"]
    record.table(f"{len(images)} samples, {rounds} interleaved rounds", columns, rows)
    distances = f"{apart:.2g}, that of the loop with a sum in float32 {of_loop:.2g}"
    record.check(
        "distance from the loop with an exact sum, relative to the maximum of each parameter",
        "<= 1e-6",
        distances,
        apart <= 1e-6,
    )
    median = statistics.median(ratios)
    record.check("chunks against the loop", "at least twice as fast", f"{median:.2f} times", median >= 2)


def memory(record: Record, width: int, depth: int) -> None:
    copies = {
        way: json.loads(
            subprocess.run(
                [sys.executable, "-c", _CHILD, str(width), str(depth), way], capture_output=True, text=True, check=True
            ).stdout
        )
        for way in ("loop", "chunks", "tied")
    }
    names = {"loop": "the loop", "chunks": "chunks", "tied": "one by one, with tied weights"}
    title = f"Peak memory beyond {depth} linear layers of {width} x {width}"
    record.table(title, ["way", "copies of the parameters"], [[names[way], count] for way, count in copies.items()])
    most = 1 + 4 / depth  # the sum; of one module the gradient and its power, and what flows past it
    worst = max(copies["chunks"], copies["tied"])
    record.check("memory of importances", f"one copy and what a module needs: <= {most:.2f}", worst, worst <= most)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    quick = parser.parse_args().quick
    record = Record("fisher", "scikit-learn digits; random linear layers for memory", 0)
    speed(record, 300 if quick else 1437, 3 if quick else 7)
    memory(record, 1024 if quick else 2048, 16)
    return record.finish(Path(__file__).parent / "results" / f"fisher{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
