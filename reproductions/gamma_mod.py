"""gamma-MoD at small scale: a nano LLaVA answers questions about rendered shapes, with image tokens that skip layers.

A decoder of eight layers that was trained here to answer is fine-tuned on further questions, one per image, with eight
seeds: unconverted, with the four layers of lowest ARank converted, and the same without the mask. (The authors
fine-tune a model that can only describe images; a model of this size would have to learn positions in every arm, from
some hundred thousand questions.) The main claim: the converted model is at most 3 points less accurate and saves a
quarter of the decoder's compute, the mask does not harm, and ranks agree between halves of the samples. Intervals are
over seeds and test questions; the rate of each arm is tuned. Further checks, some with fewer seeds, are layers of
highest ARank, random layers, the training-free FastV and VTW at equal compute, how well the router predicts in serving
which tokens training selects, what that selection would change, and the time of a prompt of 256 image tokens. Two more
arms look for the cause of a loss: positions that are not renumbered in converted layers, and with them a longer
fine-tuning. SmolLM2's ranks on text are measured, and its four layers of lowest ARank are converted and fine-tuned.

Of some 75 tokens of a test row, the 64 image tokens and those before them may skip layers. With rho = 0.5, as released,
four of eight layers would save at most 22 % of the decoder's compute, and the claim is 25 %: here rho is 0.6, which can
save 27 %.

    python reproductions/gamma_mod.py            # about two hours on one core; an interrupted run resumes
    python reproductions/gamma_mod.py --quick    # a model that does not meet the premise, and the time of a prompt
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import scratch
from harness.vlm import STAGES, WHOLE, asked, opened_vlm, rows_of, trained_vlm
from scipy.stats import rankdata
from torch.nn.functional import cross_entropy

import lamella
from lamella.data import ImageText, Processing
from lamella.evaluate import Ratio, answered
from lamella.evaluate.scored import labelled_batches, scored_states
from lamella.measure import spearman
from lamella.methods.gamma_mod import (
    MixtureOfDepths,
    Routing,
    RoutingTrace,
    attention_ranks,
    lowest,
    observe,
    quantile,
)
from lamella.methods.gamma_mod.baselines import ImageTokenPruning, random_layers
from lamella.methods.gamma_mod.method import prompts
from lamella.methods.gamma_mod.recipe import calibrate, convert, plan_of, policy_image, train
from lamella.plan import ModelReference, PolicyReference
from lamella.runtime import with_policy
from lamella.stack import Stack, last_stack
from lamella.train import Task, TrainConfig, blocks, fit, own, response_loss, with_weights_of
from lamella.zoo.nano import nano
from lamella.zoo.opening import open_processor, open_tokenizer
from lamella.zoo.worlds import QUESTIONS, SIZE

LAYERS, HALF, WIDTH = 8, 4, 128
PROBES, TRACED = 50, 200
LEARNED = 0.6  # required accuracy before fine-tuning
HARM = 0.05  # required loss of accuracy by conversion, before fine-tuning
RHO = 0.6
FASTV = 1  # the layer whose attention selects tokens: the second, as in FastV's paper
PILOT, SEEDS, FEWER = 0, range(1, 9), range(1, 4)
GRID = (2.5e-4, 5e-4, 1e-3)
KEEPS = (0.9, 0.7, 0.5, 0.3)
ROUTING = Routing(skip=RHO)
MORE = 4  # times the steps of fine-tuning
ORIGINAL, LONGER = "lowest, original positions", f"lowest, original positions, {MORE} times the steps"


@dataclass(frozen=True)
class Size:
    """The scale of the experiment: the base model, its fine-tuning, and the numbers of questions."""

    base: float  # of the steps of the small LLaVA
    steps: int
    validation: int
    test: int

    def folder(self) -> Path:
        return trained_vlm("llava", steps=self.base)

    def stack(self) -> Stack:
        """Return the text stack of the model before fine-tuning."""
        return Stack(opened_vlm(self.folder()), stack="text")

    def rows(self, count: int, part: Any, seed: int = 1) -> ImageText:
        return rows_of(self.folder(), QUESTIONS, count, part, seed)

    def training_rows(self, seed: int) -> ImageText:
        """Return the fine-tuning rows that all arms of a seed share."""
        rows = asked(self.steps * STAGES["sft"].config.batch, 2 + 10 * seed, SIZE, (*QUESTIONS, *WHOLE))
        return ImageText(rows, Processing(open_processor(self.folder())))

    def config(self, seed: int, rate: float) -> TrainConfig:
        return replace(STAGES["sft"].config, steps=self.steps, save_every=self.steps, lr=rate, seed=seed)


# The arms


def ranks(size: Size, tasks: Sequence[str]) -> list[list[float]]:
    """Return the ARank of every layer on samples [samples, layers]."""
    stack = size.stack()
    return attention_ranks(stack, prompts(stack, rows_of(size.folder(), tasks, PROBES, "calibration"))).tolist()


def converted(size: Size, seed: int, layers: Sequence[int], rate: float | None, routing: Routing = ROUTING) -> Any:
    """Convert some layers, fine-tune unless the rate is None, and return the view in serving with its thresholds."""
    view = convert(size.stack(), layers, routing, seed)
    if rate is not None:
        with torch.enable_grad():
            train(view, size.training_rows(seed), routing, size.config(seed, rate), scratch("gamma-mod"))
    view.eval()
    policy: MixtureOfDepths = view.lamella_policy
    seen = observe(view, size.rows(PROBES, "calibration", 0))
    policy.training_share = None
    serve(policy, calibrate(seen))
    return view


def serve(policy: MixtureOfDepths, limits: dict[str, list[float]]) -> None:
    policy.thresholds = [torch.tensor(limits[name], dtype=torch.float64) for name in ("prefill", "decode")]


def whole(size: Size, seed: int, rate: float) -> Any:
    """Fine-tune the unconverted model, and return the view."""
    stack, rows = size.stack(), size.training_rows(seed)
    view = lamella.apply(stack, lamella.Plan(model=ModelReference.of(stack)))
    own(view)
    with torch.enable_grad():
        fit(view, rows, Task(response_loss, collate=rows.batch), size.config(seed, rate), out=scratch("gamma-mod"))
    return view.eval()


def nats(view: Any, rows: ImageText) -> float:
    """Return the loss of the answers, in nats per token."""
    total = count = 0.0
    for batch in labelled_batches(rows, PROBES):
        states, labels = scored_states(view, batch)
        total += float(cross_entropy(last_stack(view).logits(states).float(), labels, reduction="sum"))
        count += len(labels)
    return total / count


def validated(size: Size, layers: Sequence[int] | None, routing: Routing, rate: float) -> float:
    """Return the loss of an arm of the pilot on validation questions."""
    view = whole(size, PILOT, rate) if layers is None else converted(size, PILOT, layers, rate, routing)
    return nats(view, size.rows(size.validation, "calibration", 5))


def served(size: Size, seed: int, layers: Sequence[int], rate: float | None, routing: Routing = ROUTING,
           keeps: Sequence[float] = ()) -> dict[str, Any]:  # fmt: skip
    """Test a converted model at calibrated and other thresholds, and with the tokens that training would select.

    Also measure how well the routers at inference predict that selection.
    """
    view = converted(size, seed, layers, rate, routing)
    policy: MixtureOfDepths = view.lamella_policy
    test, few = size.rows(size.test, "test"), size.rows(min(TRACED, size.test), "test")
    now = observe(view, few)
    found: dict[str, Any] = {"right": answered(view, test).tolist(), "work": flops(now, layers), "kept": now.kept()}
    seen, sweep = observe(view, size.rows(PROBES, "calibration", 0)), []
    for keep in keeps:
        limits = [quantile(seen.p[seen.prompt][:, at], keep) for at in range(len(layers))]
        serve(policy, {"prefill": limits, "decode": [-1.0] * len(layers)})
        accuracy = float(answered(view, test).float().mean())
        sweep.append([keep, flops(observe(view, few), layers), 100 * accuracy])
    policy.training_share = RHO
    chosen = observe(view, few)
    found["right, selected as in training"] = answered(view, test).tolist()
    return found | {"sweep": sweep, "auc": auc(now, chosen), "agreed": agreed(now, chosen)}


def unconverted(size: Size, seed: int, rate: float, spent: float) -> dict[str, Any]:
    """Test the fine-tuned unconverted model, and prune its image tokens without training at the compute ``spent``."""
    tuned_model, test = with_weights_of(size.stack(), whole(size, seed, rate)), size.rows(size.test, "test")
    sizes = lengths(tuned_model, size.rows(min(TRACED, size.test), "test"))
    images = sizes[0][1]
    options = {
        "FastV": [{"layer": FASTV, "keep": keep, "criterion": "fastv"} for keep in range(images + 1)],
        "VTW": [{"layer": layer, "keep": 0, "criterion": "withdraw"} for layer in range(LAYERS)],
    }
    found: dict[str, Any] = {"whole": {"right": answered(tuned_model.model, test).tolist(), "work": 1.0}}
    plan = lamella.Plan(model=ModelReference.of(tuned_model), policies={"text": PolicyReference(name="pruned")})
    for name, each in options.items():
        chosen = min(each, key=lambda settings: abs(left_out(sizes, settings["layer"], settings["keep"]) - spent))
        pruned = with_policy(tuned_model, plan, ImageTokenPruning(tuned_model, **chosen))
        found[name] = {
            "right": answered(pruned, test).tolist(),
            "work": left_out(sizes, chosen["layer"], chosen["keep"]),
        }
    return found


def before_tuning(size: Size, layers: Sequence[int]) -> list[float]:
    """Return the accuracy before fine-tuning, of the model and of the converted one with calibrated thresholds."""
    test = size.rows(min(TRACED, size.test), "test", 2)
    return [
        float(answered(each, test).float().mean())
        for each in (size.stack().model, converted(size, PILOT, layers, None))
    ]


# Compute and routers


def lengths(stack: Stack, rows: ImageText) -> list[tuple[int, int]]:
    """Return the number of tokens of each row, and the number of its image tokens."""
    image = policy_image(stack.model)
    return [
        (int(mask.sum()), int((ids == image).sum()))
        for batch in rows.batches(PROBES)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def cost(kept: Sequence[int]) -> int:
    """Return the compute of layers that run for some tokens per row: projections linear, attention quadratic."""
    d, wide = WIDTH, 448
    return sum(k * 2 * (4 * d * d + 3 * d * wide) + k * k * 4 * d for k in kept)


def left_out(sizes: Sequence[tuple[int, int]], layer: int, keep: int) -> float:
    """Return the decoder's compute relative to the whole model, if image tokens are pruned after a layer."""
    left = sum(cost([n] * (layer + 1) + [n - images + keep] * (LAYERS - 1 - layer)) for n, images in sizes)
    return left / sum(cost([n] * LAYERS) for n, _ in sizes)


