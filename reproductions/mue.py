"""MuE at small scale: a nano vision-language encoder-decoder with early exits by image, by text and by token.

A model of 6 and 6 layers is trained on rendered shapes of up to two objects (those of one kind look alike), long enough
to answer, and fine-tuned on questions about the colour or the position of an object, and on captions. Rows differ in
difficulty: in an image of one object there is nothing to find, and in one of two the right object must be found; the
words of a caption differ, too. There are three arms, each at its own rate: the loss of the last layer, which is plain
fine-tuning, of every layer, and of every layer with separate modalities, which is MuE. The main claim: at a reduction
of 40 % by layers, MuE keeps 96 % of the accuracy of plain fine-tuning; it is no less accurate than the same exits
shuffled over rows; and exits of the encoder save layers beyond those of the decoder. Thresholds are chosen on held-out
rows, slightly beyond the aim. Further checks are the cost of the loss of every layer, one exit for both modalities,
whether images of two objects exit later than those of one, and the time of one request against the prediction from
multiplications. Answers count as correct if they match exactly, and exits are measured with teacher forcing.

    python reproductions/mue.py            # about two hours on one core; an interrupted run resumes
    python reproductions/mue.py --quick    # a model that does not meet the premise, and the time of a request
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import scratch
from harness.vlm import RECIPE, asked, fit_into, opened_vlm, shown_row

from lamella.data import ImageText, Processing
from lamella.evaluate import Ratio
from lamella.methods.mue import (
    OFF,
    ExitCosts,
    Exits,
    ExitSettings,
    ModalityExits,
    TokenExits,
    best_trial,
    by_flops,
    by_layers,
    exit_view,
    histograms,
    measure_exits,
    pareto_trials,
    quantile_thresholds,
    search_thresholds,
)
from lamella.methods.mue.baselines import EntropyExits, FusedExits, PatienceExits, shuffled
from lamella.methods.mue.method import attempt, depths, exact_match
from lamella.methods.mue.policy import MODALITIES
from lamella.methods.mue.recipe import exit_plan, train_view
from lamella.methods.mue.search import ExitTrial
from lamella.report.figures import Scatter
from lamella.results.record import together
from lamella.runtime import with_policies
from lamella.stack import Model, open_model
from lamella.train import Task, response_loss, with_weights_of
from lamella.zoo.cache import build_once
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm
from lamella.zoo.worlds import SIZE, examples

KIND = "patch_mbart"  # its layers are pre-norm, like those of OFA
LAYERS = (6, 6)
OBJECTS = 2  # at most, in an image
TASKS = {"questions": ("colour", "position"), "captions": ("caption",)}
MIXED = ("colour", "position", "caption")
ARMS = ("last layer", "every layer", "apart")
PILOT, SEEDS = 100, (4, 5, 6, 7)
HELD_OUT = 1000  # draw of held-out rows; the draws of training rows are twice the seed of a model, and the next
GRID = (3e-4, 6e-4, 1.2e-3)
LEARNED = 0.8  # required accuracy before fine-tuning, and of plain fine-tuning
SOME = 0.1  # required share of correct rows that the first decoder layer answers, and of those that it does not
SWEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # quantiles of S
AIM, RETAINED = 0.4, 0.96  # target reduction by layers, and required accuracy relative to plain fine-tuning
AIMED = 0.42  # required reduction on held-out rows, with a margin for test rows
# Accuracy, relative to full depth, at which exits of both stacks are compared with those of one; and on held-out rows
KEPT, KEPT_AIMED = 0.98, 0.99
ALONE = ("both", "decoder alone", "encoder alone")
CUT = 2.5  # mean layers of a limited modality, of six: a third to a half


@dataclass(frozen=True)
class Size:
    """The scale of the experiment: steps of the base model and of its fine-tuning, and numbers of rows."""

    base: int
    steps: int
    held_out: int
    test: int

    def folder(self, seed: int) -> Path:
        """Return the folder of the model before fine-tuning, from the cache if it was trained before."""

        def build(folder: Path) -> dict[str, Any]:
            model, processor = shapes_vlm(KIND, seed, patch=8)
            processing = Processing(processor, encodes=True)
            config = replace(RECIPE, batch=32, weight_decay=0.01, bf16=False, steps=self.base, save_every=self.base)
            rows = asked(self.base * config.batch, 2 * seed, SIZE, MIXED, OBJECTS, varied=False)
            task = Task(response_loss, collate=processing.batch)
            fit_into(folder, model, processor, rows, task, replace(config, seed=seed))
            return {"steps": self.base, "seed": seed}

        return build_once(f"reproduction-mue-{self.base}-{seed}", build, megabytes=20)

    def rows(self, tasks: Sequence[str], count: int, part: Any, draw: int) -> ImageText:
        """Return rows of some tasks; they are the same for all models."""
        found = [shown_row(each, varied=False) for each in examples(tasks, count, part, draw, SIZE, OBJECTS)]
        return ImageText(found, Processing(open_processor(self.folder(PILOT)), encodes=True))

    def tests(self, task: str) -> ImageText:
        return self.rows(TASKS[task], self.test, "test", 7)

    def objects(self, task: str) -> list[int]:
        """Return the number of objects in the image of each test row."""
        return [len(each.scene.objects) for each in examples(TASKS[task], self.test, "test", 7, SIZE, OBJECTS)]

    def held(self, task: str) -> ImageText:
        return self.rows(TASKS[task], self.held_out, "calibration", HELD_OUT)


# The time of a request


def request_times(run: Run) -> dict[str, Any]:
    """Time one request at SmolLM2's width, whole and with fixed exits at 40 % of the layers."""
    changes = {"d_model": 576, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "encoder_attention_heads": 9}
    made, processor = shapes_vlm(KIND, run.seed, 64, **changes, decoder_attention_heads=9)
    model = open_model(made)
    row = rows_like(processor, 64)
    inputs = row.prompts(row)
    written = 4
    e, j = 2, 4  # (2 + 4 * written) of (6 + 6 * written) layers are left: 60 %
    views = {"whole": exit_view(model, ExitSettings(), {}),
             "early": with_policies(model, exit_plan(model, ExitSettings().params({})), {
                 "encoder": ModalityExits(model.stacks["encoder"], image=-OFF, text=-OFF, min_layer=e),
                 "decoder": TokenExits(model.stacks["decoder"], threshold=-OFF, min_layer=j)})}  # fmt: skip
    ratios = []
    for _ in range(4 if run.quick else 20):
        took = {}
        for name, view in views.items():
            began = time.perf_counter()
            view.generate(**inputs, max_new_tokens=written, min_new_tokens=written, do_sample=False)
            took[name] = time.perf_counter() - began
        ratios.append(took["early"] / took["whole"])
    image = int((inputs["input_ids"] == made.config.image_token_id).sum())
    taken = Exits(
        {"image": torch.tensor([e]), "text": torch.tensor([e])},
        {"image": torch.tensor([image]), "text": torch.tensor([inputs["input_ids"].shape[1] - image])},
        torch.full((written,), j), torch.zeros(written, dtype=torch.long), torch.arange(written), torch.tensor([True]),
        0.0, {},
    )  # fmt: skip
    ratio = Ratio.of(ratios[1:])
    predicted = by_flops(taken, ExitCosts.of(model.stacks["encoder"], model.stacks["decoder"]))
    return {"ratio": [ratio.median, ratio.low, ratio.high], "flops": predicted, "layers": by_layers(taken, LAYERS)}


