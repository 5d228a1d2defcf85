"""The gain of pipeline plans, and the effect of a time limit on the planner for growing networks.

First the published network of 20 nodes in 12 regions: simulated seconds of an iteration in the full pipeline, by paths
at random, by paths that balance the load, and by paths that avoid collisions. Then networks of the same regions with up
to 200 nodes, each planned within a short limit and a longer one: the best plan that was found, and the bound on all.

    python benchmarks/pipelines.py            # about 10 minutes on one core
    python benchmarks/pipelines.py --quick    # the published network and one of 50 nodes, with less time
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lamella.methods.skippipe import published
from lamella.methods.skippipe.allocation import AllocationSearch, allocate, even_sizes
from lamella.methods.skippipe.method import plan
from lamella.methods.skippipe.page import gantt
from lamella.methods.skippipe.paths import Limits
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import make_schedule
from lamella.report.plotting import svg
from lamella.results import Record

STAGES = 6
FIGURE = Path(__file__).parents[1] / "docs" / "assets" / "skippipe-gantt.svg"


def schedules(record: Record, limit: float, draws: bool) -> None:
    """Plan the published network, as `lamella run skippipe plan` does."""
    begin = time.perf_counter()
    made = plan(published(), evolve_seconds=limit, seconds=limit, seed=record.seed)  # type: ignore[call-arg]
    found = made.findings
    predicted = found["predicted"]
    rows = [[name, seconds, seconds / predicted["full"]] for name, seconds in predicted.items()]
    record.table(
        f"The published network, 30 microbatches, planned in {time.perf_counter() - begin:.0f} s",
        ["paths", "simulated seconds per iteration", "of the full pipeline's"],
        [*rows, ["bound", found["bound"], found["bound"] / predicted["full"]]],
    )
    share = predicted["planned"] / predicted["full"]
    record.check("planned iteration over the full pipeline's", "at most 0.6", share, share <= 0.6)
    if draws:
        FIGURE.write_text(svg(gantt(found["gantt"], found["nodes"])) + "\n", encoding="utf-8")


def growing(record: Record, sizes: list[int], limits: list[float]) -> None:
    """Plan networks of increasing size, each within a short and a longer time limit."""
    rows = []
    for nodes in sizes:
        network = published(nodes)
        searched = AllocationSearch(trials=300, evolve_seconds=limits[-1])
        assignment = allocate(network, even_sizes(nodes, STAGES), searched, record.seed)
        count = 6 * len(assignment.stages[0])
        best = []
        for seconds in limits:
            begin = time.perf_counter()
            made, found = make_schedule(network, assignment, count, Limits(), limit=Limit(seconds=seconds))
            best.append(made.seconds)
            took = time.perf_counter() - begin
            rows.append(
                [nodes, seconds, took, found.expansions, found.seconds, found.bound, found.seconds / found.bound]
            )
        cost = best[0] / best[-1]
        record.check(
            f"{nodes} nodes: the plan of the short limit over that of the long one", "at least 1", cost, cost >= 1
        )
        late = max(row[2] / row[1] for row in rows[-len(limits) :])
        record.check(f"{nodes} nodes: time over the limit", "at most 1.5", late, late <= 1.5)
    columns = ["nodes", "limit, s", "took, s", "plans expanded", "iteration, s", "bound, s", "iteration over bound"]
    record.table("Planning within a limit of time", columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short limits, up to 50 nodes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    record = Record("pipelines", "20 to 200 nodes in 12 regions, links as published", arguments.seed)
    schedules(record, 10 if arguments.quick else 180, draws=not arguments.quick)
    growing(record, [50] if arguments.quick else [20, 50, 100, 200], [3, 9] if arguments.quick else [10, 60])
    name = "pipelines-quick.json" if arguments.quick else "pipelines.json"
    return record.finish(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    raise SystemExit(main())