def flops(seen: RoutingTrace, layers: Sequence[int]) -> float:
    """Return the decoder's compute on these rows relative to the whole model, including the routers."""
    total = left = 0
    for row in seen.row.unique():
        here = seen.row == row
        n, kept = int(here.sum()), seen.ran[here].sum(0).tolist()
        total += cost([n] * LAYERS)
        left += cost([n] * (LAYERS - len(layers)) + kept) + len(kept) * 2 * 2 * n * WIDTH
    return left / total


def auc(now: RoutingTrace, chosen: RoutingTrace) -> float:
    """Return the AUC of the router at inference as a predictor of the image tokens that training selects.

    Both are computed on the same rows: inference is causal and uses hidden states that it has computed itself, so its
    scores differ from those that training ranks.
    """
    found = []
    for layer in range(now.p.shape[1]):
        p, ran = now.p[now.image, layer].numpy(), chosen.ran[chosen.image, layer].numpy()
        if 0 < ran.sum() < len(ran):
            place = rankdata(p)
            some, rest = int(ran.sum()), len(ran) - int(ran.sum())
            found.append((place[ran].sum() - some * (some + 1) / 2) / (some * rest))
    return float(np.mean(found)) if found else float("nan")


def agreed(now: RoutingTrace, chosen: RoutingTrace) -> float:
    """Return the fraction of image tokens for which inference decides as training does."""
    return float((now.ran == chosen.ran)[now.image].double().mean())


