"""FinerCut at small scale: SmolLM2-135M-Instruct, a few hundred calibration tokens, real text.

Checks that removing sublayers greedily by the change of the output beats removing whole layers, block influence and
one-shot scores at small cuts, and that the speed changes as predicted. The main claim compares three methods on eight
calibration sets and thirty test windows, paired.

    python reproductions/finercut.py            # about an hour and a half; an interrupted run resumes
    python reproductions/finercut.py --quick    # the same claims on less work
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from torch import LongTensor

import lamella
from lamella.evaluate import FidelityTest, bench, cost
from lamella.plan import ModelReference, Plan, PlanSeries
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.stack import Position, Stack, sites_of
from lamella.zoo import open_tokenizer

NANO = Path(__file__).parents[1] / "tests" / "models" / "nano-llama"


def cut(stack: Stack, sublayers: Any) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=sites_of(sublayers, stack.positions))


def main_claim(run: Run, stack: Stack, draws: list[LongTensor], test: FidelityTest) -> None:
    """Check point 3 at 4 and 6 removed: ratios of perplexities on the same calibration set and test window."""
    cuts = [2, 4, 6]
    run.freeze(
        "exp of the mean difference of the loss over calibration sets and test windows",
        range(run.seed, run.seed + len(draws)),
        calibration=list(draws[0].shape),
        windows=len(test.tokens),
        cuts=cuts,
    )
    makers = {
        "finercut": {},
        "block greedy": {"level": "block", "exclude_front": 0.0},
        "block influence": None,
    }

    def planned(name: str, draw: int) -> list[list[str]]:
        options = makers[name]
        made = (
            lamella.make_plan("shortgpt", stack, draws[draw])
            if options is None
            else lamella.make_plan("finercut", stack, draws[draw], share=max(cuts) / len(stack.positions), **options)
        )
        return [made.removing(count).drop for count in cuts]

    def judged(drop: list[str]) -> list[float]:
        plan = Plan(model=ModelReference.of(stack), drop=drop)
        return list(test.of(lamella.apply(stack, plan)).losses)

    losses: dict[tuple[str, int], list[list[float]]] = {}
    for draw, name in itertools.product(range(len(draws)), makers):
        for count, drop in zip(cuts, run.arm(f"main: {name}, draw {draw}", planned, name, draw), strict=True):
            losses.setdefault((name, count), []).append(run.arm(f"main: without {' '.join(drop)}", judged, drop))

    rows: list[list[Any]] = []
    for count in cuts:
        for name in makers:
            each = np.array(losses[name, count])
            spread = " ".join(f"{np.exp(row.mean()):.2f}" for row in each)
            against = Measured.over_seeds_and_items(np.array(losses["finercut", count]) - each).exp()
            rows.append([count, name, float(np.exp(each.mean())), "" if name == "finercut" else str(against), spread])
    sets = f"{len(draws)} calibration sets of {list(draws[0].shape)} tokens"
    title = f"Test perplexity on {len(test.tokens)} windows, {sets}"
    run.table(title, ["removed of 60", "method", "perplexity", "finercut / method", "per calibration set"], rows)
    lines = {name: [(count, perplexity) for count, other, perplexity, *_ in rows if other == name] for name in makers}
    run.figure("finercut-removed", Scatter("sublayers of 60 removed", "test perplexity", lines, joined=True))
    for count, name in itertools.product((4, 6), ("block greedy", "block influence")):
        ratio = Measured.over_seeds_and_items(np.array(losses["finercut", count]) - np.array(losses[name, count])).exp()
        run.main(f"finercut / {name} at {count} removed", "at most 1.03", ratio, ratio.at_most(1.03))


def selection_quality(run: Run, stack: Stack, draws: list[LongTensor], test: FidelityTest, cuts: list[int]) -> None:
    """Check point 3 for larger cuts and other baselines, over few small calibration draws."""
    share = max(cuts) / len(stack.positions)
    makers = {
        "finercut": lambda tokens: lamella.make_plan("finercut", stack, tokens, share=share),
        "block greedy": lambda tokens: lamella.make_plan(
            "finercut", stack, tokens, share=share, level="block", exclude_front=0.0
        ),
        "block influence": lambda tokens: lamella.make_plan("shortgpt", stack, tokens),
    }
    if 12 in cuts:
        makers |= {
            "one-shot": lambda tokens: lamella.make_plan("finercut", stack, tokens, share=share, strategy="one_shot"),
            "sleb": lambda tokens: lamella.make_plan("sleb", stack, tokens, share=share),
            "angular window": lambda tokens: lamella.make_plan("window", stack, tokens),
            "last attentions": lambda tokens: last_attentions(stack),
        }

    def planned(name: str, draw: int) -> dict[str, Any]:
        """Return the removed sublayers of every plan, and the order of a series that removes one sublayer per step."""
        made = lamella.make_plan("random", stack, seed=draw) if name == "random" else makers[name](draws[draw])
        steps = itertools.pairwise(made) if name == "finercut" else ()
        order = [sites_of(b.skipped - a.skipped, stack.positions)[0] for a, b in steps]
        return {"cuts": [made.removing(count).drop for count in cuts], "order": order}

    def judged(plan: Plan) -> dict[str, Any]:
        fidelity = test.of(lamella.apply(stack, plan))
        return {
            "perplexity": fidelity.perplexity.mean,
            "jsd": fidelity.jsd.mean,
            "dense": str(fidelity.base_perplexity),
        }

    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for draw, name in itertools.product(range(len(draws)), (*makers, "random")):
        made = run.arm(f"{name}, draw {draw}", planned, name, draw)
        for count, drop in zip(cuts, made["cuts"], strict=True):  # baselines often choose one set for several draws
            plan = Plan(model=ModelReference.of(stack), drop=drop)
            found.setdefault((name, count), []).append(run.arm(f"without {' '.join(drop)}", judged, plan))
            sizes[name, count] = cost(stack).parameters - cost(stack, plan).parameters
        if made["order"] and draw == 0:
            run.table("Removal order of the first draw", ["order"], [[" ".join(made["order"])]])

    def perplexity(name: str, count: int) -> float:
        return statistics.mean(each["perplexity"] for each in found[name, count])

    rows = []
    for count in cuts:
        for name in (*makers, "random"):
            fidelities = found[name, count]
            jsd = statistics.mean(each["jsd"] for each in fidelities)
            spread = " ".join(f"{each['perplexity']:.2f}" for each in fidelities)
            rows.append([count, name, perplexity(name, count), jsd, spread, f"{sizes[name, count] / 1e6:.1f} M"])
    base = next(iter(found.values()))[0]["dense"]
    title = f"Test perplexity and JSD (dense {base}), mean over {len(draws)} draws"
    run.table(title, ["removed of 60", "method", "perplexity", "JSD", "per draw", "parameters removed"], rows)

    def against(other: str, count: int) -> Measured:
        """Return the ratios of finercut's perplexity to that of another method on the same draw."""
        pairs = zip(found["finercut", count], found[other, count], strict=True)
        return Measured.over_seeds([ours["perplexity"] / theirs["perplexity"] for ours, theirs in pairs])

    limits = [(6, "one-shot", 0.85), (12, "block influence", 1.05), (12, "one-shot", 0.6)]
    for count, other, limit in (each for each in limits if each[0] in cuts):
        ratio = against(other, count)
        run.further(f"finercut / {other} at {count} removed", f"at most {limit}", ratio, ratio.at_most(limit))
    if 12 in cuts:
        ratio = against("block greedy", 12)
        run.table("Where it crosses", ["finercut / block greedy at 12 removed (no claim)"], [[str(ratio)]])


