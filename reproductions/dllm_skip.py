"""dLLM-Skip at small scale: a decoder, a diffusion model from scratch, one converted from a decoder, and SmolLM2.

The three small models have one shape, eight layers on characters (harness/diffusion.py). For each, the reproduction
measures the similarity of its layers, its loss without one to three of them (no four of the six inner ones are without
neighbours), chosen by the paper's criterion and by others, and the fraction of puzzles that it still solves, also with
fewer denoising steps at equal FLOPs. Loss is in nats per token: the negative log-likelihood of the decoder and its
bound for the two others, on held-out prose, with the same noise for every choice. Choices at equal k are compared by
their ranking alone (no theta), since the layers that pass 0.95 depend on the model size. There are no claims on models
that have not learnt their puzzles, or that solve them with one layer.

    python reproductions/dllm_skip.py            # about two hours on one thread
    python reproductions/dllm_skip.py --quick
"""

from __future__ import annotations

import argparse as code_to_read
import json as more_code_to_read
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.diffusion import KINDS, LENGTH, MASK, SIZE, asked, text, trained
from harness.measured import Measured
from harness.nano import encode, scratch
from torch import Tensor, nn

import lamella
from lamella.evaluate import bench
from lamella.measure import RATIOS, Draw, draws
from lamella.methods.dllm_skip import dllm_skip, losses_without, plateau, rises, select, similarity
from lamella.methods.dllm_skip.baselines import cheapest, every, neighbours, spaced
from lamella.methods.dllm_skip.method import curve_distance, spearman
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export
from lamella.report.figures import Lines
from lamella.runtime import Denoising, Sampler, apply, denoise
from lamella.stack import Stack
from lamella.zoo import open_tokenizer
from lamella.zoo.nano import nano

SEEDS = range(3)
COUNTS = (1, 2, 3)
RANDOM = 20  # distinct random sets at every k
TEXTS = 16  # passages of prose to choose layers on, and the same number to evaluate them on
EQUAL = (2, 3)  # layers skipped of eight, and steps taken of four: both leave three quarters of the FLOPs
LEARNT, ALONE = 0.9, 0.5  # fraction of puzzles that a model must solve, and that one layer alone must not
SMOL = (1, 2, 3, 4, 5, 6)
PROBED = {1: 0.07, 4: 0.48}  # loss increase of SmolLM2 without k layers on other text, in nats per token


def model_of(run: Run, kind: str, seed: int) -> Stack:
    size: dict[str, int] = {"layers": 6, "hidden": 32, "steps": 20} if run.quick else {}
    return trained(kind, seed, **size)


# Exactness


def exactness(run: Run) -> None:
    ids = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(run.seed))
    bits, zeroed, removed, planted, chosen = True, 0.0, 0.0, True, True
    for name in ("llada", "dream"):
        stack = Stack(nano(name))
        whole = stack.model(input_ids=ids).logits
        first = dllm_skip(stack, ids, theta=1.0)[0]
        bits &= torch.equal(apply(stack, first)(input_ids=ids).logits, whole)
        sampler = Sampler(length=8, block=4, steps=4)
        bits &= torch.equal(
            denoise(apply(stack, first), ids, sampler=sampler), denoise(stack.model, ids, sampler=sampler)
        )
        plan = Plan(model=ModelReference.of(stack), drop=["layers.1", "layers.3"])
        view = apply(stack, plan)(input_ids=ids).logits
        still = Stack(silenced(nano(name), (1, 3)))
        zeroed = max(zeroed, float((still.model(input_ids=ids).logits - view).abs().max()))
        small = lamella.open(export(stack, plan, scratch("dllm-skip") / name))
        removed = max(removed, float((small.model(input_ids=ids).logits - view).abs().max()))
        series = dllm_skip(Stack(silenced(nano(name), (2,))), ids)
        planted &= series.points[1].drop == ["layers.2"]
        planted &= abs(series.points[1].scores["similarity"] - 1) < 1e-6
        series = dllm_skip(stack, ids, theta=-1.0)
        sets = [[int(site.removeprefix("layers.")) for site in point.drop] for point in series.points]
        chosen &= all(b - a > 1 for each in sets for a, b in pairwise(each)) and sets == [sorted(each) for each in sets]
        chosen &= dllm_skip(stack, ids, theta=-1.0).points == series.points
    run.exact("nothing skipped, logits and answers", "bitwise equal", "equal" if bits else "not equal", bits)
    run.exact("skipped layers against zeroed projections", "at most 1e-6", zeroed, zeroed <= 1e-6)
    run.exact("skipped layers against layers removed by an export", "at most 1e-6", removed, removed <= 1e-6)
    run.exact("a layer that adds nothing", "similarity 1, chosen first", "so" if planted else "not so", planted)
    run.exact("plans", "sorted, no adjacent layers, deterministic", "so" if chosen else "not so", chosen)