# Claims


def claims(run: Run, size: Size) -> None:
    measured = np.array(run.arm("ranks", ranks, size, QUESTIONS))
    by_task = {task: np.array(run.arm(f"ranks on {task}", ranks, size, [task])) for task in ("colour", "relation")}
    order = torch.from_numpy(measured.mean(0))
    low, high = (lowest(sign * order, HALF / LAYERS) for sign in (1, -1))
    run.table(
        "ARank before fine-tuning (fraction of the maximum)",
        ["questions", *map(str, range(LAYERS))],
        [["all", *order.tolist()], *([task, *each.mean(0).tolist()] for task, each in by_task.items())],
    )
    base, changed = run.arm("before fine-tuning", before_tuning, size, low)
    run.premise("accuracy before fine-tuning", f"at least {LEARNED:.0%}", f"{base:.1%}", base >= LEARNED)
    lost = base - changed
    run.premise("accuracy lost by conversion, before fine-tuning", f"at least {HARM:.0%}", f"{lost:.1%}", lost >= HARM)

    no_mask, original = replace(ROUTING, mask=False), replace(ROUTING, positions="original")
    scores = {"whole": partial(validated, size, None, ROUTING), "lowest": partial(validated, size, low, ROUTING),
              "no mask": partial(validated, size, low, no_mask)}  # fmt: skip
    rates = {name: each.value for name, each in tuned(run, scores, GRID).items()}
    run.freeze(
        "mean over seeds and test questions of the difference of accuracies",
        SEEDS, size=vars(size), rates=rates, layers=low, rho=RHO,
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"whole": [], "lowest": [], "no mask": []}
    for seed in SEEDS:
        keeps = KEEPS if seed == SEEDS[0] else ()
        ours = run.arm(f"lowest, seed {seed}", served, size, seed, low, rates["lowest"], keeps=keeps)
        found["lowest"].append(ours)
        found["no mask"].append(run.arm(f"no mask, seed {seed}", served, size, seed, low, rates["no mask"], no_mask))
        others = run.arm(f"whole, seed {seed}", unconverted, size, seed, rates["whole"], ours["work"])
        for name, each in others.items():
            found.setdefault(name, []).append(each)
    for seed in FEWER:
        for name, layers in (("highest", high), ("random", random_layers(LAYERS, HALF, seed))):
            arm = run.arm(f"{name}, seed {seed}", served, size, seed, layers, rates["lowest"])
            found.setdefault(name, []).append(arm)
    longer = replace(size, steps=MORE * size.steps)
    for name, each, seeds in ((ORIGINAL, size, SEEDS), (LONGER, longer, FEWER)):
        found[name] = [run.arm(f"{name}, seed {seed}", served, each, seed, low, rates["lowest"], original)
                       for seed in seeds]  # fmt: skip
    before = [run.arm(f"untrained, seed {seed}", served, size, seed, low, None) for seed in FEWER]
    compared(run, size, found, before)

    def alike(one: np.ndarray, other: np.ndarray) -> float:
        return spearman(one.mean(0), other.mean(0)) or 0.0

    halves = alike(measured[::2], measured[1::2])
    run.main("ranks, rank correlation of two halves of the samples", "at least 0.8", halves, halves >= 0.8)
    tasks = alike(*by_task.values())
    run.further("ranks, rank correlation of two tasks", "at least 0.6", tasks, tasks >= 0.6)


