"""gamma-MoD at small scale: a nano LLaVA that answers questions about rendered shapes, and lets image tokens pass.

First what must be exact. Then a decoder of eight layers, whose text and projector are trained here on shapes, is
tuned to answer: whole, with the four layers of lowest ARank converted, of highest, others by chance, all of them, and
without parts of the method; nothing is claimed where the whole model has not learnt to. Of it: how stable ranks are
between halves of the samples and between tasks; accuracy and work of each arm; accuracy over thresholds; how well the
router foresees which tokens training takes. Last, the time of a prompt of 256 image tokens, and SmolLM2, whose ranks
on text are measured and whose four lowest layers are converted and tuned.

    python reproductions/gamma_mod.py            # about two hours on one core; stopped, it goes on
    python reproductions/gamma_mod.py --quick    # what is exact, and the time of a prompt
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.vlm import STAGES, conversations, opened_vlm, rows_of, trained_vlm
from torch import Tensor

import lamella
from lamella.data import ImageText, Processing
from lamella.evaluate import Ratio, answered
from lamella.measure import spearman
from lamella.methods.gamma_mod import (
    MixtureOfDepths,
    Routing,
    Seen,
    attention_ranks,
    lowest,
    observed,
    quantile,
    rank_of,
)
from lamella.methods.gamma_mod.baselines import random_layers
from lamella.methods.gamma_mod.method import prompts
from lamella.methods.gamma_mod.recipe import calibrated, converted, planned, train
from lamella.runtime import parallel, with_policy
from lamella.stack import Stack
from lamella.train import Task, TrainConfig, blocks, fit, own, response_loss
from lamella.zoo.nano import nano
from lamella.zoo.opening import open_processor, open_tokenizer

TASKS = ("colour", "count", "position", "relation")
LAYERS, HALF = 8, 4
PROBES, TEST = 50, 300
LEARNT = 0.7  # of all questions: below that nothing is claimed
RHO = 0.5
SEEDS = (0, 1, 2)
KEEPS = (0.9, 0.7, 0.5, 0.3)
SFT = replace(STAGES["sft"].config, weight_decay=0.05, warmup=0.05, log_every=25, save_every=50)


# What must be exact


def exactness(run: Run) -> None:
    torch.manual_seed(run.seed)
    ids = torch.randint(3, 120, (3, 14))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    stack, lengths, real = Stack(nano("llama")), torch.full((3,), 9), mask.bool()
    whole = stack.model(input_ids=ids, attention_mask=mask).logits

    def viewed(**params: Any) -> tuple[Any, MixtureOfDepths]:
        policy = MixtureOfDepths(stack, layers=[1, 3], **params)
        return with_policy(stack, planned(stack, {"layers": [1, 3]}), policy), policy

    view, policy = viewed(start="keep")
    policy.training_share = 0.0
    apart = float((parallel(view, ids, lengths, mask).logits - whole)[real].abs().max())
    run.exact("rho = 0 and p = 1 against the model", "below 1e-5", f"{apart:.1e}", apart < 1e-5)
    view, policy = viewed(prefill=1.0, decode=1.0)
    context = stack.context({"input_ids": ids, "attention_mask": mask})
    without = stack.head(stack.execute(context, [0, 2]))
    apart = float((parallel(view, ids, lengths, mask).logits - without)[real].abs().max())
    run.exact("no token processed: the layer is the identity", "0", f"{apart:.1e}", apart == 0)
    cached(run, stack, viewed(prefill=0.5, decode=0.5)[0], ids, mask)
    causality(run, *viewed(prefill=0.5, decode=0.5), ids)
    sink = torch.zeros(1, 12, 12)
    sink[..., 0] = 1
    uniform = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
    ranks = [float(rank_of(each)[0]) for each in (sink, uniform[None])]
    run.exact("ranks of a sink and of uniform attention over 12 tokens", "1 and 11", str(ranks), ranks == [1, 11])
    p = torch.rand(1000)
    left = float((p > quantile(p, 0.3)).float().mean())
    run.exact("the quantile that keeps 0.3 of 1000", "0.3", f"{left:.3f}", abs(left - 0.3) < 1e-6)
    shapes = {name: tuple(each.shape) for name, each in policy.state_dict().items()}
    run.exact("the shared router", "2 d weights, once", str(shapes), shapes == {"router": (1, 2, 32)})


def cached(run: Run, stack: Stack, view: Any, ids: Tensor, mask: Tensor) -> None:
    """Greedy generation against whole sequences, for a row alone and for a ragged batch."""
    for rows in (slice(1, 2), slice(None)):
        given = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        out = view.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
                            output_logits=True, return_dict_in_generate=True)  # fmt: skip
        grown = torch.cat([given["attention_mask"], torch.ones_like(out.sequences[:, 14:])], 1)
        lengths, positions = torch.full((len(grown),), 14), (grown.cumsum(-1) - 1).clamp(min=0)
        again = parallel(view, out.sequences, lengths, grown, position_ids=positions).logits[:, 13:-1]
        apart = float((torch.stack(out.logits, 1) - again).abs().max())
        run.exact(f"cached against recomputed, {len(grown)} rows", "below 1e-4", f"{apart:.1e}", apart < 1e-4)


def causality(run: Run, view: Any, policy: MixtureOfDepths, ids: Tensor) -> None:
    """A later token changes earlier outputs in training, which looks ahead, and never in serving."""
    other = ids.clone()
    other[:, -3:] = (other[:, -3:] + 7) % 100 + 3
    lengths = torch.full((3,), 4)

    def moved() -> float:
        before, after = (parallel(view, each, lengths).logits[:, :-3] for each in (ids, other))
        return float((before - after).abs().max())

    served = moved()
    policy.training_share, policy.text_rows = RHO, "half"
    trained = moved()
    run.exact("later tokens change earlier outputs in serving", "below 1e-5", f"{served:.1e}", served < 1e-5)
    run.exact("and in training, which looks ahead", "above 1e-4", f"{trained:.1e}", trained > 1e-4)


# The nano model


def begun(seed: int) -> tuple[Any, Stack]:
    """The folder of the model before it is tuned, and its text."""
    folder = trained_vlm("llava", "alignment", seed)
    return folder, Stack(opened_vlm(folder), stack="text")


def ranks(run: Run, tasks: Sequence[str]) -> list[list[float]]:
    """ARank of every layer on samples [samples, layers]."""
    folder, stack = begun(run.seed)
    return attention_ranks(stack, prompts(stack, rows_of(folder, tasks, PROBES, "calibration"))).tolist()


def tuned(run: Run, name: str, seed: int, layers: Sequence[int], **changes: Any) -> dict[str, Any]:
    """One arm: tuned from the same weights on the same rows, calibrated, and tested."""
    folder, stack = begun(seed)
    config = replace(SFT, seed=seed)
    processing = Processing(open_processor(folder))
    rows = ImageText(conversations((config.steps or 0) * config.batch, 2 + 10 * seed, 32), processing)
    place = run.work / name.replace(" ", "-")
    test = rows_of(folder, TASKS, TEST, "test", 1)
    if not layers:
        view = lamella.apply(stack, lamella.Plan(model=lamella.ModelReference.of(stack)))
        own(view)
        fit(view, rows, Task(response_loss, collate=processing.batch), config, out=place)
        return {"right": answered(view.eval(), test).tolist(), "work": 1.0}
    routing = Routing(skip=RHO, **changes)
    view = converted(stack, layers, routing, seed)
    train(view, rows, routing, config, place)
    few = rows_of(folder, TASKS, PROBES, "calibration")
    foreseen = auc(observed(view.eval(), test))
    seen = observed(view, few)
    policy: MixtureOfDepths = view.lamella_policy
    policy.training_share = None
    sweep = []
    for keep in (None, *KEEPS):
        limits = calibrated(seen)
        if keep is not None:
            limits["prefill"] = [quantile(seen.p[seen.prompt][:, at], keep) for at in range(len(layers))]
        policy.thresholds = [torch.tensor(limits["prefill"]), torch.tensor(limits["decode"])]
        right, served = answered(view, test).tolist(), observed(view, test)
        sweep.append({"keep": keep, "right": right, "work": flops(served, layers), "kept": served.kept()})
    return sweep[0] | {"auc": foreseen, "sweep": sweep[1:]}


def flops(seen: Seen, layers: Sequence[int]) -> float:
    """The decoder's work on these rows in that of the whole one: a share of projections, its square of attention."""
    d, wide = 128, 448
    total = left = 0.0
    for row in seen.row.unique():
        here = seen.row == row
        n, kept = int(here.sum()), seen.ran[here].sum(0).tolist()
        linear, product = 2 * (4 * d * d + 3 * d * wide), 4 * d
        whole = n * linear + n * n * product
        total += LAYERS * whole
        left += (LAYERS - len(layers)) * whole
        left += sum(k * linear + k * k * product + 2 * 2 * n * d for k in kept)
    return left / total