def rows_like(processor: Any, size: int) -> ImageText:
    """Return one question about an image of another size."""
    [row] = examples(["entailment"], 1, "test", 0, size)
    return ImageText([shown_row(row)], Processing(processor, encodes=True))


# The arms


def fine_tuned(size: Size, arm: str, seed: int, rate: float) -> Model:
    """Fine-tune the model of a seed in one arm."""
    model = open_model(opened_vlm(size.folder(seed)))
    settings = ExitSettings(loss="final" if arm == "last layer" else "layerwise")
    view = viewed(model, settings, fused=arm != "apart")
    config = replace(RECIPE, batch=32, weight_decay=0.01, schedule="linear", warmup=0.06, bf16=False, lr=rate)
    config = replace(config, steps=size.steps, save_every=size.steps, seed=seed)
    rows = asked(size.steps * config.batch, 2 * seed + 1, SIZE, MIXED, OBJECTS, varied=False)
    samples = ImageText(rows, Processing(open_processor(size.folder(seed)), encodes=True))
    with torch.enable_grad():
        train_view(view, samples, settings, config, scratch("mue"))
    return open_model(with_weights_of(model.stacks["decoder"], view).model)


def settings_of(task: str) -> ExitSettings:
    return ExitSettings(decay=(0.95, 1.0) if task == "captions" else None)