def compared(run: Run, size: Size, found: dict[str, list[dict[str, Any]]], before: list[dict[str, Any]]) -> None:
    right = {name: 100 * np.array([each["right"] for each in arms], float) for name, arms in found.items()}
    run.table(
        f"A nano LLaVA fine-tuned on shapes, {size.test} test questions; rho = {RHO}",
        ["arm", "% correct", "standard deviation over seeds", "decoder FLOPs", "seeds"],
        [[name, each.mean(), each.mean(1).std(ddof=1), np.mean([arm["work"] for arm in found[name]]), len(each)]
         for name, each in right.items()],
    )  # fmt: skip
    ours = found["lowest"]
    run.table("Tokens processed in serving, by converted layer, first seed", ["kind", *map(str, range(HALF))],
              [[kind, *shares] for kind, shares in ours[0]["kept"].items()])  # fmt: skip
    run.table("Thresholds, first seed", ["target", "decoder FLOPs", "% correct"], ours[0]["sweep"])
    run.table(
        "Routers in serving against the choice in training, on held-out image tokens",
        ["router", "AUC", "% of equal decisions", "seeds"],
        [[name, np.mean([each["auc"] for each in arms]), 100 * np.mean([each["agreed"] for each in arms]), len(arms)]
         for name, arms in (("trained", ours), ("before training", before))],
    )  # fmt: skip

    def ahead(other: str, one: str = "lowest") -> Measured:
        """Return by how many points one arm is more accurate than another, over the seeds of both."""
        count = min(len(right[one]), len(right[other]))
        return Measured.over_seeds_and_items(right[one][:count] - right[other][:count])

    lost = ahead("whole")
    run.main("accuracy of lowest minus whole, points", "at least -3", lost, lost.at_least(-3))
    saved = Measured.over_seeds([100 * (1 - each["work"]) for each in ours])
    run.main("decoder FLOPs that the lowest saves, %", "at least 25", saved, saved.at_least(25))
    gain = ahead("no mask")
    run.main("accuracy with mask minus without, points", "at least 0", gain, gain.at_least(0))
    for other in ("highest", "random", "FastV", "VTW"):
        gain = ahead(other)
        run.further(f"accuracy of lowest minus {other}, points", "at least 0", gain, gain.at_least(0))
    for name in (ORIGINAL, LONGER):
        lost = ahead("whole", name)
        run.further(f"accuracy of {name}, minus whole, points", "at least -3", lost, lost.at_least(-3))
    gain = ahead("lowest", ORIGINAL)
    run.further(f"accuracy of {ORIGINAL}, minus lowest, points", "at least 0", gain, gain.at_least(0))
    for name in ("lowest", ORIGINAL, LONGER):
        selected = 100 * np.array([each["right, selected as in training"] for each in found[name]], float)
        lost = Measured.over_seeds_and_items(right[name] - selected)
        said = f"accuracy of {name}, by thresholds minus with tokens selected as in training, points"
        run.further(said, "at least 0", lost, lost.at_least(0))
    area = Measured.over_seeds([each["auc"] for each in ours])
    run.further("router's AUC on held-out image tokens", "at least 0.85", area, area.at_least(0.85))
    more = Measured.over_seeds([a["auc"] - b["auc"] for a, b in zip(ours, before, strict=False)])
    run.further("its AUC minus that of a router before training", "at least 0", more, more.at_least(0))