def silenced(model: Any, layers: Sequence[int]) -> Any:
    stack = Stack(model)
    for layer in layers:
        for sublayer in stack.architecture.sublayers:
            nn.init.zeros_(stack.layers[layer].get_submodule(sublayer.out).weight)
    return model


# The three models


def measured(run: Run, kind: str, seed: int) -> dict[str, Any]:
    """Measure one model: its curves, the loss without sets of layers, and the puzzles that it solves."""
    stack, count = model_of(run, kind, seed), 2 if run.quick else TEXTS
    inner = range(1, len(stack) - 1)
    calibration = draws(stack, text("calibration", count, seed), RATIOS, seed=seed)
    found = similarity(stack, calibration)
    test = draws(stack, text("test", count, seed + 500), RATIOS, seed=seed + 500)
    sim = found.by_layer
    alone = rises(stack, calibration, [(layer,) for layer in range(len(stack))])  # for the oracle
    counts = [k for k in COUNTS if len(every(inner, k)) > 1]
    sets: dict[str, list[tuple[int, ...]]] = {
        "selected": [tuple(sorted(select(sim, -1.0, k, inner))) for k in counts],
        "plain top-k": [tuple(sorted(select(sim, -1.0, k, inner, non_adjacent=False))) for k in counts],
        "consecutive": [neighbours(list(sim), inner, k) for k in counts],
        "evenly spaced": [spaced(inner, k) for k in counts],
        "oracle": [cheapest(alone, inner, k) for k in counts],
    }
    random = [others(inner, chosen, 3 if run.quick else RANDOM, seed) for chosen in sets["selected"]]
    choices = list(dict.fromkeys(each for known in (*sets.values(), *random) for each in known))
    costs = dict(zip(choices, rises(stack, test, choices), strict=True))
    base = float(losses_without(stack, test, [()]).mean())
    singles = rises(stack, test, [(layer,) for layer in range(len(stack))])
    return {
        "layers": len(stack),
        "sim": sim.tolist(),
        "points": found.points.values.tolist(),
        "recency": found.recency_index.tolist(),
        "passing": len(select(sim, 0.95, len(stack), inner)),
        "plateau": list(plateau(sim, 0.95)),
        "singles": singles,
        "spearman": spearman(1 - sim, singles),
        "base": base,
        "sets": sets,
        "rise": {name: [costs[each] for each in known] for name, known in sets.items()},
        "random": [[costs[each] for each in many] for many in random],
        "solved": solved(run, stack, sets["selected"], seed),
        "transfer": transfer(run, stack, seed),
    }


def others(allowed: Sequence[int], chosen: tuple[int, ...], count: int, seed: int) -> list[tuple[int, ...]]:
    """Return random sets of the same size without adjacent layers, or all of them if there are few."""
    known = [each for each in every(allowed, len(chosen)) if each != chosen]
    return known if len(known) <= count else Random(seed).sample(known, count)


def views(stack: Stack, layers: Sequence[int]) -> Any:
    plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in layers])
    return apply(stack, plan) if layers else stack.model