def viewed(model: Model, settings: ExitSettings, fused: bool = False, **policies: Any) -> Any:
    """Return a view with exits disabled, or with the given policies."""
    encoder = FusedExits(model.stacks["encoder"]) if fused else ModalityExits(model.stacks["encoder"])
    given = {"encoder": encoder, "decoder": TokenExits(model.stacks["decoder"])} | policies
    return with_policies(model, exit_plan(model, settings.params({})), given)


def fixed(model: Model, e: int, j: int, fused: bool = False) -> Any:
    """Return a view in which all tokens exit after the same layers."""
    encoder, decoder = model.stacks["encoder"], model.stacks["decoder"]
    first = FusedExits(encoder, -OFF, e) if fused else ModalityExits(encoder, image=-OFF, text=-OFF, min_layer=e)
    last = TokenExits(decoder, threshold=-OFF, min_layer=j)
    return viewed(model, ExitSettings(), encoder=first, decoder=last)


def by_depth(model: Model, rows: ImageText, fused: bool) -> list[list[bool]]:
    """Return which rows are correct, by the depth of the decoder [layers, rows]."""
    return [measure_exits(fixed(model, LAYERS[0], j, fused), rows).correct.tolist() for j in range(1, LAYERS[1] + 1)]


def validated(size: Size, arm: str, rate: float) -> float:
    """Return the loss of an arm of the pilot at full depth on held-out rows, mean of both tasks."""
    model = fine_tuned(size, arm, PILOT, rate)
    views = viewed(model, ExitSettings(), fused=arm != "apart")
    return fmean(measure_exits(views, size.held(task)).loss for task in TASKS)


def answered(size: Size, seed: int) -> float:
    """Return the exact match of the model of a seed before fine-tuning on held-out questions."""
    model = open_model(opened_vlm(size.folder(seed)))
    return exact_match(measure_exits(viewed(model, ExitSettings(), fused=True), size.held("questions")))