# The time of a prompt


def prompt_times(run: Run) -> dict[str, Any]:
    """Time a prompt of 256 image tokens at SmolLM2's width, whole and with most of them skipping half of the layers."""
    changes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    stack = Stack(
        nano("llama", max_position_embeddings=1024, num_hidden_layers=HALF if run.quick else LAYERS, **changes)
    )
    ids = torch.randint(3, 120, (1, 280), generator=torch.Generator().manual_seed(run.seed))
    layers = list(range(0, len(stack), 2))
    policy = MixtureOfDepths(stack, layers=layers)
    view = with_policy(stack, plan_of(stack, {"layers": layers}), policy)
    passing = torch.rand(1, 280, generator=torch.Generator().manual_seed(1)) < RHO
    passing[:, 256:] = False
    policy.served_tokens = lambda layer, p, given: ~passing  # type: ignore[method-assign]
    kept = float((~passing).float().mean())
    ratios = []
    for _ in range(4 if run.quick else 20):
        begin = time.perf_counter()
        stack.model(input_ids=ids, use_cache=True)
        middle = time.perf_counter()
        view(input_ids=ids, use_cache=True)
        ratios.append((middle - begin) / (time.perf_counter() - middle))
    ratio, predicted = Ratio.of(ratios[1:]), 1 - (1 - kept) / 2
    return {"ratio": [ratio.median, ratio.low, ratio.high], "kept": kept, "predicted": predicted}


