"""SkipPipe at small scale: the published network in time, processes beside torch's pipelines, models without stages.

First the planner on the authors' 20 nodes in 12 regions: an iteration of the full pipeline, with random and with
planned allocations, with random paths, with paths that balance the load, and with paths that avoid collisions. Then six
processes: gradients and times compared with GPipe and 1F1B of torch.distributed.pipelining, and the memory of a process
that opens one stage. Then a character-level Llama of 12 layers in 6 stages that is trained on Python's documentation as
a whole, along five paths that skip two stages each, and with LayerDrop of the same depth, at equal work or at equal
time on that network; it is evaluated without every subset of stages, five of which were skipped in training and five
were not. The premise is that the model that is trained as a whole loses much without stages, over pilot seeds, whose
variance gives the number of the seeds that follow; arms without a claim have one seed. Last, SmolLM2 is trained to
tolerate a missing stage, on one seed, which shows only a direction. A quarter of its six stages is not a whole number,
so every microbatch skips one, and the evaluation removes one as well.

Searches are limited by the numbers of trials and of plans, so that the result depends on the seed and not on the load
of the machine.

    python reproductions/skippipe.py            # about 1.75 hours on one core; an interrupted run resumes
    python reproductions/skippipe.py --quick    # a shorter plan search, and a short nano Llama
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from harness import Run, main
from harness.design import seeds_needed
from harness.measured import Measured
from harness.nano import LETTERS, TEXTS, llama, nats, prose, whole
from torch import Tensor
from transformers import LlamaForCausalLM

import lamella
from lamella.data import windows
from lamella.files import Work
from lamella.methods.skippipe import published, train
from lamella.methods.skippipe.allocation import AllocationSearch, allocate, even_sizes
from lamella.methods.skippipe.baselines import full_pipeline, random_costs
from lamella.methods.skippipe.executor import SingleProcess, microbatches
from lamella.methods.skippipe.paths import Assignment, Limits, check
from lamella.methods.skippipe.planner import Limit
from lamella.methods.skippipe.schedule import make_schedule
from lamella.methods.skippipe.simulate import iteration, simulate
from lamella.methods.skippipe.stages import Order, layers_of, left_out, losses, omissions, origin_loss, spans
from lamella.report.figures import Scatter
from lamella.stack import Stack, share
from lamella.train import Hook, Task, TrainConfig, TrainingRun, blocks, fit, own, response_loss
from lamella.zoo import open_tokenizer

SEEDS = (0, 1, 2)  # of plans, and of the pilot of models
LEAST, MOST = 5, 8  # final seeds of models
STAGES, EACH = 6, 4  # stages, and how many of them a microbatch visits
HURTS = math.log(1.12)  # nats: a perplexity 12 % higher
TOLERATED = math.log(1.07)
GUARD = 3600.0  # time limit in seconds, which no search reaches
DRAWS = 20  # random allocations of nodes to stages


def fresh(seed: int, layers: int = 12, context: int = 64) -> Stack:
    torch.manual_seed(seed)
    return Stack(LlamaForCausalLM(llama(len(LETTERS), 64, layers, context=context)).eval())


# The published network


def planned(seed: int, quick: bool) -> dict[str, Any]:
    """Return the time of an iteration, and whether the schedule satisfies its constraints."""
    network, sizes, limits = published(), even_sizes(20, STAGES), Limits(length=EACH)
    assignment = allocate(network, sizes, AllocationSearch(trials=150 if quick else 8000, evolve_seconds=GUARD), seed)
    limit = Limit(seconds=GUARD, expansions=500 if quick else 20_000)
    made, found = make_schedule(network, assignment, 30, limits, limit=limit)
    light, _ = make_schedule(network, assignment, 30, limits, limit=limit, avoids="load")
    chance, _ = make_schedule(
        network, assignment, 30, limits, limit=limit, avoids="load", costs=random_costs(network, seed)
    )
    for each in (made, light, chance):
        check(network, assignment, each.paths, limits)
    first = AllocationSearch(population=1, trials=0)
    drawn = [allocate(network, sizes, first, DRAWS * seed + draw) for draw in range(DRAWS)]
    return {
        "drawn": fmean(iteration(simulate(network, full_pipeline(network, each, 30), 30)) for each in drawn),
        "full": iteration(simulate(network, full_pipeline(network, assignment, 30), 30)),
        "chance": chance.seconds,
        "load": light.seconds,
        "planned": made.seconds,
        "bound": found.bound,
        "expanded": found.expansions,
        "fits": all(fills(assignment, each.paths) for each in (made, light, chance)),
    }


def fills(assignment: Assignment, paths: Sequence[tuple[int, ...]]) -> bool:
    """Return whether a wave visits every stage but the first nine times, and every node three times."""
    nodes = Counter(node for path in paths for node in path)
    stages = Counter(assignment.stage_of[node] for path in paths for node in path)
    return [nodes[node] for node in range(20)] == [3] * 20 and [stages[each] for each in range(1, STAGES)] == [9] * 5


def network(run: Run) -> float:
    """Report the plans, and the ratio of the time of a full pipeline's iteration to that of a planned one."""
    seeds = SEEDS[:1] if run.quick else SEEDS
    found = [run.arm(f"plans of the published network, {seed}", planned, seed, run.quick) for seed in seeds]
    names = {"drawn": f"full pipeline, random allocation, mean of {DRAWS}", "full": "full pipeline",
             "chance": "random paths", "load": "paths that balance the load",
             "planned": "paths that also avoid collisions", "bound": "lower bound"}  # fmt: skip
    run.table(
        "The published network, 30 microbatches, a third of 6 stages skipped: simulated seconds per iteration",
        ["", *(f"seed {seed}" for seed in seeds), "per visit of a stage"],
        [
            [label, *(each[name] for each in found),
             fmean(each[name] for each in found) / (30 * (STAGES if name in ("drawn", "full") else EACH))]
            for name, label in names.items()
        ] + [["plans expanded by the last search", *(each["expanded"] for each in found), ""]],
    )  # fmt: skip
    fits = all(each["fits"] for each in found)
    run.exact(
        "visits of a wave, of all three kinds of paths",
        "9 of every stage but the first, 3 of every node",
        "so" if fits else "not so",
        fits,
    )
    share = Measured.over_seeds([each["planned"] / each["full"] for each in found])
    run.main("planned iteration over the full pipeline's", "at most 0.6", str(share), share.at_most(0.6))
    beside = Measured.over_seeds([each["planned"] / each["chance"] for each in found])
    run.further("planned iteration over that of random paths", "at most 0.8", str(beside), beside.at_most(0.8))
    falls = all(each["full"] > each["chance"] > each["load"] >= each["planned"] for each in found)
    run.further("full, random, balanced load, no collisions", "fall in this order",
                "so" if falls else "not so", falls)  # fmt: skip
    return fmean(each["full"] for each in found) / fmean(each["planned"] for each in found)


