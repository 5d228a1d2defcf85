"""Visual token redundancy at small scale: masked-diffusion models trained from scratch or converted from a decoder.

Both have one shape (harness/dmllm.py): 16 image tokens and six layers, each trained with three seeds. They answer
questions about rendered shapes, with a word (``colour``) or with a list of all objects (``list``). The premise is that
all models have learned both tasks and need the image for them. The main claim: attention or diversity, whichever is
better on other questions, selects better tokens than random draws at the same layer, and pruning late is no worse than
early for long answers. Kept tokens keep their positions; positions that are closed up, as in the authors' code, are one
row of the table. Further checks are schedules at equal fractions and, as closely as possible, at the FLOPs of the
withdrawal, including fewer denoising steps, the recovery of information on one trajectory, and the time of a step.
Intervals are over seeds and questions; the short and the long task are never pooled.

    python reproductions/dmllm_token_redundancy.py            # about two hours on one core; an interrupted run resumes
    python reproductions/dmllm_token_redundancy.py --quick    # models that do not meet the premise
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.dmllm import CACHES, LENGTHS, PROVENANCES, Provenance, prompts, shown, trained
from harness.measured import Measured

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

SEEDS = (0, 1, 2)
LEARNED = {"colour": 0.9, "list": 0.8}  # required scores of the whole models
# Highest scores without images: one of six colours, with some luck; hardly any object at random
PRIORS = {"colour": 0.35, "list": 0.05}
TARGET, WITHDRAWN = 1, 3  # l* of pruning, and of layer-skipping: 0.6 of six layers
LAYERS = {"fastv": TARGET, "divprune": -1, "sparsevlm": TARGET, "trim": -1, "tome": -1}  # l*; -1: on the embeddings
JUDGED = ("fastv", "divprune")  # by attention and by diversity
KEEPS = (0.5, 0.25)
DRAWS = 3  # of random tokens
STEPS = {"colour": 2, "list": 13}
NEAR = 0.02  # schedules whose FLOPs differ by less, relative to the whole model, cost the same
IN_PLACE = {"positions": "original"}


@cache
def opened(provenance: Provenance, seed: int, quick: bool) -> Model:
    return trained(provenance, seed, quick)


# Answers of a model


def scored(task: str, answer: str, truth: str) -> float:
    """Score an answer: a word is right or wrong; a list scores the fraction of its objects that are named in full."""
    if task == "colour":
        return float(answer == truth)
    wanted, found = (
        {" ".join(words[begin : begin + 6]) for begin in range(0, len(words), 6)}
        for words in (truth.split(), answer.split())
    )
    return len(wanted & found) / len(wanted)


class Questions:
    """The test questions of one task for one model, whose answers are scored.

    Args:
        provenance: the kind of model.
        seed: random seed of the model.
        task: the task.
        quick: whether the model is trained for a few steps only.
    """

    def __init__(self, provenance: Provenance, seed: int, task: str, quick: bool) -> None:
        self.provenance, self.task = provenance, task
        self.model = opened(provenance, seed, quick)
        count = 2 if quick else 120
        self.test, self.others = shown(task, count, "test", 900), shown(task, count, "calibration", 901)

    def scores(self, view: Any, steps: int | None = None, rows: Sequence[ImageTextRow] | None = None) -> list[float]:
        """Return the score of a view or a model on each test question, or on other rows."""
        rows, length = rows or self.test, LENGTHS[self.task]
        tokenizer = open_processor(self.model.path).tokenizer
        sampler = Sampler(length=length, steps=steps or STEPS[self.task], cache=CACHES[self.provenance])
        found: list[float] = []
        for start in range(0, len(rows), 60):
            part = rows[start : start + 60]
            answers = denoise(view, sampler=sampler, **prompts(self.model, part))[:, -length:]
            for row, ids in zip(part, answers.tolist(), strict=True):
                ends = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
                found.append(scored(self.task, tokenizer.decode(ids[:ends]), row.answer))
        return found

    def pruned(self, schedule: VisualTokenSchedule, **options: Any) -> Any:
        return apply(self.model, plan_of(self.model, schedule, **IN_PLACE | options))

    def lengths(self) -> RequestLengths:
        """Return the lengths of the first test questions, which differ in one word only."""
        ids = prompts(self.model, self.test[:8])["input_ids"]
        image = int((ids[0] == self.model.model.config.image_token_id).sum())
        return RequestLengths(image, ids.shape[1] - image, LENGTHS[self.task])


def once(layer: int, keep: float) -> VisualTokenSchedule:
    return VisualTokenSchedule.one_shot(layer, 0.0, keep)


def premise(provenance: Provenance, seed: int, task: str, quick: bool) -> dict[str, float]:
    """Return the score of the whole model, and without its image."""
    asked = Questions(provenance, seed, task, quick)
    blind = asked.pruned(once(-1, 0.0), criterion="withdraw")
    return {"whole": fmean(asked.scores(asked.model.model)), "blind": fmean(asked.scores(blind))}


def sweep(provenance: Provenance, seed: int, task: str, quick: bool) -> dict[str, Any]:
    """Score criteria at every fraction, and random tokens pruned at the same layers, several draws of them.

    Attention and diversity are scored on other questions, too, by which one of them is chosen.
    """
    asked = Questions(provenance, seed, task, quick)
    found: dict[str, Any] = {"whole": asked.scores(asked.model.model)}
    for keep in KEEPS:
        for criterion in LAYERS if seed == SEEDS[0] else JUDGED:
            view = asked.pruned(once(LAYERS[criterion], keep), criterion=criterion)
            found[f"{criterion} {keep}"] = asked.scores(view)
            if criterion in JUDGED:
                found[f"{criterion} {keep}, other questions"] = asked.scores(view, rows=asked.others)
        for layer in (TARGET, -1):
            views = [asked.pruned(once(layer, keep), criterion="random", seed=draw) for draw in range(DRAWS)]
            found[control(layer, keep)] = np.mean([asked.scores(view) for view in views], 0).tolist()
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


def rival(kind: str, keep: float) -> VisualTokenSchedule:
    """Return a schedule of a kind that ends with a given fraction of the tokens."""
    if kind == "progressive":
        third = (1 - keep) / 3
        return VisualTokenSchedule.progressive([0.25, 0.5, 0.75], [1 - third, 1 - 2 * third, keep], TARGET)
    return VisualTokenSchedule.one_shot(TARGET, 0.0 if kind == "early" else 0.5, keep)


def schedules(provenance: Provenance, seed: int, task: str, quick: bool) -> dict[str, Any]:
    """Score each schedule, the whole model in fewer steps at equal cost, and rivals that match the cost of another.

    Early, late and progressive schedules match the FLOPs of the withdrawal by their kept fraction, the withdrawal those
    of the progressive schedule by its layer, as closely as they can.
    """
    asked = Questions(provenance, seed, task, quick)
    steps, nothing, stack, lengths = STEPS[task], VisualTokenSchedule(), text_of(asked.model), asked.lengths()

    def spent(schedule: VisualTokenSchedule, steps: int = steps) -> int:
        return flops(schedule, LayerWidths.of(stack), len(stack), steps, lengths, CACHES[provenance] == "prompt")

    full = spent(nothing)

    def judged(schedule: VisualTokenSchedule, **options: Any) -> dict[str, Any]:
        view = asked.pruned(schedule, **{"criterion": "fastv"} | options)
        return {"scores": asked.scores(view), "flops": spent(schedule) / full}

    found: dict[str, Any] = {}
    for name, schedule in SCHEDULES.items():
        fewer = max((each for each in range(1, steps + 1) if spent(nothing, each) <= spent(schedule)), default=1)
        alone = asked.scores(asked.model.model, fewer)
        found[name] = judged(schedule) | {"steps": fewer, "fewer": alone, "fewer flops": spent(nothing, fewer) / full}
    for kind in ("early", "late", "progressive"):
        shares = [rival(kind, kept / lengths.image) for kept in range(lengths.image)]
        found[f"{kind}, at the FLOPs of withdrawn"] = judged(nearest(shares, spent, spent(SCHEDULES["withdrawn"])))
    layers = [VisualTokenSchedule.withdraw(layer) for layer in range(len(stack))]
    found["withdrawn, at the FLOPs of progressive"] = judged(nearest(layers, spent, spent(SCHEDULES["progressive"])))
    for order in ("position", "score"):
        name = f"early, positions closed up, order {order}"
        found[name] = judged(SCHEDULES["early"], positions="compact", order=order)
    return found


def nearest(
    some: Sequence[VisualTokenSchedule], spent: Callable[[VisualTokenSchedule], int], target: int
) -> VisualTokenSchedule:
    """Return the schedule whose FLOPs are nearest to a target."""
    return min(some, key=lambda each: abs(spent(each) - target))


def probe(provenance: Provenance, seed: int, task: str, quick: bool) -> dict[str, Any]:
    """Measure KL and loss on one trajectory, and the distribution of attention."""
    asked = Questions(provenance, seed, task, quick)
    view = asked.pruned(SCHEDULES["early"], criterion="fastv")
    sampler = Sampler(length=LENGTHS[task], steps=STEPS[task], cache=CACHES[provenance])
    inputs = prompts(asked.model, asked.test[:40])
    full = follow(asked.model.model, inputs, sampler)
    _, kl = information_loss(full, follow(view, inputs, sampler, forced=full.tokens))
    return {
        "kl": kl.mean(dim=0).tolist(),
        "restored": restoration(kl, 0, seed)[0],
        "mass": attention_mass(text_of(asked.model), full, inputs).mean(dim=0).tolist(),
    }


# Claims

Parts = Mapping[str, Sequence[Any]]  # the results of each part, by seed


def claims(run: Run) -> None:
    seeds, settings = SEEDS[:1] if run.quick else SEEDS, list(product(PROVENANCES, LENGTHS))

    def measured(part: Callable[..., Any]) -> dict[tuple[str, str], list[Any]]:
        return {
            (provenance, task): [run.arm(f"{provenance}, {task}, {part.__name__}, seed {seed}", part, provenance, seed,
                                         task, run.quick) for seed in seeds]
            for provenance, task in settings
        }  # fmt: skip

    known = measured(premise)
    for task, least in LEARNED.items():
        whole, blind = ([each[name] for provenance in PROVENANCES for each in known[provenance, task]]
                        for name in ("whole", "blind"))  # fmt: skip
        name = f"{task}: lowest score of the whole models"
        run.premise(name, f"at least {least:g}", min(whole), min(whole) >= least)
        name, most = f"{task}: highest score without the image", PRIORS[task]
        run.premise(name, f"at most {most:g}", max(blind), max(blind) <= most)
    run.freeze("mean over models and questions of the difference of scores", seeds, keeps=KEEPS, draws=DRAWS,
               judged=JUDGED, steps=STEPS)  # fmt: skip
    parts = {part.__name__: measured(part) for part in (sweep, schedules, probe)}
    found: dict[tuple[str, str], Parts] = {key: {name: each[key] for name, each in parts.items()} for key in settings}
    tables(run, found)
    for (provenance, task), each in found.items():
        selection(run, f"{provenance}, {task}", each["sweep"])
        if task == "list":
            timing(run, provenance, each["schedules"])
    restored = [[each["restored"] for each in found[provenance, "list"]["probe"]] for provenance in PROVENANCES]
    more = Measured.over_seeds(np.subtract(*restored).tolist())
    run.further("recovery from scratch less that after adaptation, long answers", "at least 0", more, more.at_least(0))


def selection(run: Run, of: str, swept: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """Compare the better of attention and diversity, by other questions, with random tokens at its layer."""

    def mean(name: str) -> np.ndarray:
        """Return scores [seeds, questions], mean over fractions."""
        return np.mean([[each[name.format(keep)] for each in swept] for keep in KEEPS], 0)

    best = max(JUDGED, key=lambda criterion: mean(criterion + " {}, other questions").mean())
    gain = Measured.over_seeds_and_items(mean(best + " {}") - mean(f"random at layer {LAYERS[best]} {{}}"))
    name = f"{of}: {best} minus random tokens at its layer, kept fractions {' and '.join(map(str, KEEPS))}"
    run.main(name, "at least 0", gain, gain.at_least(0))


def timing(run: Run, provenance: str, timed: Sequence[Mapping[str, Any]]) -> None:
    """Compare schedules of one kind of model on long answers, at equal fractions and at equal FLOPs."""
    of = f"{provenance}, list"

    def scores(name: str, key: str = "scores") -> np.ndarray:
        return np.array([each[name][key] for each in timed])

    late = Measured.over_seeds_and_items(scores("late") - scores("early"))
    run.main(f"{of}: late minus early at kept fraction 0.25", "at least 0", late, late.at_least(0))
    first = "withdrawn" if provenance == "ar2diff" else "progressive"  # which the paper finds better
    pairs = [("withdrawn", f"{kind}, at the FLOPs of withdrawn") for kind in ("early", "late", "progressive")]
    pairs = [("withdrawn", "progressive"), *pairs, ("withdrawn, at the FLOPs of progressive", "progressive")]
    for pair in pairs:
        ours, theirs = pair if first == "withdrawn" else pair[::-1]
        apart = Measured.over_seeds_and_items(scores(ours) - scores(theirs))
        costs = [timed[0][name]["flops"] for name in (ours, theirs)]
        equal = abs(costs[0] - costs[1]) <= NEAR or pair == pairs[0]  # the first pair is at an equal fraction
        measured = f"{apart}, FLOPs {costs[0]:.3f} and {costs[1]:.3f} of the whole" + ("" if equal else ": not equal")
        run.further(f"{of}: {ours} minus {theirs}", "at least 0", measured, apart.at_least(0) if equal else None)
    fewer = Measured.over_seeds_and_items(scores(first) - scores(first, "fewer"))
    costs = [timed[0][first][name] for name in ("flops", "fewer flops")]
    name = f"{of}: {first} minus fewer steps, FLOPs {costs[0]:.2f} and {costs[1]:.2f} of the whole"
    run.further(name, "at least 0", fewer, fewer.at_least(0))


def tables(run: Run, found: Mapping[tuple[str, str], Parts]) -> None:
    rows = [
        [*key, name, np.mean([each[name] for each in parts["sweep"] if name in each])]
        for key, parts in found.items()
        for name in parts["sweep"][0]
    ]
    title = "Criteria and kept fractions, selected in the first step, mean over models"
    run.table(title, ["model", "task", "kept", "score"], rows)

    def mean(timed: Sequence[Mapping[str, Any]], name: str, key: str) -> Any:
        return float(np.mean([each[name][key] for each in timed])) if key in timed[0][name] else None

    keys = ("flops", "scores", "steps", "fewer flops", "fewer")
    rows = [
        [*key, name, *(mean(parts["schedules"], name, each) for each in keys)]
        for key, parts in found.items()
        for name in parts["schedules"][0]
    ]
    columns = ["model", "task", "schedule", "FLOPs", "score"]
    columns += ["steps of the whole model, at most these FLOPs", "its FLOPs", "its score"]
    run.table("Schedules, fastv, kept fraction 0.25, positions kept, mean over models", columns, rows)
    listed = {provenance: found[provenance, "list"]["schedules"] for provenance in PROVENANCES}
    points = {
        f"{provenance}, {kind}": [
            (mean(timed, name, "flops"), mean(timed, name, "scores")) for name in timed[0] if name.startswith(kind)
        ]
        for provenance, timed in listed.items()
        for kind in ("early", "late", "progressive", "withdrawn")
    }
    points["fewer steps, either"] = [
        (mean(timed, name, "fewer flops"), mean(timed, name, "fewer"))
        for timed in listed.values()
        for name in SCHEDULES
    ]
    drawn = Scatter("FLOPs, of the whole model's", "objects named in a list, share", points)
    run.figure("dmllm-token-redundancy-schedules", drawn)
    rows = [
        [*key, str(Measured.over_seeds([each["restored"] for each in parts["probe"]])),
         *(fmean(each["kl"][step] for each in parts["probe"]) for step in (0, -1))]
        for key, parts in found.items()
    ]  # fmt: skip
    run.table("Recovery", ["model", "task", "restored", "KL, first step", "KL, last step"], rows)
    rows = [[*key, *np.mean([each["mass"] for each in parts["probe"]], 0)] for key, parts in found.items()]
    title = "Fraction of the answers' attention on the image, by layer, mean over models"
    run.table(title, ["model", "task", *map(str, range(len(rows[0]) - 2))], rows)


@torch.no_grad()
def latency(run: Run) -> None:
    """Time a step without a cache at fraction 0.25, against its layers' FLOPs, for 16 x 16 and 24 x 24 image tokens."""
    rows = [step_time(side) for side in ((32,) if run.quick else (64, 96))]
    run.table("Time of a step at kept fraction 0.25", ["image tokens", "FLOPs", "time", "ratio"], rows)
    for tokens, _, _, ratio in rows:
        name = f"{tokens:.0f} image tokens: time of a step at kept fraction 0.25 relative to its FLOPs"
        run.further(name, "0.8 to 1.2", ratio, 0.8 <= ratio <= 1.2)


def step_time(side: int) -> list[float]:
    """Return the number of image tokens, and the fractions of FLOPs and time of a step that keeps a quarter of them."""
    made, processor = shapes_vlm("llava_llada", 0, side, hidden_size=384, intermediate_size=1152)
    model = open_model(made)
    batch = Processing(processor).prompts(shown("colour", 1, "test", 0))
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
        run.part("latency", latency)
        claims(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="models that do not meet the premise, and a smaller image in the timing"))
