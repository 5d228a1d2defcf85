"""Which cut to heal, and how, by what is reached in the same CPU time.

SmolLM2 loses nine layers, which are chosen by one pass (block influence, the angular window), by the short search of
`portfolio`, or by the long one, with its greedy search. Each cut is healed by the same distillation for the same CPU
time, so the time of planning comes on top: a longer search has to pay for itself. The cut of the short search is then
healed in other ways: from a refit in closed form, with batches of a half and a quarter of the size, with all weights
but the vocabulary, with intermediate states, with layers that fade out during the first half of the steps, with four
epochs over a quarter of the text, in which the teacher runs only once, and on text that the original wrote at
temperature 1 instead of the built-in one.

The CPU time of a step is measured beforehand for each way and determines its number of steps. Random seeds determine
adapters and the order of the training text, and ways are compared seed by seed, on kinds of text that are not trained
on. All computations use one thread.

    python benchmarks/ways.py            # about two hours; resumes after an interruption
    python benchmarks/ways.py --quick    # a few steps of each
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor
from transformers.modeling_outputs import BaseModelOutputWithPast

import lamella
from lamella.commands.compress.healing import SCHEDULE, TEXT, TOKENS, UNSEEN, WHOLE
from lamella.commands.heal.training import available
from lamella.evaluate import FidelityTest
from lamella.files import Finished
from lamella.plan import ModelReference, Plan
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import TrainConfig, blocks, distil
from lamella.train.parameters import in_bfloat16
from lamella.train.refit import refit
from lamella.train.trained import Healed
from lamella.zoo import computes_well, open_tokenizer
from lamella.zoo.cache import cache_folder

REMOVED = 9  # layers
LONG, SHORT = "portfolio, greedy search too", "portfolio, short search"
PLANNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "block influence": ("shortgpt", {}),
    "angular window": ("window", {}),
    SHORT: ("portfolio", {"greedy": False, "minutes": 1.6}),  # a fifth of eight minutes of healing
    LONG: ("portfolio", {}),
}
CALIBRATION = (16, 256)  # sequences and tokens
SECONDS = 120  # CPU time of healing
SEQUENCES = 8  # of the text that is fitted in closed form
WRITTEN = 112  # blocks that the original writes: as many as are trained on
PLAIN, REFIT = "from the pruned model", "refit first"
EPOCHS = 4
ADAPTERS: dict[str, Any] = {"lora": 128, "lr": 2e-3, "vocabulary": False}  # of the way with which others are compared
BATCH = 4  # blocks in a step of it
STEPS_MEASURED = 4  # so many that each epoch of a way has one


@dataclass(frozen=True)
class Way:
    """A way to heal: what differs from distillation from the pruned model, with four blocks a step.

    Attributes:
        options: options of the distillation.
        config: settings of its training.
        refits: whether it starts from a refit.
        fades: whether the removed layers fade out during the first half of the steps.
        epochs: number of epochs, in which the teacher runs only once; 0 for new text in every step.
        written: whether it trains on text that the original wrote.
    """

    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    refits: bool = False
    fades: bool = False
    epochs: int = 0
    written: bool = False


WAYS = {
    PLAIN: Way(),
    REFIT: Way(refits=True),
    "two blocks a step": Way(config={"batch": BATCH // 2, "lr": ADAPTERS["lr"] * 0.75}),
    "one block a step": Way(config={"batch": 1, "lr": ADAPTERS["lr"] * 0.5}),
    "all weights but the vocabulary": Way(options={"lora": None}, config={"lr": WHOLE["lr"]}),
    "intermediate states too": Way(options={"intermediate": True}),
    "layers fade out": Way(fades=True),
    f"{EPOCHS} epochs, the teacher runs once": Way(epochs=EPOCHS),
    "on text that the original wrote (its time is not counted)": Way(written=True),
}


class Remembering:
    """Mixed into the body of a teacher: its final states of a sequence are computed once."""

    def forward(self, input_ids: LongTensor, **given: Any) -> BaseModelOutputWithPast:
        """Return the final states [batch, time, hidden] of sequences without padding."""
        known = self.__dict__.setdefault("known", {})
        keys = [row.numpy().tobytes() for row in input_ids]
        new = [number for number, key in enumerate(keys) if key not in known]
        if new:
            states = super().forward(input_ids=input_ids[new], use_cache=False).last_hidden_state  # type: ignore[misc]
            known |= {keys[number]: each for number, each in zip(new, states, strict=True)}
        return BaseModelOutputWithPast(last_hidden_state=torch.stack([known[key] for key in keys]))


def remembering(stack: Stack) -> Stack:
    """Return a teacher with the weights of a model, whose final states of a sequence are computed once."""
    model = share(stack.model)
    body = type(model.model)
    model.model.__class__ = type(f"Remembering{body.__name__}", (Remembering, body), {})
    return Stack(model, name=stack.name)


class Fading:
    """A forward hook of layers that fade out linearly over some training steps.

    Args:
        first: the first of the layers.
        steps: number of steps.
    """

    def __init__(self, first: Any, steps: int) -> None:
        self.gain, self._per_step = 1.0, 1 / steps
        first.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            self.gain = max(0.0, self.gain - self._per_step)

    def __call__(self, module: Any, args: tuple[Any, ...], out: Any) -> Any:
        return args[0] + self.gain * (out - args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Fading:
        return self  # copies of the layers fade together


def fading(stack: Stack, plan: Plan, steps: int) -> Stack:
    """Return a model whose removed layers fade out over some training steps."""
    model = share(stack.model)
    layers = [model.model.layers[number] for number in sorted({int(site.split(".")[1]) for site in plan.drop})]
    fades = Fading(layers[0], steps)
    for layer in layers:
        layer.register_forward_hook(fades)
    return Stack(model, name=stack.name)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the CPU seconds that it took."""
    begin = time.process_time()
    found = work()
    return found, time.process_time() - begin


