"""Compiled decoding of a static plan, compared with eager decoding, on SmolLM2.

``torch.compile`` needs a cache of fixed size, so all four models here decode with a static one: the original and a view
without five layers and five MLPs, each eager and compiled. They alternate step by step in one process, and must
generate the same tokens; the plan's speed-up must remain when both models are compiled.

    python benchmarks/compiled.py            # about 5 minutes on 2 cores, most of it compiling
    python benchmarks/compiled.py --quick    # a nano model
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

import lamella
from lamella.evaluate import Ratio
from lamella.evaluate.speed import clock
from lamella.plan import ModelReference, Plan
from lamella.progress import track
from lamella.results import Record
from lamella.stack import Stack

PROMPT = 128


class Decoder:
    """Greedy decoding with a static cache, one step at a time.

    Attributes:
        tokens: the generated tokens.
        seconds: of each step.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, steps: int, compiled: bool) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + steps)
        self.step = torch.compile(model.forward, fullgraph=True) if compiled else model.forward
        self.following = model(input_ids=prompt, cache=self.cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        self.tokens: list[int] = []
        self.seconds: list[float] = []

    def decode(self) -> None:
        begin = clock(self.following.device)
        logits = self.step(input_ids=self.following, cache=self.cache).logits
        self.seconds.append(clock(self.following.device) - begin)
        self.following = logits[:, -1:].argmax(-1)
        self.tokens.append(int(self.following))


def shorter(stack: Stack) -> Plan:
    """Return a plan that keeps the first attention, which counts the tokens of a static cache."""
    layers = len(stack)
    whole = [f"layers.{layer}" for layer in range(layers - 2, layers // 2, -2)][:5]
    sublayers = [f"layers.{layer}.mlp" for layer in range(2, layers // 2, 2)][:5]
    return Plan(model=ModelReference.of(stack), drop=whole + sublayers)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a nano model")
    arguments = parser.parse_args()
    steps, warm = (24, 6) if arguments.quick else (72, 8)  # the first steps compile
    stack = lamella.open(lamella.zoo.nano("llama") if arguments.quick else "smollm2")
    plan = shorter(stack)
    view = lamella.apply(stack, plan)
    prompt = torch.randint(stack.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    decoders = {
        f"{name}, {how}": Decoder(model, prompt, steps, compiled=how == "compiled")
        for name, model in (("whole model", stack.model), ("view", view))
        for how in ("eager", "compiled")
    }
    for _ in track(range(steps), "decoding"):
        for decoder in decoders.values():
            decoder.decode()

    record = Record(
        "compiled", f"{steps - warm} steps after {PROMPT} random tokens, {plan.removed:g} sublayers removed", 0
    )
    seconds = {name: decoder.seconds[warm:] for name, decoder in decoders.items()}
    first = seconds["whole model, eager"]
    ratios = {name: Ratio.of([a / b for a, b in zip(first, each, strict=True)]) for name, each in seconds.items()}
    rows = [[name, 1e3 * statistics.median(each), str(ratios[name])] for name, each in seconds.items()]
    record.table("decoding, one token at a time", ["", "ms per step", "speed-up (quartiles)"], rows)
    for name in ("whole model", "view"):
        same = decoders[f"{name}, eager"].tokens == decoders[f"{name}, compiled"].tokens
        record.check(f"{name}: tokens of compiled and eager decoding", "the same", same, same)
    for how in ("eager", "compiled"):
        pairs = zip(seconds[f"whole model, {how}"], seconds[f"view, {how}"], strict=True)
        ratio = Ratio.of([whole / view for whole, view in pairs])
        record.check(f"{how}: view against whole model", "faster", str(ratio), ratio.median > 1)
    return record.finish(Path(__file__).parent / "results" / f"compiled{'-quick' if arguments.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
