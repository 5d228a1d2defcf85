"""Visual token redundancy at small scale: masked-diffusion models trained from scratch or converted from a decoder.

Both have one shape (harness/dmllm.py): 64 image tokens and six layers. They answer questions about rendered shapes,
with a word (``colour``) or with a list of all objects (``list``). There are no claims on a model that has not learnt
its task. The reproduction measures which tokens to prune: a sweep of criteria and kept fractions, each beside random
tokens pruned at the same layer; when and where to prune: schedules at equal fractions and, as closely as possible, at
the FLOPs of the withdrawal, including fewer denoising steps; and the loss and recovery of information on one
trajectory. The short and the long task are never pooled.

    python reproductions/dmllm_token_redundancy.py            # about an hour on one thread
    python reproductions/dmllm_token_redundancy.py --quick
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.dmllm import CACHES, KINDS, LENGTHS, PROVENANCES, Provenance, prompts, shown, trained
from harness.measured import Measured
from torch import Tensor

from lamella.data import ImageTextRow, Processing
from lamella.methods.dmllm_token_redundancy import (
    LayerWidths,
    RequestLengths,
    VisualTokenSchedule,
    attention_mass,
    flops,
    follow,
    information_loss,
    of_step,
    plan_of,
    restoration,
    text_of,
)
from lamella.report.figures import Scatter
from lamella.runtime import Denoising, Sampler, apply, denoise
from lamella.stack import Model, open_model
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm

LEARNT = {"colour": 0.9, "list": 0.8}  # scores that a model must reach for the claims to apply
PRIORS = {"colour": 0.25, "list": 0.05}  # scores without images: one of six colours; hardly any object at random
TARGET, WITHDRAWN = 1, 3  # l* of pruning, and of layer-skipping: 0.6 of six layers
LAYERS = {"fastv": TARGET, "sparsevlm": TARGET, "divprune": -1, "trim": -1, "tome": -1}  # l*; -1: on the embeddings
KEEPS = (0.75, 0.5, 0.25, 0.1)
JUDGED = (0.5, 0.25)  # fractions at which criteria are compared with random tokens
STEPS = {"colour": 2, "list": 13}
DRAWS = 2000  # bootstrap samples
NEAR = 0.02  # schedules whose FLOPs differ by less, relative to the whole model, cost the same


def model_of(run: Run, provenance: Provenance) -> Model:
    return opened(provenance, run.seed, run.quick)


opened = cache(trained)


def test_rows(run: Run, task: str) -> list[ImageTextRow]:
    return shown(task, 2 if run.quick else 120, "test", 900 + run.seed)


# Exactness


def exactness(run: Run) -> None:
    bits, away, last, again = True, 0.0, 0.0, True
    for kind in KINDS.values():
        made, processor = shapes_vlm(kind, run.seed)
        model = open_model(made)
        rows = shown("colour", 2, "test", run.seed)
        batch = processor_inputs(processor, rows)
        sampler = Sampler(length=4, steps=2)
        whole = logits(made, batch, sampler)
        same = apply(model, plan_of(model, VisualTokenSchedule.one_shot(TARGET, 0.0, 1.0), criterion="divprune"))
        bits &= torch.equal(logits(same, batch, sampler), whole)
        none = apply(model, plan_of(model, VisualTokenSchedule.one_shot(-1, 0.0, 0.0), criterion="withdraw"))
        away = max(away, float((logits(none, batch, sampler) - logits(made, blind(made, batch), sampler)).abs().max()))
        end = apply(model, plan_of(model, VisualTokenSchedule.withdraw(5)))
        last = max(last, float((logits(end, batch, sampler) - whole).abs().max()))
        view = apply(model, plan_of(model, VisualTokenSchedule.progressive([0.0, 0.5], [0.5, 0.25], TARGET)))
        other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
        alone = [denoise(view, sampler=sampler, **each) for each in (batch, other)]
        turns = [Denoising(view, sampler=sampler, **each) for each in (batch, other)]
        for _ in range(2):
            for each in turns:
                each.advance()
        again &= all(torch.equal(one.tokens, known) for one, known in zip(turns, alone, strict=True))
    run.exact("all tokens kept", "bitwise equal", "equal" if bits else "not equal", bits)
    run.exact("no token kept, against prompts without images", "at most 1e-5", away, away <= 1e-5)
    run.exact("withdrawn after the last layer, against the whole model", "at most 1e-5", last, last <= 1e-5)
    run.exact("two requests in turn, against one after the other", "equal", "equal" if again else "not equal", again)


def processor_inputs(processor: Any, rows: Sequence[ImageTextRow]) -> dict[str, Tensor]:
    return Processing(processor).prompts(rows)


def logits(model: Any, batch: Mapping[str, Tensor], sampler: Sampler) -> Tensor:
    """Return the logits of the first step [rows, length, vocabulary]."""
    request = Denoising(model, sampler=sampler, **batch)
    request.advance()
    assert request.logits is not None
    found = request.logits.clone()
    found[..., request.forbidden_tokens] = 0
    return found


def blind(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same prompts without their images, which precede everything but the first token."""
    rows = [ids[real.bool() & (ids != model.config.image_token_id)]
            for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


# Answers of a model


def scored(task: str, answer: str, truth: str) -> float:
    """Score an answer: a word is right or wrong; a list scores the fraction of its objects that are named in full."""
    if task == "colour":
        return float(answer == truth)
    wanted, found = (
        {" ".join(words[place : place + 6]) for place in range(0, len(words), 6)}
        for words in (truth.split(), answer.split())
    )
    return len(wanted & found) / len(wanted)


def scores(run: Run, provenance: Provenance, task: str, view: Any, steps: int | None = None) -> list[float]:
    """Return the score of a view or a model on each test question."""
    model, rows = model_of(run, provenance), test_rows(run, task)
    tokenizer = open_processor(model.path).tokenizer
    sampler = Sampler(length=LENGTHS[task], steps=steps or STEPS[task], cache=CACHES[provenance])
    found: list[float] = []
    for start in range(0, len(rows), 40):
        part = rows[start : start + 40]
        answers = denoise(view, sampler=sampler, **prompts(model, part))[:, -LENGTHS[task] :]
        for row, ids in zip(part, answers.tolist(), strict=True):
            ends = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            found.append(scored(task, tokenizer.decode(ids[:ends]), row.answer))
    return found


def pruned(run: Run, provenance: Provenance, schedule: VisualTokenSchedule, **options: Any) -> Any:
    model = model_of(run, provenance)
    return apply(model, plan_of(model, schedule, **options))


def sweep(run: Run, provenance: Provenance, task: str) -> dict[str, Any]:
    """Evaluate every criterion at every fraction, random tokens pruned at the same layers, and no image tokens."""

    def at(layer: int, keep: float, criterion: str) -> list[float]:
        schedule = VisualTokenSchedule.one_shot(layer, 0.0, keep)
        return scores(run, provenance, task, pruned(run, provenance, schedule, criterion=criterion))

    found = {"whole": scores(run, provenance, task, model_of(run, provenance).model), "blind": at(-1, 0.0, "withdraw")}
    for criterion, layer in list(LAYERS.items())[:3:2] if run.quick else LAYERS.items():
        for keep in KEEPS[1:2] if run.quick else KEEPS:
            found[f"{criterion} {keep}"] = at(layer, keep, criterion)
            if (name := control(layer, keep)) not in found:
                found[name] = at(layer, keep, "random")
    if not run.quick:
        found[f"none behind layer {TARGET}"] = at(TARGET, 0.0, "withdraw")
    return found


def control(layer: int, keep: float) -> str:
    """Return the random-token control of a criterion that prunes at this layer."""
    return f"random at layer {layer} {keep}"


SCHEDULES = {
    "early": VisualTokenSchedule.one_shot(TARGET, 0.0, 0.25),
    "late": VisualTokenSchedule.one_shot(TARGET, 0.5, 0.25),
    "progressive": VisualTokenSchedule.progressive([0.25, 0.5, 0.75], [0.75, 0.5, 0.25], TARGET),
    "withdrawn": VisualTokenSchedule.withdraw(WITHDRAWN),
    "withdrawn, late": VisualTokenSchedule.withdraw(WITHDRAWN, 0.5),
}


def lengths_of(run: Run, provenance: Provenance, task: str) -> RequestLengths:
    """Return the lengths of the first test questions, which differ in one word only."""
    batch = prompts(model_of(run, provenance), test_rows(run, task)[:8])
    return RequestLengths(64, batch["input_ids"].shape[1] - 64, LENGTHS[task])


def rival(kind: str, keep: float) -> VisualTokenSchedule:
    """Return a schedule of a kind that ends with a given fraction of the tokens."""
    if kind == "progressive":
        third = (1 - keep) / 3
        return VisualTokenSchedule.progressive([0.25, 0.5, 0.75], [1 - third, 1 - 2 * third, keep], TARGET)
    return VisualTokenSchedule.one_shot(TARGET, 0.0 if kind == "early" else 0.5, keep)


def schedules(run: Run, provenance: Provenance, task: str) -> dict[str, Any]:
    """Evaluate each schedule, the whole model in fewer steps at equal cost, and rivals that match the cost of another.

    Early, late and progressive schedules match the FLOPs of the withdrawal by their kept fraction, the withdrawal those
    of the progressive schedule by its layer, as closely as they can.
    """
    steps, nothing = STEPS[task], VisualTokenSchedule()
    stack, lengths = text_of(model_of(run, provenance)), lengths_of(run, provenance, task)

    def spent(schedule: VisualTokenSchedule, steps: int = steps) -> int:
        return flops(schedule, LayerWidths.of(stack), len(stack), steps, lengths, CACHES[provenance] == "prompt")

    full = spent(nothing)

    def judged(schedule: VisualTokenSchedule, **options: Any) -> dict[str, Any]:
        view = pruned(run, provenance, schedule, **{"criterion": "fastv"} | options)
        return {"scores": scores(run, provenance, task, view), "flops": spent(schedule) / full}

    found: dict[str, Any] = {}
    for name, schedule in list(SCHEDULES.items())[2:4] if run.quick else SCHEDULES.items():
        fewer = max((each for each in range(1, steps + 1) if spent(nothing, each) <= spent(schedule)), default=1)
        alone = scores(run, provenance, task, model_of(run, provenance).model, fewer)
        found[name] = judged(schedule) | {"steps": fewer, "fewer": alone, "fewer flops": spent(nothing, fewer) / full}
    if run.quick:
        return found
    for kind in ("early", "late", "progressive"):
        shares = [rival(kind, place / 64) for place in range(64)]
        found[f"{kind}, at the FLOPs of withdrawn"] = judged(nearest(shares, spent, spent(SCHEDULES["withdrawn"])))
    layers = [VisualTokenSchedule.withdraw(layer) for layer in range(len(stack))]
    found["withdrawn, at the FLOPs of progressive"] = judged(nearest(layers, spent, spent(SCHEDULES["progressive"])))
    for positions, order in (("original", "position"), ("compact", "score")):
        each = judged(SCHEDULES["early"], positions=positions, order=order)
        found[f"early, positions {positions}, order {order}"] = each
    return found


def nearest(
    some: Sequence[VisualTokenSchedule], spent: Callable[[VisualTokenSchedule], int], target: int
) -> VisualTokenSchedule:
    """Return the schedule whose FLOPs are nearest to a target."""
    return min(some, key=lambda each: abs(spent(each) - target))


def probe(run: Run, provenance: Provenance, task: str) -> dict[str, Any]:
    """Measure KL and loss on one trajectory, and the distribution of attention."""
    model, rows = model_of(run, provenance), test_rows(run, task)[: 2 if run.quick else 40]
    view = pruned(run, provenance, SCHEDULES["early"], criterion="fastv")
    sampler = Sampler(length=LENGTHS[task], steps=STEPS[task], cache=CACHES[provenance])
    inputs = prompts(model, rows)
    full = follow(model.model, inputs, sampler)
    loss, kl = information_loss(full, follow(view, inputs, sampler, forced=full.tokens))
    return {
        "kl": kl.mean(dim=0).tolist(),
        "loss": loss.tolist(),
        "restored": list(restoration(kl, 0, run.seed)),
        "mass": attention_mass(text_of(model), full, inputs).mean(dim=0).tolist(),
    }


# Claims


def paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int) -> Measured:
    """Return the mean difference over settings, with its bootstrap interval over questions."""
    apart = np.mean([np.subtract(a, b) for a, b in zip(ours, theirs, strict=True)], axis=0)
    drawn = np.random.default_rng(seed).integers(len(apart), size=(DRAWS, len(apart)))
    low, high = np.quantile(apart[drawn].mean(axis=1), (0.025, 0.975))
    return Measured(float(apart.mean()), float(low), float(high))


