"""gamma-MoD at small scale: a nano LLaVA answers questions about rendered shapes, with image tokens that skip layers.

The exactness checks come first. Then a decoder of eight layers that was trained here to answer is fine-tuned on further
questions, one per image: unconverted, with the four layers of lowest ARank converted, of highest, random ones, and
without the mask. There are no claims if the unconverted model has not learnt to answer. (The authors fine-tune a model
that can only describe images; a model of this size would have to learn positions in every arm, from some hundred
thousand questions.) The training-free baselines FastV and VTW prune image tokens of the unconverted model at the
compute of the lowest-ARank arm. Measurements: the stability of ranks between halves of the samples and between tasks;
accuracy and compute of each arm; accuracy over thresholds; how well the router at inference predicts which tokens
training selects. Last, the time of a prompt of 256 image tokens, and SmolLM2, whose ranks on text are measured and
whose four layers of lowest ARank are converted and fine-tuned.

Of some 75 tokens of a test row, the 64 image tokens and those before them may skip layers. With rho = 0.5, as released,
four of eight layers would save at most 22 % of the decoder's compute, and the claim is 25 %: here rho is 0.6, which can
save 27 %.

    python reproductions/gamma_mod.py            # about two hours on one thread; an interrupted run resumes
    python reproductions/gamma_mod.py --quick    # exactness, and the time of a prompt
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
from harness.vlm import STAGES, WHOLE, asked, opened_vlm, rows_of, trained_vlm
from scipy.stats import rankdata
from torch import Tensor

import lamella
from lamella.data import ImageText, Processing
from lamella.evaluate import Ratio, answered
from lamella.measure import spearman
from lamella.methods.gamma_mod import (
    MixtureOfDepths,
    Routing,
    RoutingTrace,
    attention_ranks,
    lowest,
    observe,
    quantile,
    rank_of,
)
from lamella.methods.gamma_mod.baselines import ImageTokenPruning, random_layers
from lamella.methods.gamma_mod.method import prompts
from lamella.methods.gamma_mod.recipe import calibrate, convert, plan_of, policy_image, train
from lamella.plan import ModelReference, PolicyReference
from lamella.runtime import parallel, with_policy
from lamella.stack import Stack
from lamella.train import Task, TrainConfig, blocks, fit, own, response_loss, with_weights_of
from lamella.zoo.nano import nano
from lamella.zoo.opening import open_processor, open_tokenizer
from lamella.zoo.worlds import QUESTIONS, SIZE

LAYERS, HALF, WIDTH = 8, 4, 128
PROBES, TEST = 50, 300
LEARNT = 0.7  # accuracy over all questions below which there are no claims
RHO = 0.6
FASTV = 1  # the layer whose attention selects tokens: the second, as in FastV's paper
SEEDS = (0, 1, 2)
KEEPS = (0.9, 0.7, 0.5, 0.3)
SFT = replace(STAGES["sft"].config, steps=800, lr=5e-4)


# Exactness


def exactness(run: Run) -> None:
    torch.manual_seed(run.seed)
    ids = torch.randint(3, 120, (3, 14))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    stack, lengths, real = Stack(nano("llama")), torch.full((3,), 9), mask.bool()
    whole = stack.model(input_ids=ids, attention_mask=mask).logits

    def viewed(**params: Any) -> tuple[Any, MixtureOfDepths]:
        policy = MixtureOfDepths(stack, layers=[1, 3], **params)
        return with_policy(stack, plan_of(stack, {"layers": [1, 3]}), policy), policy

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
    """Compare greedy cached generation with whole sequences, for a single row and for a ragged batch."""
    for rows in (slice(1, 2), slice(None)):
        given = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        out = view.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
                            output_logits=True, return_dict_in_generate=True)  # fmt: skip
        grown = torch.cat([given["attention_mask"], torch.ones_like(out.sequences[:, 14:])], 1)
        lengths, positions = torch.full((len(grown),), 14), (grown.cumsum(-1) - 1).clamp(min=0)
        again = parallel(view, out.sequences, lengths, grown, position_ids=positions).logits[:, 13:-1]
        apart = float((torch.stack(out.logits, 1) - again).abs().max())
        run.exact(f"cached against recomputed, {len(grown)} rows", "below 1e-5", f"{apart:.1e}", apart < 1e-5)


def causality(run: Run, view: Any, policy: MixtureOfDepths, ids: Tensor) -> None:
    """Check that a later token changes earlier outputs in training, which is not causal, and never at inference."""
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
    run.exact("and in training, which uses later tokens", "above 1e-4", f"{trained:.1e}", trained > 1e-4)


# The nano model


def begun(seed: int) -> tuple[Any, Stack]:
    """Return the folder of the model before fine-tuning, and its text stack."""
    folder = trained_vlm("llava", seed=seed)
    return folder, Stack(opened_vlm(folder), stack="text")


def ranks(tasks: Sequence[str], seed: int) -> list[list[float]]:
    """Return the ARank of every layer on samples [samples, layers]."""
    folder, stack = begun(seed)
    return attention_ranks(stack, prompts(stack, rows_of(folder, tasks, PROBES, "calibration"))).tolist()


def training_rows(folder: Any, seed: int) -> ImageText:
    """Return the fine-tuning rows that all arms of a seed share."""
    rows = asked((SFT.steps or 0) * SFT.batch, 2 + 10 * seed, SIZE, (*QUESTIONS, *WHOLE))
    return ImageText(rows, Processing(open_processor(folder)))


def converted_arm(
    run: Run, name: str, seed: int, layers: Sequence[int], swept: bool = False, **changes: Any
) -> dict[str, Any]:
    """Convert some layers, fine-tune from the same weights on the same rows, calibrate, and test."""
    folder, stack = begun(seed)
    routing = Routing(skip=RHO, **changes)
    view = convert(stack, layers, routing, seed)
    train(view, training_rows(folder, seed), routing, replace(SFT, seed=seed), run.work / name.replace(" ", "-"))
    return served(view.eval(), folder, layers, KEEPS if swept else ())


def untrained(seed: int, layers: Sequence[int]) -> dict[str, Any]:
    """Return how well a randomly initialised router predicts its own selection."""
    folder, stack = begun(seed)
    return served(convert(stack, layers, Routing(skip=RHO), seed).eval(), folder, layers)


def served(view: Any, folder: Any, layers: Sequence[int], keeps: Sequence[float] = ()) -> dict[str, Any]:
    """Evaluate a converted model at calibrated and other thresholds, and its prediction of the training selection."""
    policy: MixtureOfDepths = view.lamella_policy
    few, test = (rows_of(folder, QUESTIONS, PROBES, "calibration"), rows_of(folder, QUESTIONS, TEST, "test", 1))
    chosen, seen = observe(view, test), observe(view, few)
    policy.training_share = None
    found = []
    for keep in (None, *keeps):
        limits = calibrate(seen)
        if keep is not None:
            limits["prefill"] = [quantile(seen.p[seen.prompt][:, at], keep) for at in range(len(layers))]
        policy.thresholds = [torch.tensor(limits[name], dtype=torch.float64) for name in ("prefill", "decode")]
        now = observe(view, test)
        found.append({"keep": keep, "right": answered(view, test).tolist(), "work": flops(now, layers),
                      "kept": now.kept(), "auc": auc(now, chosen), "agreed": agreed(now, chosen)})  # fmt: skip
    return found[0] | {"sweep": found[1:]}


def whole_arm(run: Run, seed: int, spent: float) -> dict[str, Any]:
    """Fine-tune the unconverted model, then prune image tokens without training at the compute ``spent``."""
    folder, stack = begun(seed)
    plan = lamella.Plan(model=ModelReference.of(stack))
    view, rows = lamella.apply(stack, plan), training_rows(folder, seed)
    own(view)
    task = Task(response_loss, collate=rows.batch)
    fit(view, rows, task, replace(SFT, seed=seed), out=run.work / f"whole-{seed}")
    tuned, test = with_weights_of(stack, view.eval()), rows_of(folder, QUESTIONS, TEST, "test", 1)
    sizes = lengths(tuned, test)
    images = sizes[0][1]
    options = {
        "FastV": [{"layer": FASTV, "keep": keep, "criterion": "fastv"} for keep in range(images + 1)],
        "VTW": [{"layer": layer, "keep": 0, "criterion": "withdraw"} for layer in range(LAYERS)],
    }
    found: dict[str, Any] = {"whole": {"right": answered(tuned.model, test).tolist(), "work": 1.0}}
    reference = {"text": PolicyReference(name="pruned")}
    for name, each in options.items():
        chosen = min(each, key=lambda settings: abs(left_out(sizes, settings["layer"], settings["keep"]) - spent))
        pruned = with_policy(tuned, plan.model_copy(update={"policies": reference}), ImageTokenPruning(tuned, **chosen))
        found[name] = {"right": answered(pruned, test).tolist(), "chosen": chosen,
                       "work": left_out(sizes, chosen["layer"], chosen["keep"])}  # fmt: skip
    return found


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


def claims(run: Run) -> None:
    by_task = {task: run.arm(f"ranks on {task}", ranks, [task], SEEDS[0]) for task in ("colour", "relation")}
    measured = [np.array(run.arm(f"ranks, seed {seed}", ranks, QUESTIONS, seed)) for seed in SEEDS]
    orders = [torch.from_numpy(each.mean(0)) for each in measured]
    low, high = ([lowest(sign * each, HALF / LAYERS) for each in orders] for sign in (1, -1))
    chance = [random_layers(LAYERS, HALF, seed) for seed in SEEDS]
    run.table(
        "ARank before fine-tuning (fraction of the maximum)",
        ["seed", "tasks", *map(str, range(LAYERS)), "lowest", "random"],
        [*([seed, "all", *each.tolist(), str(some), str(others)]
           for seed, each, some, others in zip(SEEDS, orders, low, chance, strict=True)),
         *([SEEDS[0], task, *np.mean(each, 0), "", ""] for task, each in by_task.items())],
    )  # fmt: skip
    arms: dict[str, tuple[Sequence[Sequence[int]], dict[str, Any]]] = {
        "lowest": (low, {}),
        "highest": (high, {}),
        "random": (chance, {}),
        "no mask": (low, {"mask": False}),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (of_seeds, changes) in arms.items():
        found[name] = [
            run.arm(f"{name}, seed {seed}", converted_arm, run, f"{name} {seed}", seed, layers,
                    swept=(name, seed) == ("lowest", SEEDS[0]), **changes)
            for seed, layers in zip(SEEDS, of_seeds, strict=True)
        ]  # fmt: skip
    whole = [
        run.arm(f"whole, seed {seed}", whole_arm, run, seed, each["work"])
        for seed, each in zip(SEEDS, found["lowest"], strict=True)
    ]
    found = {name: [each[name] for each in whole] for name in ("whole", "FastV", "VTW")} | found
    before = [run.arm(f"untrained, seed {seed}", untrained, seed, each) for seed, each in zip(SEEDS, low, strict=True)]
    compared(run, found, before, measured, by_task)


def compared(
    run: Run,
    found: dict[str, list[dict[str, Any]]],
    before: list[dict[str, Any]],
    measured: Sequence[np.ndarray],
    by_task: dict[str, Any],
) -> None:
    right = {name: [100 * float(np.mean(each["right"])) for each in arms] for name, arms in found.items()}
    run.table(
        f"A nano LLaVA tuned on shapes, {TEST} test questions; rho = {RHO}",
        ["arm", "% right", "decoder FLOPs", "runs"],
        [[name, str(Measured.over_seeds(right[name])), np.mean([each["work"] for each in arms]), len(arms)]
         for name, arms in found.items()],
    )  # fmt: skip
    kept = found["lowest"][0]["kept"]
    run.table("Tokens processed in serving, by converted layer", ["kind", *map(str, range(HALF))],
              [[kind, *shares] for kind, shares in kept.items()])  # fmt: skip
    run.table(
        "Thresholds of the lowest, seed 0",
        ["target", "decoder FLOPs", "% right"],
        [[each["keep"], each["work"], 100 * float(np.mean(each["right"]))] for each in found["lowest"][0]["sweep"]],
    )
    routers = {"trained": found["lowest"], "before training": before}
    run.table(
        "Routers in serving against training's choice, on held-out image tokens",
        ["router", "AUC", "% of equal decisions", "runs"],
        [[name, np.mean([each["auc"] for each in arms]), 100 * np.mean([each["agreed"] for each in arms]), len(arms)]
         for name, arms in routers.items()],
    )  # fmt: skip
    whole = min(right["whole"])
    learnt = whole >= 100 * LEARNT
    run.exact("premise: accuracy of the whole model", f"at least {LEARNT:.0%}", f"{whole:.1f} %", learnt)

    def less(other: str) -> Measured:
        return Measured.over_seeds([a - b for a, b in zip(right["lowest"], right[other], strict=True)])

    def told(verdict: bool | None) -> bool | None:
        return verdict if learnt else None

    halves = min(spearman(each[::2].mean(0), each[1::2].mean(0)) or 0.0 for each in measured)
    run.main("ranks, rank correlation of two halves of the samples", "at least 0.8", halves, told(halves >= 0.8))
    tasks = spearman(*(np.mean(each, 0) for each in by_task.values())) or 0.0
    run.further("ranks, rank correlation of two tasks", "at least 0.6", tasks, told(tasks >= 0.6))
    run.main(
        "accuracy of lowest minus whole, points", "at least -3", str(less("whole")), told(less("whole").at_least(-3))
    )
    saved = 1 - max(each["work"] for each in found["lowest"])
    run.main("decoder FLOPs that the lowest saves", "at least 25 %", f"{saved:.1%}", told(saved >= 0.25))
    run.main(
        "accuracy with mask minus without, points",
        "at least 0",
        str(less("no mask")),
        told(less("no mask").at_least(0)),
    )
    for other in ("highest", "random", "FastV", "VTW"):
        run.further(
            f"accuracy of lowest minus {other}, points", "at least 0", str(less(other)), told(less(other).at_least(0))
        )
    area = min(each["auc"] for each in found["lowest"])
    run.further("router's AUC on held-out image tokens", "at least 0.85", area, told(area >= 0.85))
    more = Measured.over_seeds([a["auc"] - b["auc"] for a, b in zip(found["lowest"], before, strict=True)])
    run.further("its AUC minus that of a router before training", "above 0", str(more), told(more.at_least(0)))


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
    run.exact(
        "SmolLM2 with a router that processes all tokens", "below 1e-5", f"{found['apart']:.1e}", found["apart"] < 1e-5
    )


def experiment(run: Run) -> None:
    run.data = "rendered shapes: captions and questions; held-out test scenes"
    with torch.no_grad():
        run.part("exactness", exactness)
        found = run.arm("time of a prompt", prompt_times, run)
    ratio = Measured(*found["ratio"])
    run.table(
        "A prompt of 256 image tokens and 24 others, SmolLM2's width, every other layer converted",
        ["tokens that a converted layer keeps", "speed-up", "predicted"],
        [[found["kept"], str(ratio), 1 / found["predicted"]]],
    )
    if run.quick:  # a few rounds are not conclusive
        return
    saved = Measured(*((1 - 1 / each) / (1 - found["predicted"]) for each in found["ratio"]))
    run.further("time saved relative to the saved compute", "at least 0.5", str(saved), saved.at_least(0.5))
    claims(run)
    on_smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="what is exact, and the time of a prompt"))