# SmolLM2


def smollm2(run: Run) -> dict[str, Any]:
    """Measure ranks on text, and fine-tune four converted layers from a router that keeps all tokens."""
    stack = lamella.open("smollm2")
    text = lamella.windows(open_tokenizer("smollm2"), lamella.load_text("pydoc", "calibration"), 36, 96, run.seed)
    began = time.perf_counter()
    ranks_of = attention_ranks(stack, [{"input_ids": row[None]} for row in text[:4]])
    seconds = time.perf_counter() - began
    layers = lowest(ranks_of.mean(0), 4 / len(stack))
    routing = Routing(start="keep", text_rows="half")
    view = convert(stack, layers, routing, run.seed)
    config = TrainConfig(steps=100, lr=2e-5, batch=2, log_every=10, save_every=100, seed=run.seed)
    with torch.enable_grad():
        log = train(view, blocks(text[4:], (24, 48), seed=run.seed), routing, config, scratch("gamma-mod"))
    losses = [point.loss for point in log.train]
    return {"ranks": ranks_of.mean(0).tolist(), "seconds": seconds, "losses": losses}


def on_smollm2(run: Run) -> None:
    found = run.arm("SmolLM2", smollm2, run)
    run.table(f"SmolLM2-135M: ARank on 4 texts of 96 tokens, in {found['seconds']:.0f} s", ["layer", "ARank"],
              [[layer, rank] for layer, rank in enumerate(found["ranks"])])  # fmt: skip
    run.table("Its four lowest layers, tuned", ["point", "loss"], [list(each) for each in enumerate(found["losses"])])


@torch.no_grad()
def experiment(run: Run) -> None:
    run.data = "rendered shapes: captions and questions; held-out test scenes"
    found = run.arm("time of a prompt", prompt_times, run)
    ratio = Measured(*found["ratio"])
    run.table(
        "A prompt of 256 image tokens and 24 others, SmolLM2's width, every other layer converted",
        ["tokens that a converted layer keeps", "speed-up", "predicted"],
        [[found["kept"], str(ratio), 1 / found["predicted"]]],
    )
    saved = Measured(*((1 - 1 / each) / (1 - found["predicted"]) for each in found["ratio"]))
    run.further("time saved relative to the saved compute", "at least 0.5", saved, saved.at_least(0.5))
    claims(run, QUICK if run.quick else FULL)
    on_smollm2(run)


FULL = Size(base=1.0, steps=250, validation=300, test=1000)
QUICK = Size(base=0.002, steps=4, validation=8, test=12)

if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a model that does not meet the premise, and few timed rounds"))