def distilled(original: Stack, start: Stack, plan: Plan, tokens: LongTensor, steps: int, seed: int, way: Way) -> Healed:
    """Distil the original into a pruned model for some steps."""
    if way.fades:
        half = steps // 2
        whole = Plan(model=ModelReference.of(start))
        constant = replace(way, fades=False, config=way.config | {"schedule": "constant"})
        faded = distilled(original, fading(start, plan, half), whole, tokens, half, seed, constant)
        decaying = replace(way, fades=False, config=way.config | {"warmup": 0.0})
        rest = Plan(model=ModelReference.of(faded.stack), drop=plan.drop)
        return distilled(original, faded.stack, rest, tokens, steps - half, seed + 1000, decaying)
    if way.epochs:
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        tokens, original = tokens[order[: max(1, steps // way.epochs) * BATCH]], remembering(original)
    fast = computes_well(torch.bfloat16, original.device)
    settings: dict[str, Any] = {"lr": ADAPTERS["lr"], "batch": BATCH} | SCHEDULE | way.config
    config = TrainConfig(steps=steps, save_every=10_000, bf16=fast, seed=seed, **settings)
    adapters = {name: value for name, value in ADAPTERS.items() if name != "lr"}
    options: dict[str, Any] = {"intermediate": False} | adapters | way.options
    folder = Path(tempfile.mkdtemp(prefix="lamella-ways-"))
    torch.manual_seed(seed)
    try:
        samples = blocks(tokens, loss_on="all")
        return distil(start, plan, samples, config=config, teacher=original, out=folder / "run", **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def layers_of(drop: list[str]) -> str:
    """Return the numbers of the removed layers."""
    return " ".join(sorted({site.split(".")[1] for site in drop}, key=int))


def apart(ours: list[float], theirs: list[float]) -> str:
    gains = [one - other for one, other in zip(ours, theirs, strict=True)]
    mean = statistics.mean(gains)
    return f"{mean:+.3f} ± {statistics.stdev(gains):.3f}" if len(gains) > 1 else f"{mean:+.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--seeds", type=int, default=3, help="number of random seeds of the distillation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, seeds = arguments.quick, range(1 if arguments.quick else arguments.seeds)
    seconds = 20 if quick else SECONDS
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    count = available(tokenizer, TEXT, TOKENS, BATCH)
    text_tokens = lamella.windows(tokenizer, lamella.load_text(TEXT, "calibration"), count, TOKENS, 0)
    calibration = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), *CALIBRATION, 0)
    tests = UNSEEN[: 1 if quick else None]

    @cache
    def test_on(text: str) -> FidelityTest:
        """Return the test on a text; a run that only collects earlier results needs none."""
        return FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(text, "test"), 8, TOKENS, 0))

    depends = {
        "planners": PLANNERS,
        "calibration": CALIBRATION,
        "removed": REMOVED,
        "healing": str([ADAPTERS, WHOLE, SCHEDULE, BATCH]),
        "blocks": count,
        "refit": SEQUENCES,
    }
    finished = Finished(cache_folder() / "benchmarks" / f"ways{'-quick' if quick else ''}.jsonl", depends)

    def reached(model: Any) -> dict[str, float]:
        return {text: test_on(text).of(model).kl.mean for text in tests}

    def planned(slug: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the layers that a planner removes, its CPU time, and what is left before healing."""
        share = REMOVED / len(stack)
        goal = {} if slug in ("shortgpt", "window") else {"share": share}
        series, spent = timed(partial(lamella.make_plan, slug, stack, calibration, **goal, **options))
        plan = series.removing(2 * REMOVED)
        return {"drop": plan.drop, "seconds": spent, "kl": reached(lamella.apply(stack, plan))}

    def plan_of(drop: list[str]) -> Plan:
        return Plan(model=ModelReference.of(stack), drop=drop)

    def cost_of_a_step(drop: list[str], way: Way) -> float:
        steps = partial(distilled, stack, stack, plan_of(drop), tokens_of(way), STEPS_MEASURED, 0, way)
        return min(timed(steps)[1] for _ in range(1 if quick else 2)) / STEPS_MEASURED

    def written() -> list[list[int]]:
        """Return sequences that the original writes, token by token."""
        torch.manual_seed(0)
        begin = torch.full((16 if quick else WRITTEN, 1), stack.config.bos_token_id)
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        length = {"min_new_tokens": TOKENS - 1, "max_new_tokens": TOKENS - 1}
        model = in_bfloat16(stack.model)
        found: list[list[int]] = model.generate(
            begin, attention_mask=torch.ones_like(begin), **options, **length
        ).tolist()
        return found

    def tokens_of(way: Way) -> LongTensor:
        return torch.tensor(finished.once("text that the original writes", written)) if way.written else text_tokens

    def refitted(drop: list[str]) -> tuple[Healed, float]:
        return timed(partial(refit, stack, plan_of(drop), text_tokens[:SEQUENCES]))

    def refitted_alone(drop: list[str]) -> dict[str, Any]:
        fitted, spent = refitted(drop)
        return {"seconds": spent, "kl": reached(fitted.view), "sites": fitted.findings["refit"]}

    def healed(drop: list[str], way: Way, seed: int, cost: float) -> dict[str, Any]:
        """Heal for some CPU seconds, those of a refit among them."""
        fitted, spent = refitted(drop) if way.refits else (None, 0.0)
        start = stack if fitted is None else fitted.stack
        steps = max(2, round((seconds - spent) / cost))
        found, rest = timed(partial(distilled, stack, start, plan_of(drop), tokens_of(way), steps, seed, way))
        return {"seconds": spent + rest, "steps": steps, "kl": reached(found.view)}

    cuts = {
        name: finished.once(f"cut: {name}", partial(planned, slug, options))
        for name, (slug, options) in list(PLANNERS.items())[1 if quick else 0 : 3 if quick else None]
    }
    drop = cuts[SHORT]["drop"]
    costs = {name: finished.once(f"cost of a step, {name}", partial(cost_of_a_step, drop, way))
             for name, way in WAYS.items()}  # fmt: skip
    alone = finished.once("refit alone", partial(refitted_alone, drop))
    of_cuts: dict[str, list[dict[str, Any]]] = {name: [] for name in cuts}
    of_ways: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for seed in seeds:
        for name, cut in cuts.items():
            find = partial(healed, cut["drop"], WAYS[PLAIN], seed, costs[PLAIN])
            removed = " ".join(cut["drop"])  # planners often choose the same layers
            of_cuts[name].append(finished.once(f"without {removed}, {seconds} s, seed {seed}", find))
        of_ways[PLAIN].append(of_cuts[SHORT][-1])
        for name, way in list(WAYS.items())[1:]:
            find = partial(healed, drop, way, seed, costs[name])
            of_ways[name].append(finished.once(f"{name}, {seconds} s, seed {seed}", find))

    record = Record(
        "ways",
        f"{count} blocks of {TOKENS} tokens of {TEXT}; {REMOVED} of {len(stack)} layers of SmolLM2 removed; tested on "
        f"{' and '.join(tests)}; random seeds 0 to {seeds[-1]}",
        seeds[0],
    )
    on = [f"KL on {text}, nats" for text in tests]

    def means(found: list[dict[str, Any]]) -> list[float]:
        return [statistics.mean(each["kl"][text] for each in found) for text in tests]

    def columns_of(text: str, found: list[dict[str, Any]]) -> list[float]:
        return [each["kl"][text] for each in found]

    record.table(
        f"Cuts of {REMOVED} layers, and after {seconds} CPU seconds of distillation (mean of {len(seeds)} seeds)",
        ["chosen by", "CPU seconds of planning", "layers", *(f"{each}, cut" for each in on),
         *(f"{each}, healed" for each in on)],
        [[name, cut["seconds"], layers_of(cut["drop"]),
          *cut["kl"].values(), *means(of_cuts[name])] for name, cut in cuts.items()],
    )  # fmt: skip
    record.table(
        f"Ways to heal the cut of {SHORT}, {seconds} CPU seconds (mean of {len(seeds)} seeds)",
        ["", "steps", "CPU seconds", *on, *(f"{each}, minus {PLAIN}" for each in on)],
        [["cut", 0, 0, *cuts[SHORT]["kl"].values(), *["" for _ in tests]],
         ["refit alone", 0, alone["seconds"], *alone["kl"].values(), *["" for _ in tests]],
         *([name, each[0]["steps"], statistics.mean(one["seconds"] for one in each), *means(each),
            *(apart(columns_of(text, each), columns_of(text, of_ways[PLAIN])) for text in tests)]
           for name, each in of_ways.items())],
    )  # fmt: skip
    errors = [[site["site"], site["ridge"], site["before"], site["after"]] for site in alone["sites"]]
    title = "Refit: squared relative error of the residual stream on held-out text"
    record.table(title, ["corrected", "ridge", "before", "after"], errors)

    for text in tests:
        kl = cuts[SHORT]["kl"][text], alone["kl"][text]
        record.check(f"KL on {text}, refit alone", "below that of the cut", f"{kl[1]:.3f} / {kl[0]:.3f}", kl[1] < kl[0])
        if LONG in of_cuts:
            short, long = columns_of(text, of_cuts[SHORT]), columns_of(text, of_cuts[LONG])
            lost = [one - other for one, other in zip(short, long, strict=True)]
            noise = statistics.stdev(lost) if len(lost) > 1 else 0.0
            record.check(
                f"KL on {text} after healing, the short search minus the long one",
                "at most its standard deviation over seeds: nothing is lost",
                apart(short, long),
                statistics.mean(lost) <= noise,
            )
        for name, found in list(of_ways.items())[1:]:
            gains = [b - a for a, b in zip(columns_of(text, found), columns_of(text, of_ways[PLAIN]), strict=True)]
            wins = min(gains) > 0 and (len(gains) == 1 or statistics.mean(gains) > statistics.stdev(gains))
            record.check(
                f"KL on {text}, {PLAIN} against {name}",
                "not worse for every seed by more than the standard deviation",
                apart(columns_of(text, found), columns_of(text, of_ways[PLAIN])),
                not wins,
            )
    return record.finish(Path(__file__).parent / "results" / f"ways{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