def two_models(run: Run) -> None:
    found = {
        (provenance, task): {
            part.__name__: run.arm(f"{provenance} {task} {part.__name__}", part, run, provenance, task)
            for part in (sweep, schedules, probe)
        }
        for provenance in PROVENANCES
        for task in LENGTHS
    }
    tables(run, found)
    if run.quick:
        return
    learnt = {}
    for (provenance, task), parts in found.items():
        reached = fmean(parts["sweep"]["whole"])
        learnt[provenance, task] = reached >= LEARNT[task]
        run.exact(f"{provenance}, {task}: learnt", f"at least {LEARNT[task]:.0%}", reached, learnt[provenance, task])
    for (provenance, task), parts in found.items():
        claims(run, provenance, task, parts, learnt[provenance, task])
    restored = {provenance: found[provenance, "list"]["probe"]["restored"] for provenance in PROVENANCES}
    gap = restored["scratch"][1] - restored["ar2diff"][2]
    other = restored["scratch"][2] - restored["ar2diff"][1]
    verdict = True if gap > 0 else False if other < 0 else None
    both = learnt["scratch", "list"] and learnt["ar2diff", "list"]
    measured = f"{restored['scratch'][0]:.3g} and {restored['ar2diff'][0]:.3g}"
    run.further(
        "more is recovered from scratch than after adaptation, long answers", "so", measured, verdict if both else None
    )