def difficulty(size: Size, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracy of plain fine-tuning, and the share of correct questions that the first layer answers."""
    plain, apart = (fine_tuned(size, arm, PILOT, rates[arm]) for arm in ("last layer", "apart"))
    found = {}
    for task in TASKS:
        found[task] = exact_match(measure_exits(viewed(plain, ExitSettings(), fused=True), size.held(task)))
    right = np.array(by_depth(apart, size.held("questions"), fused=False))
    return found | {"first layer": float(right[0][right[-1]].mean()) if right[-1].any() else 1.0}


def judged(size: Size, arm: str, seed: int, rate: float, whole: bool = False) -> dict[str, Any]:
    """Fine-tune an arm and test it: correct rows by depth, and its exits; with ``whole``, the baselines too."""
    model, found = fine_tuned(size, arm, seed, rate), {}
    for task in TASKS:
        test, held_out, settings = size.tests(task), size.held(task), settings_of(task)
        each: dict[str, Any] = {"depths": by_depth(model, test, fused=arm != "apart")}
        if arm == "every layer":
            each["fused"] = one_exit(model, settings, test, held_out)
        if arm == "apart":
            each |= searches(model, settings, test, held_out, size.objects(task))
            if whole:
                each |= alternatives(model, settings, test, held_out)
        found[task] = each
    return found


def one_exit(model: Model, settings: ExitSettings, test: ImageText, held_out: ImageText) -> dict[str, Any]:
    """Test exits without decomposition: a joint exit of all encoder tokens, and the decoder's exits."""

    def tried(rows: ImageText, tau: Mapping[str, float]) -> ExitTrial:
        encoder = FusedExits(model.stacks["encoder"], tau.get("fused", OFF))
        decoder = TokenExits(model.stacks["decoder"], **settings.params(tau)["decoder"])
        taken = measure_exits(viewed(model, settings, encoder=encoder, decoder=decoder), rows)
        cosines = {"fused": taken.cosines["text"], "decoder": taken.cosines["decoder"]}  # equal for both modalities
        taken = replace(taken, cosines=cosines)
        return ExitTrial(dict(tau), exact_match(taken), by_layers(taken, LAYERS), taken)

    return outcome(tried(test, aimed(search_thresholds(partial(tried, held_out), SWEPT)).tau), model)


def aimed(some: Sequence[ExitTrial]) -> ExitTrial:
    """Return the best attempt on held-out rows whose reduction is at least the target."""
    beyond = [one for one in some if one.reduction >= AIMED]
    return max(beyond, key=lambda one: (one.correct, -one.reduction), default=pareto_trials(some)[-1])


def searches(
    model: Model, settings: ExitSettings, test: ImageText, held_out: ImageText, objects: Sequence[int]
) -> dict[str, Any]:
    """Choose thresholds on held-out rows, and test them, and the same exits shuffled over rows."""
    params = settings.params({})
    tried = search_thresholds(partial(attempt, model, params, held_out), SWEPT)
    full = tried[0].correct
    limits = {
        "mue": aimed(tried),
        "both": best_trial(tried, full, KEPT_AIMED),
        "decoder alone": best_trial([one for one in tried if set(one.tau) <= {"decoder"}], full, KEPT_AIMED),
        "encoder alone": best_trial([one for one in tried if "decoder" not in one.tau], full, KEPT_AIMED),
    }
    found: dict[str, Any] = {}
    for name, one in limits.items():
        assert one is not None
        trial = attempt(model, params, test, one.tau)
        found[name] = outcome(trial, model)
        if name == "mue":
            found |= {"random": at_random(model, settings, test, trial.exits), "by objects": by_objects(trial, objects)}
    found["front"] = [outcome(attempt(model, params, test, one.tau), model) for one in pareto_trials(tried)]
    return found


def outcome(one: ExitTrial, model: Model) -> dict[str, Any]:
    costs = ExitCosts.of(model.stacks["encoder"], model.stacks["decoder"])
    return {
        "tau": one.tau,
        "right": one.exits.correct.tolist(),
        "layers": one.reduction,
        "flops": by_flops(one.exits, costs),
        "exits": histograms(one.exits, depths(model)),
        "means": means(one.exits),
    }


def means(exits: Exits) -> list[float]:
    there = [exits.layers[name][exits.tokens[name] > 0] for name in MODALITIES]
    return [float(each.double().mean()) for each in (*there, exits.decoder)]


def by_objects(one: ExitTrial, objects: Sequence[int]) -> list[float]:
    """Return the mean exit of the decoder for images of one object, and of two."""
    of_token = np.array(objects)[one.exits.row.numpy()]
    return [float(one.exits.decoder.double().numpy()[of_token == count].mean()) for count in (1, 2)]


def at_random(model: Model, settings: ExitSettings, test: ImageText, exits: Exits) -> list[list[bool]]:
    """Return which rows are correct when the same exits are assigned to other rows and tokens, three times."""
    view, batch, found = viewed(model, settings), 16, []
    for seed in range(3):
        dealt, some = shuffled(exits, seed), []
        for start in range(0, len(test), batch):
            rows = slice(start, start + batch)
            here = (exits.row >= start) & (exits.row < start + batch)
            row, step = exits.row[here] - start, exits.step[here]
            words = torch.full((len(test[rows]), int(step.max()) + 1), LAYERS[1])
            words[row, step] = dealt["decoder"][here]
            view.lamella_policy_encoder.fixed_exits = {name: dealt[name][rows] for name in MODALITIES}
            view.lamella_policy.fixed_exits = words
            some += measure_exits(view, ImageText(test[rows], test.processing)).correct.tolist()
        found.append(some)
    return found


def alternatives(model: Model, settings: ExitSettings, test: ImageText, held_out: ImageText) -> dict[str, Any]:
    """Test fixed depths, exits by entropy and by patience, and limits of one modality."""
    decoder = model.stacks["decoder"]
    rules = {
        "entropy": [EntropyExits(decoder, below) for below in (0.01, 0.05, 0.2, 0.5, 1.0)],
        "patience": [PatienceExits(decoder, patience) for patience in (4, 3, 2, 1)],
    }
    found = [
        [name, *scored(viewed(model, settings, decoder=each), test)] for name, some in rules.items() for each in some
    ]
    found += [[f"fixed, {e} and {j}", *scored(fixed(model, e, j), test)] for e in (2, 4, 6) for j in (1, 2, 3, 4, 6)]
    return {"others": found, "cut": cut(model, settings, test, held_out)}


def scored(view: Any, test: ImageText) -> tuple[float, float]:
    exits = measure_exits(view, test)
    return by_layers(exits, LAYERS), exact_match(exits)


def cut(model: Model, settings: ExitSettings, test: ImageText, held_out: ImageText) -> dict[str, list[float]]:
    """Return the two-by-two table: each modality whole, or limited by its threshold to a third to a half of them."""
    params = settings.params({})
    full = measure_exits(viewed(model, settings), held_out)
    tau = {}
    for index, name in enumerate(MODALITIES):
        limits = [quantile_thresholds(full, q)[name] for q in np.linspace(0.02, 0.98, 9)]
        depth = [means(attempt(model, params, held_out, {name: limit}).exits)[index] for limit in limits]
        tau[name] = limits[int(np.argmin(np.abs(np.array(depth) - CUT)))]
    cases: dict[str, Sequence[str]] = {
        "whole": (),
        "image limited": ("image",),
        "text limited": ("text",),
        "both limited": MODALITIES,
    }
    found = {}
    for name, those in cases.items():
        one = attempt(model, params, test, {each: tau[each] for each in those})
        found[name] = [one.correct, *means(one.exits)]
    return found


# Claims


def claims(run: Run, size: Size) -> None:
    least = min(run.arm(f"before fine-tuning, seed {seed}", answered, size, seed) for seed in (PILOT, *SEEDS))
    name = "questions: exact match before fine-tuning, lowest of all models"
    run.premise(name, f"at least {LEARNED:.0%}", f"{least:.1%}", least >= LEARNED)
    rates = dict.fromkeys(ARMS, GRID[1])
    if not run.quick:
        chosen = tuned(run, {arm: partial(validated, size, arm) for arm in ARMS}, GRID)
        rates = {arm: each.value for arm, each in chosen.items()}
    known = run.arm("difficulty", difficulty, size, rates)
    for task in TASKS:
        name = f"{task}: exact match of plain fine-tuning, pilot"
        run.premise(name, f"at least {LEARNED:.0%}", f"{known[task]:.1%}", known[task] >= LEARNED)
    first = known["first layer"]
    name = "correct questions that the first decoder layer answers, pilot"
    run.premise(name, f"{SOME:.0%} to {1 - SOME:.0%}", f"{first:.1%}", SOME <= first <= 1 - SOME)
    run.freeze(
        "mean over models and test rows of the difference of exact matches",
        SEEDS, size=vars(size), rates=rates, aimed=AIMED, retained=RETAINED, swept=SWEPT,
    )  # fmt: skip
    found = {
        arm: [run.arm(f"{arm}, seed {seed}", judged, size, arm, seed, rates[arm], seed == SEEDS[0]) for seed in SEEDS]
        for arm in ARMS
    }
    shown = {task: found["apart"][0][task]["mue"]["exits"] for task in TASKS}
    lines = {f"{task}, {name}": [(layer, 100 * share) for layer, share in enumerate(shares, 1)]
             for task, modalities in shown.items() for name, shares in modalities.items()}  # fmt: skip
    run.figure("mue-exits", Scatter("exit after layer", "rows or tokens, percent", lines, joined=True))
    full_depth(run, found)
    for task in TASKS:
        exits(run, task, {arm: [each[task] for each in some] for arm, some in found.items()})


def points(some: Sequence[Sequence[bool]]) -> np.ndarray:
    """Return exact matches in percent [seeds, rows]."""
    return 100 * np.array(some, float)


def full_depth(run: Run, found: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Report the exact match by depth of the decoder, and the cost of both changes at full depth."""
    by_arm = {(task, arm): np.stack([points(each[task]["depths"]) for each in some])
              for task in TASKS for arm, some in found.items()}  # fmt: skip
    run.table(
        f"Exact match in % by decoder exit, full encoder, mean of {len(SEEDS)} models",
        ["task", "arm", *map(str, range(1, LAYERS[1] + 1))],
        [[task, arm, *each.mean((0, 2))] for (task, arm), each in by_arm.items()],
    )
    for task in TASKS:
        last, every, apart = (by_arm[task, arm] for arm in ARMS)
        cost = Measured.over_seeds_and_items(every[:, -1] - last[:, -1])
        run.further(f"{task}: every layer less last layer, full depth, points", "at least -2", cost, cost.at_least(-2))
        if task == "captions":
            gain = Measured.over_seeds_and_items(every[:, 2] - last[:, 2])
            name = f"{task}: every layer less last layer, after layer 3, points"
            run.further(name, "at least 20", gain, gain.at_least(20))
        price = Measured.over_seeds_and_items(apart[:, -1] - every[:, -1])
        run.table(
            f"{task}: exact match with separate modalities less that without, full depth", ["points"], [[str(price)]]
        )


def exits(run: Run, task: str, found: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Report one task: the accuracy of the exits beside plain fine-tuning and the baselines."""
    ours, plain = found["apart"], points([each["depths"][-1] for each in found["last layer"]])
    full = points([each["depths"][-1] for each in ours])
    mue, fused = [each["mue"] for each in ours], [each["fused"] for each in found["every layer"]]
    dealt = np.mean([points([each["random"][draw] for each in ours]) for draw in range(3)], 0)

    def right(some: Sequence[dict[str, Any]]) -> np.ndarray:
        return points([each["right"] for each in some])

    def row(name: str, some: Sequence[dict[str, Any]]) -> list[Any]:
        costs = [fmean(each[key] for each in some) for key in ("layers", "flops")]
        return [name, *costs, right(some).mean(), *np.mean([each["means"] for each in some], 0)]

    run.table(
        f"{task}: reduction and exact match, {plain.shape[1]} test rows, mean of {len(ours)} models",
        ["exits", "reduction by layers", "by FLOPs", "% exact match", *MODALITIES, "decoder"],
        [
            ["plain fine-tuning, none", 0.0, 0.0, plain.mean(), *LAYERS[:1] * 2, LAYERS[1]],
            ["MuE, none", 0.0, 0.0, full.mean(), *LAYERS[:1] * 2, LAYERS[1]],
            row("MuE, aiming at 40 %", mue),
            ["the same exits, shuffled", *row("", mue)[1:3], dealt.mean(), *row("", mue)[4:]],
            row("one exit for both modalities, aiming at 40 %", fused),
            *(row(f"{name}, at {KEPT_AIMED:.0%} of full depth", [each[name] for each in ours]) for name in ALONE),
        ],
    )
    run.table(f"{task}: other exits, first model", ["exits", "reduction by layers", "% exact match"],
              [*([f"MuE's front, {number}", each["layers"], points(each["right"]).mean()]
                 for number, each in enumerate(ours[0]["front"])),
               *([name, reduction, 100 * value] for name, reduction, value in ours[0]["others"])])  # fmt: skip
    run.table(f"{task}: modalities limited to about {CUT} layers, first model",
              ["encoder", "% exact match", *MODALITIES, "decoder"],
              [[name, 100 * value, *depth] for name, (value, *depth) in ours[0]["cut"].items()])  # fmt: skip
    if task == "questions":
        saved = Measured.over_seeds([100 * each["layers"] for each in mue])
        run.main(f"{task}: reduction by layers, %", f"at least {100 * AIM:.0f}", saved, saved.at_least(100 * AIM))
        margin = Measured.over_seeds_and_items(right(mue) - RETAINED * plain)
        name = f"{task}: exact match less {RETAINED:.0%} of that of plain fine-tuning, points"
        run.main(name, "at least 0", margin, margin.at_least(0))
        later = Measured.over_seeds([each["by objects"][1] - each["by objects"][0] for each in ours])
        name = f"{task}: images of two objects exit later than those of one, decoder layers"
        run.further(name, "above 0", later, later.at_least(1e-9))
    ahead = Measured.over_seeds_and_items(right(mue) - dealt)
    run.main(f"{task}: MuE less the same exits shuffled, points", "at least 0", ahead, ahead.at_least(0))
    both, decoder, encoder = ([each[name] for each in ours] for name in ALONE)
    more = Measured.over_seeds([100 * (a["layers"] - b["layers"]) for a, b in zip(both, decoder, strict=True)])
    kept = Measured.over_seeds_and_items(right(both) - KEPT * full)
    name = f"{task}: reduction by exits of both stacks less the decoder's alone, %, at {KEPT:.0%} of full depth"
    run.main(name, "above 0, and no less than that", f"{more}; {kept} points above it",
             together([more.at_least(1e-9), kept.at_least(0)]))  # fmt: skip
    alone = Measured.over_seeds([100 * each["layers"] for each in encoder])
    run.further(f"{task}: reduction by exits of the encoder alone, %", "above 0", alone, alone.at_least(1e-9))
    gap = Measured.over_seeds_and_items(right(mue) - right(fused))
    run.further(f"{task}: MuE less one exit for both modalities, points", "at least 0", gap, gap.at_least(0))


@torch.no_grad()
def experiment(run: Run) -> None:
    run.data = "rendered shapes: colours, positions and captions; images of held-out test scenes"
    found = run.arm("time of a request", request_times, run)
    ratio = Measured(*found["ratio"])
    run.table(
        "One request of 256 image tokens, 4 generated tokens, SmolLM2's width, exits after layers 2 and 4 of 6 and 6",
        ["layers skipped", "multiplications skipped", "time left"],
        [[found["layers"], found["flops"], str(ratio)]],
    )
    median, low, high = (1 - each for each in found["ratio"])
    reduction = Measured(*(each / found["flops"] for each in (median, high, low)))
    name = "reduction of time, by the reduction that multiplications predict"
    run.further(name, "0.85 to 1.15", reduction, reduction.within(0.85, 1.15))
    claims(run, QUICK if run.quick else FULL)


FULL = Size(base=2400, steps=700, held_out=200, test=500)
QUICK = Size(base=8, steps=4, held_out=16, test=16)

if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a model that does not meet the premise, and few timed rounds"))