def auc(seen: Seen) -> float:
    """How often the router gives a token that training takes more than one that it does not; of tokens of images."""
    found = []
    for layer in range(seen.p.shape[1]):
        p, ran = seen.p[seen.image, layer].double().numpy(), seen.ran[seen.image, layer].numpy()
        if 0 < ran.sum() < len(ran):
            place = np.argsort(np.argsort(p, kind="stable")) + 1
            some, rest = int(ran.sum()), len(ran) - int(ran.sum())
            found.append((place[ran].sum() - some * (some + 1) / 2) / (some * rest))
    return float(np.mean(found)) if found else float("nan")


def claims(run: Run) -> None:
    by_task = {task: run.arm(f"ranks on {task}", ranks, run, [task]) for task in ("colour", "relation")}
    both = np.array(run.arm("ranks", ranks, run, TASKS))
    mean = both.mean(0)
    run.table("ARank before tuning, as a share of the highest possible", ["layer", *range(LAYERS)],
              [["all tasks", *mean], *([task, *np.mean(each, 0)] for task, each in by_task.items())])  # fmt: skip
    halves = spearman(both[::2].mean(0), both[1::2].mean(0)) or 0.0
    run.main("ranks, rank correlation of two halves of the samples", "at least 0.8", halves, halves >= 0.8)
    tasks = spearman(*(np.mean(each, 0) for each in by_task.values())) or 0.0
    run.further("ranks, rank correlation of two tasks", "at least 0.6", tasks, tasks >= 0.6)
    order = torch.from_numpy(mean)
    low, high = lowest(order, HALF / LAYERS), lowest(-order, HALF / LAYERS)
    arms: dict[str, tuple[Sequence[int], dict[str, Any], Sequence[int]]] = {
        "whole": ((), {}, SEEDS),
        "lowest": (low, {}, SEEDS),
        "highest": (high, {}, SEEDS),
        "no mask": (low, {"mask": False}, SEEDS),
        "all layers": (range(LAYERS), {}, SEEDS[:1]),
        "a router each": (low, {"routers": "layer"}, SEEDS[:1]),
        "usual mixture of depths": (range(0, LAYERS, 2), {"routers": "layer", "mask": False}, SEEDS[:1]),
        "no router loss": (low, {"router_loss": 0.0}, SEEDS[:1]),
    }
    found = {
        name: [run.arm(f"{name}, seed {seed}", tuned, run, f"{name} {seed}", seed, list(layers), **changes)
               for seed in seeds]
        for name, (layers, changes, seeds) in arms.items()
    }  # fmt: skip
    found["by chance"] = [
        run.arm(f"by chance, {seed}", tuned, run, f"chance {seed}", 0, random_layers(LAYERS, HALF, seed))
        for seed in SEEDS
    ]
    compared(run, found)


