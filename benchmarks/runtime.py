"""How much of the possible decode speed-up a plan brings, on SmolLM2 at batch 1.

The cost model takes the time of one attention half, one MLP half and the rest of a decoding step from the whole model,
so the head and the loop, which no plan removes, are counted. Beside it stands the ratio of bytes read per token, which
would be the speed-up if memory traffic were all.

    python benchmarks/runtime.py            # about 5 minutes on 2 cores
    python benchmarks/runtime.py --quick
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import lamella
from lamella.evaluate import Record, StepTimes, bench, cost, measure_step
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.search import balanced
from lamella.stack import Stack

PROMPT = 128


def plans(stack: Stack) -> dict[str, Plan]:
    """The plans to time; which layers go does not matter for speed."""
    model = ModelReference.of(stack)
    layers = len(stack)

    def without(sites: list[str]) -> Plan:
        return Plan(model=model, drop=sites)

    def inner(count: int) -> list[int]:
        return [layer for layer in range(layers) if layer not in balanced(layers, layers - count)]

    decode = balanced(layers, layers - 10)
    return {
        "nothing removed": without([]),
        "5 layers": without([f"layers.{layer}" for layer in inner(5)]),
        "10 layers": without([f"layers.{layer}" for layer in inner(10)]),
        "15 layers": without([f"layers.{layer}" for layer in inner(15)]),
        "10 attention halves": without([f"layers.{layer}.attn" for layer in inner(10)]),
        "10 MLP halves": without([f"layers.{layer}.mlp" for layer in inner(10)]),
        "first attention and 9 more": without([f"layers.{layer}.attn" for layer in [0, *inner(9)]]),
        "15 attention, 10 MLP halves": without(
            [f"layers.{layer}.attn" for layer in inner(15)] + [f"layers.{layer}.mlp" for layer in inner(10)]
        ),
        "10 layers, while generating": Plan(
            model=model, path={"text": PhasedPath(prefill=list(range(layers)), decode=decode)}
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else 15

    stack = lamella.open("smollm2")
    chosen = plans(stack)
    views = {name: lamella.apply(stack, plan) for name, plan in chosen.items()}
    # The cost model's times and the plans' are read in turn, so that a change of the machine's pace meets both.
    before = [measure_step(stack, prompt=PROMPT, steps=24) for _ in range(3)]
    timings = bench({"whole": stack.model} | views, prompt=PROMPT, tokens=24, rounds=rounds)
    after = [measure_step(stack, prompt=PROMPT, steps=24) for _ in range(3)]
    times = StepTimes(
        *(statistics.median(getattr(t, part) for t in before + after) for part in ("attn", "mlp", "rest"))
    )

    record = Record("runtime", f"{PROMPT} random tokens of prompt, 24 decoding steps, {rounds} interleaved rounds", 0)
    share = times.rest / times.step(None, len(stack))
    record.table(
        "One decoding step of the whole model, milliseconds",
        ["attention half", "MLP half", "rest", "share of the rest"],
        [[times.attn * 1e3, times.mlp * 1e3, times.rest * 1e3, f"{share:.0%}"]],
    )
    rows = []
    for name, plan in chosen.items():
        timing = timings[name][0]
        allowed = times.speedup(plan)
        measured = timing.decode_speedup
        traffic = cost(stack, context=PROMPT).bytes_per_token / cost(stack, plan, context=PROMPT).bytes_per_token
        rows.append(
            [
                name,
                len(plan.skipped),
                traffic,
                allowed,
                str(measured),
                measured.median / allowed,
                f"{timing.variation:.1%}",
            ]
        )
        if plan.skipped:
            ratio = measured.median / allowed
            record.check(f"{name}: decode speed-up / cost model", "at least 0.95", ratio, ratio >= 0.95)
        else:
            record.check(
                "overhead with nothing removed",
                "at most 3 %",
                f"{1 / measured.median - 1:+.1%}",
                measured.median >= 0.97,
            )
    columns = [
        "plan",
        "halves gone",
        "bytes ratio",
        "cost model",
        "decode speed-up",
        "measured / cost model",
        "variation",
    ]
    record.table("Decode speed-up at batch 1", columns, rows)
    name = "runtime-quick.json" if arguments.quick else "runtime.json"
    return record.finish(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    raise SystemExit(main())