def solved(run: Run, stack: Stack, chosen: Sequence[tuple[int, ...]], seed: int) -> dict[str, float]:
    """Return the fraction of solved puzzles, without layers, with one layer alone, and with fewer denoising steps."""
    prompts, answers = asked(32 if run.quick else 256, seed + 900)
    found = {f"k={len(each)}": share(views(stack, each), prompts, answers) for each in [(), *chosen]}
    found["one layer"] = share(views(stack, range(1, len(stack))), prompts, answers)
    if stack.architecture.objective == "masked tokens":
        for steps in range(1, SIZE):
            found[f"{steps} of {SIZE} steps"] = share(stack.model, prompts, answers, steps)
    return found


def share(model: Any, prompts: Tensor, answers: Tensor, steps: int = SIZE) -> float:
    if hasattr(model, "generate"):
        written = model.generate(prompts, max_new_tokens=SIZE, do_sample=False, pad_token_id=MASK, use_cache=True)
    else:
        written = denoise(model, prompts, sampler=Sampler(length=SIZE, steps=steps))
    return float((written[:, prompts.shape[1] :] == answers).all(dim=1).float().mean())


def transfer(run: Run, stack: Stack, seed: int) -> dict[str, float]:
    """Choose layers on prose and on program text, and evaluate them on both."""
    inner, k = range(1, len(stack) - 1), 2
    program = encode("".join(Path(str(each.__file__)).read_text() for each in (code_to_read, more_code_to_read)))
    rows = program[: len(program) // LENGTH * LENGTH].view(-1, LENGTH)
    count = 4 if run.quick else TEXTS
    texts = {"prose": text("calibration", count, seed), "code": rows[:count]}
    tests = {"prose": text("test", count, seed + 500), "code": rows[-count:]}
    sets = {
        name: tuple(sorted(select(similarity(stack, draws(stack, each, seed=seed)).by_layer, -1.0, k, inner)))
        for name, each in texts.items()
    }
    ours, theirs = (set(each) for each in sets.values())
    found = {"jaccard": len(ours & theirs) / len(ours | theirs)}
    for name, each in tests.items():
        judged: list[Draw] = draws(stack, each, seed=seed + 500)
        for chosen, cost in zip(sets, rises(stack, judged, list(sets.values())), strict=True):
            found[f"{chosen} on {name}"] = cost
    return found


def three_models(run: Run) -> None:
    seeds = list(SEEDS)[:1] if run.quick else list(SEEDS)
    found = {kind: [run.arm(f"{kind}, seed {seed}", measured, run, kind, seed) for seed in seeds] for kind in KINDS}
    able = premises(run, found)
    curves(run, found, able)
    skips(run, found, able)
    the_method(run, found, able)
    tasks(run, found, able)


def reaching(arms: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """Return the models for which k layers can be selected, since the first choices may leave only neighbours."""
    return [each for each in arms if len(each["sets"]["selected"][k - 1]) == k]


def mean(arms: Sequence[dict[str, Any]], *path: Any) -> Any:
    def at(each: Any) -> Any:
        for name in path:
            each = each[name]
        return each

    return np.mean([at(each) for each in arms], axis=0).tolist()


def premises(run: Run, found: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Return the models that solve their puzzles and need their layers for it."""
    able = set()
    for kind, arms in found.items():
        least = min(each["solved"]["k=0"] for each in arms)
        most = max(each["solved"]["one layer"] for each in arms)
        if run.quick:
            continue
        run.exact(f"{kind} has learnt its puzzles", f"at least {LEARNT:.0%} solved", f"{least:.0%}", least >= LEARNT)
        run.exact(f"{kind}: one layer alone does not solve them", f"at most {ALONE:.0%}", f"{most:.0%}", most <= ALONE)
        if least >= LEARNT and most <= ALONE:
            able.add(kind)
    return able


def claim(run: Run, check: Callable[..., None], name: str, measured: Measured, able: bool, most: float = 0) -> None:
    """Check that a value is small, for the models that are able to show it.

    There are no claims on the models of a quick run, which have learnt nothing.
    """
    if not run.quick:
        check(name, f"at most {most:g}", str(measured), measured.at_most(most) if able else None)


def curves(run: Run, found: dict[str, list[dict[str, Any]]], able: set[str]) -> None:
    layers = found["AR"][0]["layers"]
    columns = ["layer", *(f"{kind}: similarity" for kind in KINDS), *(f"{kind}: rise without it" for kind in KINDS)]
    rows = [
        [layer, *(mean(found[kind], "sim", layer) for kind in KINDS),
         *(mean(found[kind], "singles", layer) for kind in KINDS)]
        for layer in range(layers)
    ]  # fmt: skip
    run.table(
        "Similarity of a layer's input and output, and the loss increase without it (nats per token)", columns, rows
    )
    lines = {kind: mean(arms, "sim") for kind, arms in found.items()}
    run.figure("dllm-skip-similarity", Lines("layer", "similarity of input and output", lines))
    rows = [
        [kind, mean(arms, "base"), mean(arms, "passing"), mean(arms, "spearman"), fmean(mean(arms, "recency"))]
        for kind, arms in found.items()
    ]
    columns = ["", "loss", "layers above 0.95, no adjacent ones", "rank correlation of 1 - similarity with the rise"]
    run.table("Properties of the models", [*columns, "recency index, mean over points"], rows)
    pairs = list(zip(*(found[kind] for kind in KINDS), strict=True))
    near = [
        curve_distance(adapted["sim"], ar["sim"]) - curve_distance(native["sim"], ar["sim"])
        for ar, native, adapted in pairs
    ]
    rows = [[f"{a} and {b}", fmean(curve_distance(x["sim"], y["sim"]) for x, y in zip(found[a], found[b], strict=True)),
             fmean(spearman(x["sim"], y["sim"]) for x, y in zip(found[a], found[b], strict=True))]
            for a, b in (("AR", "AR2MDM"), ("AR", "MDM"), ("AR2MDM", "MDM"))]  # fmt: skip
    run.table("Distance of the similarity curves", ["", "mean absolute difference", "rank correlation"], rows)
    nearer = Measured.over_seeds(near)
    claim(run, run.further, "distance of AR2MDM's curve from AR's minus that of MDM's", nearer, able >= set(KINDS))
    for kind, arms in found.items():
        points = mean(arms, "points")
        title = f"{kind}: S, the cosine of the residual stream at two points, from the embeddings to the last layer"
        run.table(title, ["", *map(str, range(layers + 1))], [[point, *row] for point, row in enumerate(points)])


def skips(run: Run, found: dict[str, list[dict[str, Any]]], able: set[str]) -> None:
    names = ["selected", "plain top-k", "consecutive", "evenly spaced", "oracle"]
    rows = []
    for kind, arms in found.items():
        for k in range(1, len(arms[0]["rise"]["selected"]) + 1):
            if some := reaching(arms, k):
                costs = [[each["rise"][name][k - 1] for each in some] for name in names]
                costs.append([fmean(each["random"][k - 1]) for each in some])
                said = [str(Measured.over_seeds(each)) for each in costs]
                rows.append([kind, k, len(some), *said, len(some[0]["random"][k - 1])])
    title = "Rise of the loss without k layers, nats per token, by selection method"
    run.table(title, ["", "k", "seeds", *names, "other sets without adjacent layers", "number of sets"], rows)
    at = min(1, len(found["AR"][0]["rise"]["selected"]) - 1)  # k = 2
    gap = Measured.over_seeds(
        [native["rise"]["selected"][at] - ar["rise"]["selected"][at]
         for ar, native in zip(found["AR"], found["MDM"], strict=True)]
    )  # fmt: skip
    claim(run, run.further, f"rise of MDM minus rise of AR without {at + 1} layers", gap, able >= {"AR", "MDM"})


def the_method(run: Run, found: dict[str, list[dict[str, Any]]], able: set[str]) -> None:
    for kind, arms in found.items():
        for k in range(2, len(arms[0]["rise"]["selected"]) + 1):
            some = reaching(arms, k)
            if len(some) > 1 or run.quick:
                gain = Measured.over_seeds(
                    [each["rise"]["selected"][k - 1] - fmean(each["random"][k - 1]) for each in some]
                )
                check = run.main if kind == "MDM" else run.further
                said = f"{kind}, k={k}, {len(some)} seeds: rise of the selected layers minus the mean of other sets"
                claim(run, check, said, gain, kind in able)


def tasks(run: Run, found: dict[str, list[dict[str, Any]]], able: set[str]) -> None:
    layers = found["AR"][0]["layers"]
    flops = {f"k={k}": 1 - k / layers for k in range(layers)} | {"one layer": 1 / layers}
    flops |= {f"{steps} of {SIZE} steps": steps / SIZE for steps in range(1, SIZE)}
    rows = []
    for kind, arms in found.items():
        for name in dict.fromkeys(name for each in arms for name in each["solved"]):
            some = [each["solved"] for each in arms if name in each["solved"]]
            kept = [each[name] / each["k=0"] for each in some if each["k=0"]]
            retention = str(Measured.over_seeds(kept)) if len(kept) == len(some) else ""
            rows.append([kind, name, len(some), flops[name], mean(some, name), retention])
    title = f"Puzzles of {SIZE} letters: without k of {layers} layers, and with fewer denoising steps"
    run.table(title, ["", "", "seeds", "FLOPs of the layers", "solved", "retention"], rows)
    k, steps = EQUAL
    for kind in () if run.quick else ("MDM", "AR2MDM"):
        rival = Measured.over_seeds(
            [each["solved"][f"{steps} of {SIZE} steps"] - each["solved"][f"k={k}"] for each in found[kind]]
        )
        said = f"{kind}: solved in {steps} of {SIZE} steps minus solved without {k} of {layers} layers, at equal FLOPs"
        claim(run, run.further, said, rival, kind in able)
    rows = [[kind, *(mean(arms, "transfer", name) for name in arms[0]["transfer"])] for kind, arms in found.items()]
    run.table("Loss increase without two layers chosen on prose and on code", ["", *found["AR"][0]["transfer"]], rows)
    away = Measured.over_seeds(
        [each["transfer"]["code on prose"] - each["transfer"]["prose on prose"] for each in found["MDM"]]
    )
    claim(
        run,
        run.further,
        "MDM: rise on prose of layers chosen on code minus chosen on prose, nats",
        away,
        "MDM" in able,
        0.05,
    )


# Time per step


def latency(run: Run) -> None:
    stack = Stack(nano("llada", n_layers=8, d_model=256, n_heads=4, n_kv_heads=4, mlp_hidden_size=768))
    ks = (2, 4)
    models = {"whole": stack.model} | {f"k={k}": views(stack, range(1, k + 1)) for k in ks}
    timings = bench(models, prompt=248, tokens=8, rounds=2 if run.quick else 15)
    rows = []
    for k in ks:
        expected = 1 / (1 - k / 8)
        took = Measured.over_rounds(timings[f"k={k}"][0].decode_speedup, expected)
        rows.append([k, expected, str(timings[f"k={k}"][0].decode_speedup), str(took)])
        if not run.quick:
            run.further(f"speed-up of a step without {k} of 8 layers, by 1 / (1 - k / 8)", "0.9 to 1.1", str(took),
                        took.within(0.9, 1.1))  # fmt: skip
    run.table("Time of a denoising step over 256 tokens", ["k", "ideal", "measured", "measured / ideal"], rows)


# SmolLM2


def smollm2(seed: int) -> dict[str, Any]:
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    inner = range(1, len(stack) - 1)
    tokens = {split: lamella.windows(tokenizer, lamella.load_text("pydoc", split), count, 128, seed)
              for split, count in (("calibration", 4), ("test", 8))}  # fmt: skip
    sim = similarity(stack, draws(stack, tokens["calibration"])).by_layer
    judged = draws(stack, tokens["test"])
    singles = rises(stack, judged, [(layer,) for layer in range(len(stack))])
    sets = {
        "selected": [tuple(sorted(select(sim, 0.95, k, inner))) for k in SMOL],
        "plain top-k": [tuple(sorted(select(sim, 0.95, k, inner, non_adjacent=False))) for k in SMOL],
        "consecutive": [neighbours(list(sim), inner, k) for k in SMOL],
    }
    random = others(inner, sets["selected"][1], RANDOM, seed)
    costs = {name: rises(stack, judged, known) for name, known in sets.items()}
    whole, *without = losses_without(stack, judged, [(), *(sets["selected"][k - 1] for k in PROBED)])
    return {
        "sim": sim.tolist(),
        "singles": singles,
        "sets": sets,
        "costs": costs,
        "probed": [(each - whole).tolist() for each in without],
        "random": rises(stack, judged, random),
        "spearman": spearman(1 - sim, singles),
        "passing": int((sim > 0.95).sum()),
    }


def a_decoder(run: Run) -> None:
    found = run.arm("SmolLM2", smollm2, run.seed)
    rows = [
        [k, " ".join(map(str, found["sets"]["selected"][place])),
         *(found["costs"][name][place] for name in ("selected", "plain top-k", "consecutive"))]
        for place, k in enumerate(SMOL)
    ]  # fmt: skip
    columns = ["k", "layers", "selected", "plain top-k", "consecutive"]
    run.table("SmolLM2 (30 layers, theta 0.95): rise of the loss without k layers, nats per token", columns, rows)
    rows = [[layer, *both] for layer, both in enumerate(zip(found["sim"], found["singles"], strict=True))]
    run.table(f"SmolLM2: {found['passing']} of 30 layers are above 0.95; rank correlation {found['spearman']:.2f}",
              ["layer", "similarity", "rise without it"], rows)  # fmt: skip
    costs = found["costs"]["selected"]
    rising = all(b > a for a, b in pairwise(costs))
    run.further("SmolLM2: the rise grows with k", "at every k from 1 to 6", " ".join(f"{c:.2f}" for c in costs), rising)
    for (k, known), values in zip(PROBED.items(), found["probed"], strict=True):
        rise = Measured.over_seeds(values)  # over sequences
        inside = rise.low <= known <= rise.high
        run.further(f"SmolLM2, k={k}: rise", f"{known}, as on other text", str(rise), inside)
    gain = costs[1] - fmean(found["random"])
    run.further("SmolLM2, k=2: rise of the selected layers minus the mean of other pairs", "at most 0", gain, gain <= 0)


def states_stay_apart(run: Run) -> None:
    """Check that two interleaved requests give the same results as one after the other."""
    stack = Stack(nano("llada"))
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(run.seed))
    same = True
    for cache in ("none", "prompt", "prefix", "dual"):
        sampler = Sampler(length=8, block=4, steps=8, cache=cache)  # type: ignore[arg-type]
        requests = [Denoising(stack.model, rows, sampler=sampler) for rows in (ids, ids.flip(1))]
        while not all(each.done for each in requests):
            for each in requests:
                each.advance()
        alone = [denoise(stack.model, rows, sampler=sampler) for rows in (ids, ids.flip(1))]
        same &= all(torch.equal(each.tokens, other) for each, other in zip(requests, alone, strict=True))
    said = "so" if same else "not so"
    run.exact("two requests in turn, with every cache", "the answers of sequential requests", said, same)


def experiment(run: Run) -> None:
    run.data = "characters of Python's documentation and puzzles" + ("" if run.quick else "; pydoc for SmolLM2")
    with torch.no_grad():
        run.part("exactness", exactness)
        run.part("requests in turn", states_stay_apart)
        three_models(run)
        run.part("latency", latency)
        if not run.quick:
            a_decoder(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="small models that have learnt nothing, so no claims on them; no SmolLM2"))