def claims(run: Run, provenance: str, task: str, parts: Mapping[str, Any], learnt: bool) -> None:
    """Check the claims on one model and one task, if the model has learnt it."""
    swept, timed, of = parts["sweep"], parts["schedules"], f"{provenance}, {task}"

    def check(add: Callable[..., None], name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
        apart = paired(ours, theirs, run.seed)
        add(f"{of}: {name}", "0 or more", str(apart), apart.at_least(0) if learnt else None)

    blind, prior = fmean(swept["blind"]), PRIORS[task]
    run.main(f"{of}: without its image", f"at most {prior}", blind, blind <= prior if learnt else None)
    shares = " and ".join(map(str, JUDGED))
    gains = {
        criterion: paired(
            [swept[f"{criterion} {keep}"] for keep in JUDGED],
            [swept[control(LAYERS[criterion], keep)] for keep in JUDGED],
            run.seed,
        )
        for criterion in ("fastv", "divprune")
    }
    criterion, best = max(gains.items(), key=lambda each: each[1].figure)
    name = f"{of}: attention or diversity minus random at its layer, kept fractions {shares}"
    run.main(name, "0 or more", f"{criterion}, {best}", best.at_least(0) if learnt else None)
    if task != "list":
        return
    check(run.main, "late minus early at kept fraction 0.25", [timed["late"]["scores"]], [timed["early"]["scores"]])
    first, other = ("withdrawn", "progressive") if provenance == "ar2diff" else ("progressive", "withdrawn")
    check(run.further, f"{first} minus {other}, kept fraction 0.25", [timed[first]["scores"]], [timed[other]["scores"]])
    sign = 1 if first == "withdrawn" else -1
    pairs = [("withdrawn", f"{kind}, at the FLOPs of withdrawn") for kind in ("early", "late", "progressive")]
    for ours, theirs in [*pairs, ("withdrawn, at the FLOPs of progressive", "progressive")]:
        at_equal_cost(run, of, [ours, theirs][::sign], timed, learnt)
    fewer = [timed[first][name] for name in ("fewer", "flops", "fewer flops")]
    name = f"{first} minus fewer steps, FLOPs {fewer[1]:.2f} and {fewer[2]:.2f} of the whole"
    check(run.further, name, [timed[first]["scores"]], [fewer[0]])


def at_equal_cost(run: Run, of: str, names: Sequence[str], timed: Mapping[str, Any], learnt: bool) -> None:
    """Compare two schedules at similar FLOPs; if they cannot be matched, report the remaining difference."""
    ours, theirs = (timed[name] for name in names)
    apart = paired([ours["scores"]], [theirs["scores"]], run.seed)
    costs = f"FLOPs {ours['flops']:.3f} and {theirs['flops']:.3f} of the whole"
    equal = abs(ours["flops"] - theirs["flops"]) <= NEAR
    measured = f"{apart}, {costs}" + ("" if equal else ": not equal")
    run.further(
        f"{of}: {' minus '.join(names)}", "0 or more", measured, apart.at_least(0) if learnt and equal else None
    )


def tables(run: Run, found: Mapping[Any, Any]) -> None:
    rows = [[*key, name, fmean(values)] for key, parts in found.items() for name, values in parts["sweep"].items()]
    run.table("Criteria and kept fractions, selected in the first step", ["model", "task", "kept", "score"], rows)
    rows = [
        [
            *key,
            name,
            each["flops"],
            fmean(each["scores"]),
            *([each["steps"], each["fewer flops"], fmean(each["fewer"])] if "fewer" in each else [None] * 3),
        ]
        for key, parts in found.items()
        for name, each in parts["schedules"].items()
    ]
    columns = ["model", "task", "schedule", "FLOPs", "score"]
    columns += ["steps of the whole model, at most these FLOPs", "its FLOPs", "its score"]
    run.table("Schedules, fastv, kept fraction 0.25", columns, rows)
    listed = {provenance: found[provenance, "list"]["schedules"] for provenance in PROVENANCES}
    points = {
        f"{provenance}, {kind}": [
            (each["flops"], fmean(each["scores"])) for name, each in timed.items() if name.startswith(kind)
        ]
        for provenance, timed in listed.items()
        for kind in ("early", "late", "progressive", "withdrawn")
    }
    fewer = [each for timed in listed.values() for each in timed.values() if "fewer" in each]
    points["fewer steps, either"] = [(each["fewer flops"], fmean(each["fewer"])) for each in fewer]
    drawn = Scatter("FLOPs, of the whole model's", "objects named in a list, share", points)
    run.figure("dmllm-token-redundancy-schedules", drawn)
    rows = [
        [*key, *parts["probe"]["restored"], parts["probe"]["kl"][0], parts["probe"]["kl"][-1]]
        for key, parts in found.items()
    ]
    run.table("Recovery", ["model", "task", "restored", "low", "high", "KL, first step", "KL, last step"], rows)
    layers = len(next(iter(found.values()))["probe"]["mass"])
    rows = [[*key, *parts["probe"]["mass"]] for key, parts in found.items()]
    run.table(
        "Fraction of the answers' attention on the image, by layer",
        ["model", "task", *map(str, range(layers))],
        rows,
    )


@torch.no_grad()
def latency(run: Run) -> None:
    """Time a step without a cache at fraction 0.25, against its layers' FLOPs, for 16 x 16 and 24 x 24 image tokens."""
    rows = [step_time(side) for side in ((32,) if run.quick else (64, 96))]
    run.table("Time of a step at kept fraction 0.25", ["image tokens", "FLOPs", "time", "ratio"], rows)
    if not run.quick:
        for tokens, _, _, ratio in rows:
            name = f"{tokens:.0f} image tokens: time of a step at kept fraction 0.25 relative to its FLOPs"
            run.further(name, "0.8 to 1.2", ratio, 0.8 <= ratio <= 1.2)


def step_time(side: int) -> list[float]:
    """Return the number of image tokens, and the fractions of FLOPs and time of a step that keeps a quarter of them."""
    made, processor = shapes_vlm("llava_llada", 0, side, hidden_size=384, intermediate_size=1152)
    model = open_model(made)
    batch = processor_inputs(processor, shown("colour", 1, "test", 0))
    schedule = VisualTokenSchedule.one_shot(-1, 0.0, 0.25)
    view = apply(model, plan_of(model, schedule, criterion="divprune"))
    sampler = Sampler(length=8, steps=8)
    requests = [Denoising(each, sampler=sampler, **batch) for each in (made, view)]
    took: list[list[float]] = [[], []]
    for _ in range(sampler.in_all):
        for place, request in enumerate(requests):
            began = time.perf_counter()
            request.advance()
            took[place].append(time.perf_counter() - began)
    stack = text_of(model)
    image = int((batch["input_ids"] == made.config.image_token_id).sum())
    lengths = RequestLengths(image, batch["input_ids"].shape[1] - image, 8)
    measured = [
        of_step(each, LayerWidths.of(stack), len(stack), 1, 8, lengths) for each in (VisualTokenSchedule(), schedule)
    ]
    measured, ideal = median(took[1][1:]) / median(took[0][1:]), measured[1] / measured[0]
    return [image, ideal, measured, measured / ideal]


def experiment(run: Run) -> None:
    run.data = "questions about rendered shapes: a colour, or a list of everything"
    with torch.no_grad():
        run.part("exactness", exactness)
        two_models(run)
        run.part("latency", latency)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="small models that have learnt nothing, so no claims on them"))