# Processes


def over_processes() -> dict[str, Any]:
    script = Path(__file__).parent / "harness" / "pipelines.py"
    done = subprocess.run([sys.executable, str(script), "5"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def pipelines(run: Run) -> None:
    found = run.arm("six processes", over_processes)
    simulated = found["simulated"]
    run.table(
        "Six processes, three stages of two nodes, 12 microbatches: seconds per iteration, median of 5 in turn",
        ["", "seconds", "simulated"],
        [[name, median(each), simulated.get(name, "")] for name, each in found["seconds"].items()],
    )
    run.exact("gradients of all stages beside GPipe's and 1F1B's", "within 1e-5", f"{found['apart']:.1e}",
              found["apart"] <= 1e-5)  # fmt: skip
    for name, seconds in simulated.items():
        ratio = median(found["seconds"][name]) / seconds
        run.further(f"executed over simulated, {name}", "0.85 to 1.15", f"{ratio:.3f}", 0.85 <= ratio <= 1.15)
    shares = [
        ours / min(gpipe, other)
        for ours, gpipe, other in zip(
            found["seconds"]["ours, two of three"], found["seconds"]["GPipe"], found["seconds"]["1F1B"], strict=True
        )
    ]
    run.further("two stages of three over the quicker of GPipe and 1F1B", "below 1", f"{median(shares):.3f}",
                median(shares) < 1)  # fmt: skip


OPENED = """
import sys
from lamella.methods.skippipe.stages import spans, with_stage
from lamella.needs import peak_used_memory
from lamella.zoo import open_stack
before = peak_used_memory()
stack = open_stack("smollm2", weights=sys.argv[1] == "all", device="cpu")
stack = with_stage(stack, spans(stack, 6), 1, "cpu")
for each in stack.model.parameters():  # files are mapped into memory, and take it when they are read
    if not each.is_meta:
        each.sum()
print((peak_used_memory() - before) / 2**20)
"""


def opened(what: str) -> float:
    """Return the peak of the memory that SmolLM2's weights, or its second stage's of six, add to a process, in MiB."""
    done = subprocess.run([sys.executable, "-c", OPENED, what], capture_output=True, text=True, check=True)
    return float(done.stdout)


def memory(run: Run) -> None:
    found = {what: run.arm(f"SmolLM2 opened, {what}", opened, what) for what in ("all", "one stage")}
    run.table(
        "Peak memory that SmolLM2's weights add to a process when they are opened and read, MiB",
        ["weights", "MiB"],
        list(found.items()),
    )
    share = found["one stage"] / found["all"]
    run.further("memory of one stage of six over that of the model", "at most 0.5", f"{share:.2f}", share <= 0.5)


# Models without stages


PATHS: tuple[Order, ...] = ((0, 3, 4, 5), (0, 1, 2, 5), (0, 2, 3, 4), (0, 1, 4, 5), (0, 1, 2, 3))
SWAPPED: tuple[Order, ...] = ((0, 4, 3, 5), (0, 1, 2, 5), (0, 2, 4, 3), (0, 1, 5, 4), (0, 2, 1, 3))
# Orders of five microbatches, and the quantity that equals that of full training; the time is the predicted one.
WAYS: dict[str, tuple[tuple[Order, ...], str]] = {
    "full": ((), "steps"),
    "skip": (PATHS, "steps"),
    "skip and swap": (SWAPPED, "steps"),
    "skip, equal work": (PATHS, "work"),
    "skip, equal time": (PATHS, "time"),
    "LayerDrop, equal work": ((), "work"),
}


def learnt(way: str, seed: int, layers: int, steps: int, samples: Sequence[Any]) -> Any:
    """Train a nano Llama along some paths, or with LayerDrop."""
    stack = fresh(seed, layers)
    orders, _ = WAYS[way]
    config = TrainConfig(steps=steps, lr=1e-3, batch=20, warmup=0.0, seed=seed, save_every=steps, log_every=steps)
    view = share(stack.model)
    own(view, lambda name: True)
    trained = Stack(view)
    task, hooks = Task(response_loss), []
    if way.startswith("LayerDrop"):
        dropped = LayerDrop(trained, (STAGES - EACH) / (STAGES - 1), seed)
        task, hooks = Task(response_loss, passes=dropped.passes), [dropped]
    elif orders:
        runner = SingleProcess(trained, spans(trained, STAGES), dict(view.named_parameters()), orders)
        task = Task(response_loss, passes=lambda forward, batch, backward: (runner(batch), {}))
    with tempfile.TemporaryDirectory() as work:
        fit(view, samples, task, config, out=work, trainable=lambda name: True, hooks=hooks)
    return view.eval()


class LayerDrop(Hook):
    """LayerDrop (Fan et al. 2020): random layers after the first stage are skipped, drawn again for each microbatch."""

    def __init__(self, stack: Stack, rate: float, seed: int) -> None:
        self.stack, self.rate, self.seed, self.step = stack, rate, seed, 0

    def before_step(self, run: TrainingRun) -> None:
        self.step = run.step

    def passes(self, forward: Any, batch: Any, backward: Any) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = random.Random(f"{self.seed} {self.step}")
        first = layers_of(spans(self.stack, STAGES), (0,))
        total = []
        for part in microbatches(batch, 5):
            context = self.stack.context({"input_ids": part["input_ids"]})
            kept = [layer for layer in range(len(self.stack)) if layer in first or drawn.random() >= self.rate]
            h: Any = self.stack.execute(context, kept)
            loss = origin_loss(self.stack, h, part["labels"])
            (loss / 5).backward()
            total.append(loss.detach())
        return torch.stack(total).mean(), {}


TRAINED = {left_out(STAGES, order) for order in PATHS}


def judged(
    way: str, seed: int, layers: int, steps: int, samples: Sequence[Any], tests: Sequence[Any]
) -> dict[str, float]:
    """Evaluate a model in nats per character: at full depth, without some stages, and with swapped neighbours."""
    model = learnt(way, seed, layers, steps, samples)
    stack = Stack(model)
    tokens = torch.stack([each["input_ids"] for each in tests])
    parts = spans(stack, STAGES)
    everything = tuple(range(STAGES))
    sets = {count: omissions(STAGES, count) for count in (1, 2, 3)}
    swaps = [(*everything[:s], s + 1, s, *everything[s + 2 :]) for s in range(1, STAGES - 1)]
    orders = [everything, everything[1:], *swaps, *itertools.chain(*sets.values())]
    loss = dict(zip(orders, losses(stack, tokens, parts, orders), strict=True))
    assert abs(loss[everything] - nats(model, tests)) < 1e-3
    found = {"full": loss[everything], "swapped": fmean(loss[each] for each in swaps), "first": loss[everything[1:]]}
    found |= {f"drop {count}": fmean(loss[each] for each in every) for count, every in sets.items()}
    pairs = sets[2]
    found["pairs trained"] = fmean(loss[each] for each in pairs if left_out(STAGES, each) in TRAINED)
    found["pairs never trained"] = fmean(loss[each] for each in pairs if left_out(STAGES, each) not in TRAINED)
    found["best 3"] = min(loss[each] for each in sets[3])
    return found


def omission(run: Run, quicker: float) -> None:
    """Compare models trained along paths with full training.

    Arms have equal work or equal time; `quicker` is the number of their iterations in the time of a full one.
    """
    layers, steps = (6, 80) if run.quick else (12, 350)
    samples = whole(prose("calibration", 4000, 64, run.seed))
    tests = whole(prose("test", 16 if run.quick else 200, 64, run.seed))
    longer = {"steps": 1.0, "work": STAGES / EACH, "time": quicker}
    ours = "skip" if run.quick else "skip, equal work"
    ways = {way: round(steps * longer[WAYS[way][1]]) for way in (("full", ours) if run.quick else WAYS)}

    def judge(way: str, seed: int) -> dict[str, float]:
        made: dict[str, float] = run.arm(
            f"nano, {way}, seed {seed}", judged, way, seed, layers, ways[way], samples, tests
        )
        return made

    pilot = [(each := judge("full", seed))["drop 3"] - each["full"] for seed in SEEDS[: 1 if run.quick else None]]
    harm = fmean(pilot)
    if not run.quick:
        name = f"rise without half of the stages, full, mean of {len(pilot)} pilot seeds"
        run.premise(name, f"at least {HURTS:.3f} nats", harm, harm >= HURTS)
    count = 1 if run.quick else max(LEAST, seeds_needed(pilot, harm - HURTS, MOST))
    seeds = list(range(len(pilot), len(pilot) + count))
    run.freeze(
        "rise of the loss without half of the stages, mean over seeds", seeds, steps=ways, layers=layers, lr=1e-3
    )
    used = dict.fromkeys(ways, seeds[:1]) | {"full": seeds, ours: seeds, "LayerDrop, equal work": seeds}
    found = {way: [judge(way, seed) for seed in used[way]] for way in ways}
    columns = [
        "full",
        "drop 1",
        "drop 2",
        "drop 3",
        "best 3",
        "pairs trained",
        "pairs never trained",
        "swapped",
        "first",
    ]
    title = f"A Llama of 6 x {layers // STAGES} layers, width 64, steps of 20 sequences: nats per character"
    run.table(
        title if run.quick else f"{title}; equal time refers to the published network",
        ["training", "steps", "seeds", *columns],
        [[way, ways[way], len(every), *(fmean(each[name] for each in every) for name in columns)]
         for way, every in found.items()],
    )  # fmt: skip
    depths = ["full", "drop 1", "drop 2", "drop 3"]
    lines = {
        way: [(left, fmean(each[name] for each in every)) for left, name in enumerate(depths)]
        for way, every in found.items()
    }
    run.figure("skippipe-stages", Scatter("stages of six that are left out", "nats per character", lines, joined=True))

    def rise(way: str, name: str) -> Measured:
        return Measured.over_seeds([each[name] - each["full"] for each in found[way]])

    half = rise(ours, "drop 3")
    run.main(
        f"rise without half of the stages, {ours}", f"at most {TOLERATED:.3f} nats", str(half), half.at_most(TOLERATED)
    )
    plain = rise("full", "drop 3")
    run.main("rise without half of the stages, full", f"at least {HURTS:.3f} nats", str(plain), plain.at_least(HURTS))
    unseen = rise(ours, "pairs never trained")
    run.further(f"rise without pairs that no path skipped, {ours}", f"at most {TOLERATED:.3f} nats", str(unseen),
                unseen.at_most(TOLERATED))  # fmt: skip
    for way in ("full", ours):
        first = rise(way, "first")
        run.further(
            f"rise without the first stage, {way}", f"at least {HURTS:.3f} nats", str(first), first.at_least(HURTS)
        )
    if run.quick:
        return
    ratio = Measured.over_seeds([a["full"] / b["full"] for a, b in zip(found[ours], found["full"], strict=True)])
    run.further(
        "loss at full depth at equal work, over full training's", "at most 1.03", str(ratio), ratio.at_most(1.03)
    )
    both = zip(found["LayerDrop, equal work"], found[ours], strict=True)
    apart = Measured.over_seeds([theirs["drop 3"] - each["drop 3"] for theirs, each in both])
    run.further("LayerDrop's loss without half of the stages less ours", "above 0", str(apart), apart.at_least(0.0))
    both = zip(found["full"], found[ours], strict=True)
    pruned = Measured.over_seeds([theirs["best 3"] - each["drop 3"] for theirs, each in both])
    run.further(
        "full training pruned to its best half, less ours on average", "above 0", str(pruned), pruned.at_least(0.0)
    )


# SmolLM2


def healed(seed: int, place: Path) -> dict[str, Any]:
    """Evaluate SmolLM2 before and after 200 steps in which each microbatch skips one stage of six."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    texts = [lamella.load_text(name, "calibration") for name in TEXTS]
    rows = torch.cat([windows(tokenizer, each, 1000 // len(texts), 102, seed) for each in texts])
    samples = blocks(rows, loss_on="all")
    tests = windows(tokenizer, lamella.load_text("pydoc", "test"), 48, 128, seed)
    config = TrainConfig(steps=200, lr=5e-5, schedule="cosine", batch=1, seed=seed, save_every=50, log_every=50)
    after = train(stack, samples, skip=1 / STAGES, config=config, work=Work(place)).stack
    parts = spans(stack, STAGES)
    orders = [tuple(range(STAGES)), *omissions(STAGES, 1)]
    return {"before": losses(stack, tests, parts, orders), "after": losses(after, tests, parts, orders)}


def healing(run: Run) -> None:
    found = run.arm("SmolLM2", healed, run.seed, run.work / "smollm2")
    before, after = found["before"], found["after"]
    run.table(
        "SmolLM2, 6 stages of 5 layers, 200 steps of 5 x 102 tokens, one seed: perplexity on held-out text; every "
        "microbatch leaves out one stage of six, since a quarter of six cannot be had",
        ["", "whole", *(f"without stage {stage}" for stage in range(STAGES - 1, 0, -1)), "mean without one"],
        [
            [name, *(math.exp(each) for each in row), math.exp(fmean(row[1:]))]
            for name, row in (("before", before), ("after", after))
        ],
    )
    share = math.exp(fmean(after[1:]) - fmean(before[1:]))
    run.further(
        "SmolLM2, one seed: perplexity without a stage, after over before", "at most 0.7", f"{share:.3f}", share <= 0.7
    )
    rise = math.exp(after[0] - before[0])
    run.further(
        "SmolLM2, one seed: perplexity of the whole, after over before", "at most 1.05", f"{rise:.3f}", rise <= 1.05
    )


def experiment(run: Run) -> None:
    run.data = "the published network; characters of pydoc for a Llama of 12 layers" + (
        "" if run.quick else "; SmolLM2 heals on pydoc and stdlib, and is tested on pydoc"
    )
    quicker = network(run)
    if not run.quick:
        run.part("pipelines", pipelines)
        memory(run)
    omission(run, quicker)
    if not run.quick:
        healing(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="short searches and one short nano Llama, no processes, no SmolLM2"))
