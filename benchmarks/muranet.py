"""The savings of one network for walls and openings: one pass compared with two networks, forward and training.

All alternate in one process, and every value is a ratio to the two networks, one for each task, run one after the
other. In addition to the network with a completely shared encoder, networks whose tasks branch at a stage are measured.
Weights are random. There is no claim, so the only checks are equal initial outputs and parameter counts.

    python benchmarks/muranet.py            # a few minutes on one core
    python benchmarks/muranet.py --quick    # small images, a few rounds
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lamella.evaluate import turns
from lamella.methods.muranet import PlanNetwork, RecogniserShape, synthetic_floor_plan
from lamella.methods.muranet.frame import PlanRows, collate
from lamella.methods.muranet.recipe import task_losses
from lamella.results import Record

TWO = "two networks"


def networks(size: int, encoder: str) -> dict[str, list[PlanNetwork]]:
    """Return the compared networks: two networks, one with everything shared, and partially shared ones."""

    def built(**parts: Any) -> PlanNetwork:
        torch.manual_seed(0)
        return RecogniserShape(encoder=encoder, size=size, **parts).build(2)

    found = {TWO: [built(tasks="walls"), built(tasks="openings")], "one, all stages shared": [built()]}
    stages = len(found[TWO][0].encoder.stages)
    for split in range(stages - 1, -1, -1):
        found[f"one, {split} of {stages} shared"] = [built(split=split)]
    return found


def measured(record: Record, encoder: str, size: int, rounds: int) -> None:
    found = networks(size, encoder)
    batch = collate(list(PlanRows([synthetic_floor_plan(seed, size) for seed in range(2)], size, False)))
    maps = []
    for name, each in found.items():
        if name != TWO:
            with torch.no_grad():
                maps.append(each[0].eval()(batch["x"]).cells)
    same = all(torch.equal(maps[0], each) for each in maps[1:])
    record.check(f"outputs of {encoder}, whatever is shared", "the same", str(same), same)

    def forward(name: str) -> None:
        with torch.no_grad():
            for each in found[name]:
                each.eval()(batch["x"])

    def step(name: str) -> None:
        for each in found[name]:
            losses = task_losses(each.train(), batch)
            torch.stack([losses[task] for task in ("walls", "openings") if task in losses]).sum().backward()
            each.zero_grad()

    ways = [
        turns({name: lambda name=name, way=way: way(name) for name in found}, TWO, rounds) for way in (forward, step)
    ]
    whole = sum(p.numel() for each in found[TWO] for p in each.parameters())
    rows = []
    for name, each in found.items():
        count = sum(p.numel() for network in each for p in network.parameters())
        rows.append([name, count, round(count / whole, 3), *(str(way[name]) for way in ways)])
    title = f"{encoder} on plans of {size} pixels, relative to two networks: median (quartiles)"
    record.table(title, ["", "parameters", "share", "time of a pass", "time of a training step"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small pictures, a few rounds")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = Record("muranet", "random floor plans, random weights, float32", 0)
    measured(record, "nano", 64 if chosen.quick else 128, 2 if chosen.quick else 15)
    if not chosen.quick:
        measured(record, "resnet18", 128, 9)
    return record.finish(Path(__file__).parent / "results" / f"muranet{'-quick' if chosen.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