def last_attentions(stack: Stack) -> PlanSeries:
    """Return the attention sublayers of the last layers, from the last one backwards."""
    order = [(Position(layer, "attn"),) for layer in reversed(range(1, len(stack)))]
    return PlanSeries.of_removals(ModelReference.of(stack), order, [{} for _ in range(len(order) + 1)])


def extensions(record: Record, stack: Stack, tokens: LongTensor, test: FidelityTest) -> None:
    """Report point 4 and our extension, without claims."""
    rows = []
    for name, options in (
        ("x = 0.4", {}),
        ("x = 0", {"exclude_front": 0.0}),
        ("x = 0.4, lazy", {"strategy": "lazy"}),
        ("x = 0.4, refined", {"refine": True}),
    ):
        series = lamella.make_plan("finercut", stack, tokens, share=0.1, **options)
        fidelity = test.of(lamella.apply(stack, series[-1]))
        rows.append([name, series.points[-1].scores["jsd"], fidelity.perplexity.mean, fidelity.jsd.mean])
    record.table(
        "Protection of the first layers, and variants, at 6 removed", ["", "calibration JSD", "perplexity", "JSD"], rows
    )


def speed(record: Record, stack: Stack, tokens: LongTensor, quick: bool) -> None:
    """Check point 6: the time of a forward pass against its MACs."""
    if quick:  # any plan will do
        plan = lamella.make_plan("random", stack, seed=0).removing(12)
    else:
        plan = lamella.make_plan("finercut", stack, tokens, share=0.2, strategy="lazy")[-1]
    view = lamella.apply(stack, plan)
    prompt, rounds = (64, 3) if quick else (512, 9)
    timing = bench({"whole": stack.model, "cut": view}, prompt=prompt, tokens=2, rounds=rounds)["cut"][0]
    # The benchmark asks for the last logits only, so the head counts for one token of the prompt.
    head = sum(p.numel() for p in stack.unembedding.parameters())
    macs = [cost(stack, each, context=prompt // 2).macs - head * (1 - 1 / prompt) for each in (None, plan)]
    ratio = Measured.over_rounds(timing.prefill_speedup, macs[0] / macs[1])
    record.further(f"time of a {prompt}-token forward / MACs", "within 15 %", ratio, ratio.within(0.85, 1.15))


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    calibration, test_text = (lamella.load_text("pydoc", split) for split in ("calibration", "test"))
    count, length = (2, 24) if quick else (4, 128)
    draws = [lamella.windows(tokenizer, calibration, count, length, seed + k) for k in range(1 if quick else 3)]
    test_tokens = lamella.windows(tokenizer, test_text, 3 if quick else 9, 96 if quick else 256, seed)
    run.data = f"calibration {calibration.provenance(draws[0])}, test {test_text.provenance(test_tokens)}"
    test = FidelityTest(stack, test_tokens, prompt=1)

    rows, length, windows, sets = (2, 24, 3, 2) if quick else (10, 256, 30, 8)
    larger = [lamella.windows(tokenizer, calibration, rows, length, seed + k) for k in range(sets)]
    many = lamella.windows(tokenizer, test_text, windows, 96 if quick else 256, seed)
    main_claim(run, stack, larger, FidelityTest(stack, many, prompt=1))
    if not quick:
        selection_quality(run, stack, draws, test, [6, 12])
    if not quick:
        run.part("extensions", extensions, stack, draws[0], test)
    run.part("speed", speed, stack, draws[0], quick)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="two short calibration sets, under a minute"))
