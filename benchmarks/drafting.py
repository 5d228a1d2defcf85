"""What drafts gain on SmolLM2, predicted and measured, and whether the tokens are those without a draft.

Four kinds of prompts are answered greedily in float32, with prompt lookup by the model and four plans for it, and with
a draft model that is cut from the model itself. For every prompt the tokens are compared with those without a draft,
and the times of both are measured one after the other, with one thread.

    python benchmarks/drafting.py            # an hour of one core; resumes after an interruption
    python benchmarks/drafting.py --quick    # one prompt of each kind
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import lamella
from lamella.evaluate import DraftGain, Ratio, drafted_prompts
from lamella.files import Finished
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.results import Record
from lamella.runtime import Draft
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder

PROMPTS = 50  # of each kind, for prompt lookup
OF_MODEL = 10  # of each kind, for a draft model
TOKENS = 32  # generated for each prompt
REMOVED = [12, 13, 14, 15]
ORDER = [*range(10), 9, *range(10, 30)]  # layer 9 runs twice
DECODED = [layer for layer in range(30) if layer not in (13, 17)]  # layers that generated tokens run
DRAFT = "4 layers removed"  # the plan of the draft model


def plans(stack: Any) -> dict[str, Plan]:
    """Return five plans for SmolLM2, the first of which changes nothing."""
    model, every = ModelReference.of(stack), list(range(len(stack)))
    return {
        "whole": Plan(model=model),
        DRAFT: Plan(model=model, drop=[f"layers.{layer}" for layer in REMOVED]),
        "4 sublayers removed": Plan(
            model=model, drop=["layers.12.attn", "layers.14.mlp", "layers.16.attn", "layers.25.mlp"]
        ),
        "a layer runs twice": Plan(model=model, path={"text": PhasedPath(prefill=ORDER, decode=ORDER)}),
        "28 layers after the prompt": Plan(model=model, path={"text": PhasedPath(prefill=every, decode=DECODED)}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt of each kind")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    suffix = "-quick" if quick else ""
    depends = {"tokens": TOKENS, "plans": {name: plan.digest for name, plan in plans(stack).items()}}
    finished = Finished(cache_folder() / "benchmarks" / f"drafting{suffix}.jsonl", depends)
    prompts = drafted_prompts(tokenizer, 1 if quick else PROMPTS)

    def gains(name: str, kind: str, draft: Draft, count: int) -> list[dict[str, Any]]:
        view = lamella.apply(stack, plans(stack)[name])
        return [vars(DraftGain.of(view, draft, each, TOKENS)) for each in prompts[kind][:count]]

    of_model = Draft(DRAFT, lamella.apply(stack, plans(stack)[DRAFT]))
    arms = [(name, Draft(), PROMPTS) for name in plans(stack)] + [("whole", of_model, OF_MODEL)]
    found = {
        (name, draft.name, kind): finished.once(
            f"{name}, draft {draft.name}, {kind}", partial(gains, name, kind, draft, count)
        )
        for name, draft, count in arms
        for kind in prompts
    }

    record = Record("drafting", f"four kinds of prompts, {TOKENS} tokens each", 0)
    rows = [
        [
            name,
            draft,
            kind,
            *(
                f"{mean(each[part] for each in rows):.2f}"
                for part in ("accepted", "verifying", "drafting", "predicted")
            ),
            str(Ratio.of([each["measured"] for each in rows])),
        ]
        for (name, draft, kind), rows in found.items()
    ]
    columns = ["model", "draft", "prompts", "accepted", "pass", "of the draft", "predicted", "measured (quartiles)"]
    record.table("Speed-up of decoding; the time of a pass and of a draft in steps without it", columns, rows)
    every = [each for rows in found.values() for each in rows]
    same = sum(each["equal"] for each in every)
    record.check(
        "answers whose tokens are those without a draft",
        "all, but for tokens that are tied within the precision",
        f"{same} of {len(every)}, {sum(each['tied'] for each in every)} after a tie",
        all(each["equal"] or each["tied"] for each in every),
    )
    for kind in ("rewriting", "humaneval"):
        if kind in prompts:
            gain = Ratio.of([each["measured"] for each in found["whole", "lookup", kind]])
            record.check(f"speed-up by prompt lookup, {kind}", "more than 1", str(gain), gain.median > 1)
    return record.finish(Path(__file__).parent / "results" / f"drafting{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