def compared(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    right = {name: [100 * float(np.mean(each["right"])) for each in arms] for name, arms in found.items()}
    run.table(
        f"A nano LLaVA tuned on shapes, {TEST} test questions; rho = {RHO}",
        ["arm", "% right", "decoder FLOPs", "router's AUC", "runs"],
        [[name, str(Measured.over_seeds(right[name])), np.mean([each["work"] for each in arms]),
          np.mean([each["auc"] for each in arms]) if "auc" in arms[0] else "", len(arms)]
         for name, arms in found.items()],
    )  # fmt: skip
    kept = found["lowest"][0]["kept"]
    run.table("Tokens processed in serving, by converted layer", ["kind", *range(HALF)],
              [[kind, *shares] for kind, shares in kept.items()])  # fmt: skip
    run.table(
        "Thresholds of the lowest, seed 0",
        ["aimed at", "decoder FLOPs", "% right"],
        [[each["keep"], each["work"], 100 * float(np.mean(each["right"]))] for each in found["lowest"][0]["sweep"]],
    )
    whole = min(right["whole"])
    run.further("premise: right answers of the whole model", f"at least {LEARNT:.0%}", f"{whole:.1f} %",
                whole >= 100 * LEARNT)  # fmt: skip

    def less(other: str) -> Measured:
        return Measured.over_seeds([a - b for a, b in zip(right["lowest"], right[other], strict=True)])

    run.main("lowest less whole, points", "at least -3", str(less("whole")), less("whole").at_least(-3))
    saved = 1 - max(each["work"] for each in found["lowest"])
    run.main("decoder FLOPs that the lowest saves", "at least 25 %", f"{saved:.1%}", saved >= 0.25)
    run.further("with mask less without, points", "at least 0", str(less("no mask")), less("no mask").at_least(0))
    run.further("lowest less highest, points", "at least 0", str(less("highest")), less("highest").at_least(0))
    area = min(each["auc"] for each in found["lowest"])
    run.further("router's AUC on held-out image tokens", "at least 0.85", area, area >= 0.85)


# The time of a prompt


def prompt_times(run: Run) -> dict[str, Any]:
    """A prompt of 256 image tokens through SmolLM2's width, whole and with half of the layers' image tokens passing."""
    changes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    stack = Stack(
        nano("llama", max_position_embeddings=1024, num_hidden_layers=HALF if run.quick else LAYERS, **changes)
    )
    ids = torch.randint(3, 120, (1, 280), generator=torch.Generator().manual_seed(run.seed))
    layers = list(range(0, len(stack), 2))
    policy = MixtureOfDepths(stack, layers=layers)
    view = with_policy(stack, planned(stack, {"layers": layers}), policy)
    passing = torch.rand(1, 280, generator=torch.Generator().manual_seed(1)) < RHO
    passing[:, 256:] = False
    policy.foreseen = lambda layer, p, given: ~passing  # type: ignore[method-assign]
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
    """Ranks on text, and four converted layers that are tuned from a router that keeps all."""
    stack = lamella.open("smollm2")
    text = lamella.windows(open_tokenizer("smollm2"), lamella.load_text("pydoc", "calibration"), 36, 96, run.seed)
    began = time.perf_counter()
    ranks_of = attention_ranks(stack, [{"input_ids": row[None]} for row in text[:4]])
    seconds = time.perf_counter() - began
    layers = lowest(ranks_of.mean(0), 4 / len(stack))
    routing = Routing(start="keep", text_rows="half")
    view = converted(stack, layers, routing, run.seed)
    policy: MixtureOfDepths = view.lamella_policy
    policy.training_share = None
    lengths, ids = torch.full((2,), 48), text[:2]
    with torch.no_grad():
        apart = float((parallel(view, ids, lengths).logits - stack.model(input_ids=ids).logits).abs().max())
    policy.training_share = routing.skip
    config = TrainConfig(steps=100, lr=2e-5, batch=2, log_every=10, save_every=100, seed=run.seed)
    log = train(view, blocks(text[4:], (24, 48), seed=run.seed), routing, config, run.work / "smollm2")
    return {"ranks": ranks_of.mean(0).tolist(), "seconds": seconds, "layers": layers, "apart": apart,
            "agreement": spearman(ranks_of[::2].mean(0).tolist(), ranks_of[1::2].mean(0).tolist()),
            "losses": [point.loss for point in log.train]}  # fmt: skip


def on_smollm2(run: Run) -> None:
    found = run.arm("SmolLM2", smollm2, run)
    run.table(f"SmolLM2-135M: ARank on 4 texts of 96 tokens, in {found['seconds']:.0f} s", ["layer", "ARank"],
              [[layer, rank] for layer, rank in enumerate(found["ranks"])])  # fmt: skip
    run.table("Its four lowest layers, tuned", ["point", "loss"], [list(each) for each in enumerate(found["losses"])])
    run.exact("SmolLM2 with a router that keeps all", "below 1e-4", f"{found['apart']:.1e}", found["apart"] < 1e-4)


def experiment(run: Run) -> None:
    run.data = "rendered shapes: captions, conversations, questions; pictures of test scenes that training has not seen"
    with torch.no_grad():
        run.part("exactness", exactness)
        found = run.arm("time of a prompt", prompt_times, run)
    ratio = Measured(*found["ratio"])
    run.table(
        "A prompt of 256 image tokens and 24 others, SmolLM2's width, every other layer converted",
        ["tokens that a converted layer keeps", "whole in the time of it", "predicted"],
        [[found["kept"], str(ratio), 1 / found["predicted"]]],
    )
    if run.quick:  # few rounds decide nothing
        return
    saved = Measured(*((1 - 1 / each) / (1 - found["predicted"]) for each in found["ratio"]))
    run.further("time saved of what work saved predicts", "at least 0.5", str(saved), saved.at_least(0.5))
    claims(run)
    on_smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="what is exact, and the time of a prompt"))
