"""The main command: from a model to a smaller, measured, exported one, with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any

import torch

from lamella import formatting
from lamella.commands.compress import healing
from lamella.commands.compress.forms import USEFUL, Form, Means, Program, Torch, means
from lamella.commands.compress.goal import Goal
from lamella.commands.compress.healing import Heal, heal_cut, material, unseen
from lamella.commands.compress.llama_cpp import LlamaCpp
from lamella.commands.compress.lookup import PROMPT, TEXTS, add_lookup
from lamella.commands.compress.race import (
    Contender,
    Job,
    check_reachable,
    choose,
    confidence_of_each,
    entrants,
    measure_curves,
    quantised_alone,
    search,
)
from lamella.commands.compress.result import Compression
from lamella.commands.compress.routes import Candidate, Quantize, check_quantised, routes, variants_of
from lamella.commands.heal.command import context_of
from lamella.data import ImageText, InputContext, Text
from lamella.errors import BudgetError, DownloadError, ExportError, MethodError
from lamella.evaluate import Budget, FidelityTest, cost, step_times
from lamella.evaluate.confidence import CONFIDENCE
from lamella.evaluate.speed import denoises
from lamella.evaluate.tasks import open_tasks, score
from lamella.files import Work
from lamella.inputs import LENGTH, SEED, SEQUENCES, check_source
from lamella.measure import OutputDistance, block_influence, sequences, sublayer_influence
from lamella.needs import now
from lamella.plan import Plan, PlanSeries
from lamella.plan.export import FormOrAuto, check_floats, natural_form
from lamella.planners import DEFAULT, Planner, Race
from lamella.progress import track
from lamella.registry import command
from lamella.runtime import Sampler, denoise
from lamella.signature import Settings, Split
from lamella.stack import Position, Stack, groups_at
from lamella.zoo import chat_inputs

HEAL = Heal()
PLANNING = 0.2  # minutes of the search by default, as a fraction of those of healing
COLOURING = 128  # tokens on which single sublayers are removed
COLOURING_SECONDS = 10.0  # time limit for these removals
PROMPTS = (
    "Write a short note that explains what a list comprehension is.",
    "What is the capital of France, and why is it famous?",
    "Give three tips for sleeping well.",
)


@command(
    "compress",
    verb="compress",
    on=("decoder", "masked tokens"),
    brief={"sequences": 2, "length": 16, "method": "shortgpt", "speedup": 1.01, "heal_steps": 2},
)
def compress(
    stack: Stack,
    calibration: Annotated[Text | ImageText, Settings(rows=16)],
    test: Annotated[Text | ImageText, Split("test")],
    plan: PlanSeries | None = None,
    *,
    method: str | Planner | tuple[Planner, ...] | Race = "auto",
    allow: tuple[Means, ...] = (),
    budget: Budget = Budget(),
    heal: Heal | None = HEAL,
    quantize: Quantize | None = None,
    form: FormOrAuto = "auto",
    runtime: Program = "torch",
    tasks: tuple[str, ...] = (),
    work: Work = Work(),
    seed: int = 0,
) -> Compression:
    """Compress a model: choose the route with the least loss, heal, measure, export, report.

    Measures what quantised weights gain on this machine, in the program that will run the result. If they reach the
    goal by themselves, that is the result; otherwise the smallest cut is searched that reaches it together with them.
    The cut is verified by measurement and healed. The checkpoint is written with plan.json, evidence.json, a model card
    and report.html, which compares all routes. An interrupted run resumes.

    Example: lamella compress smollm2 --speedup 1.8 -o small
    lamella compress smollm2 --method finercut --finercut.level sublayer --no-heal -o small
    lamella compress smollm2 --speedup 1.8 --runtime llama.cpp -o small

    Args:
        stack: the original; it is not changed.
        calibration: data for planning: a text, or for a model of images and text, rows of these.
        test: data for evaluation, the same windows in all commands. If images were planned on, other rows of these.
        plan: a series of plans to choose from, such as ``lamella plan finercut MODEL -o FOLDER`` writes, instead of a
            search.
        method: planners separated by commas; all tries every planner that is not slow. auto is portfolio: whole layers,
            the best result of several planners, improved further, for a plain checkpoint. An option of a planner is
            written ``--SLUG.OPTION``.
        allow: what may be done: quantize (for torch 8-bit weights, which need the extra quantize), cut, or both;
            defaults to both, and to a cut only if a method or a plan is given.
        budget: the goal: speedup, of decoding at batch 1 (default 1.3); size of the weights or memory of weights and
            cache, in MB; or loss, the KL divergence in nats within which the fastest route is chosen, before healing.
            Also the time limit of each search in minutes: a fifth of that of healing for the default method, none for a
            named one.
        heal: how to heal the model before it is exported.
        quantize: also write the result in this form, in the same folder; an int8 result as it was before quantisation.
        form: form of the export. plain: an ordinary checkpoint (whole layers, common widths). portable: the same
            function in any tool, with single sublayers zeroed. native: all cuts, with a modelling file of its own;
            dynamic plans run when lamella.load opens it. auto: plain if possible, else native.
        runtime: program that will run the result, with which speed is measured. torch: eagerly. llama.cpp: from GGUF
            files with 8 bits, or 4 where that is needed, which the extra llama-cpp runs; speed-ups are relative to a
            file with 16 bits, and the result is a checkpoint with the GGUF file beside it.
        tasks: tasks to score the original, the pruned and the healed model on, such as definitions (extra eval).
        work: folder from which an interrupted run resumes.
        seed: random seed.

    Returns:
        The compressed model, not yet written: ``save`` writes it.

    Raises:
        BudgetError: if the goal cannot be reached; the message says what can.
        MethodError: for a method whose plans save no work, or a model that cannot be healed.
    """
    race = Race.of(method)
    check_options(method, allow, budget, heal, quantize, form, runtime, tasks)
    if heal is not None and denoises(stack.model):
        raise MethodError(
            f"{stack.name} predicts masked tokens, but healing needs next-token prediction: leave heal out (--no-heal)"
        )
    check_floats(stack)
    planners = [] if plan is not None else entrants(race, stack, calibration)
    context = context_of(calibration, seed)
    if heal is not None and heal.train is not None:
        material(stack, context, heal.train)  # refuses unreadable data before planning
    torch.manual_seed(seed)

    tested = test.tokens if isinstance(test, Text) else test
    goal = Goal.of(budget, runtime)
    minutes = budget.minutes
    allowed = means(allow, plan is not None or not race.is_default or form not in ("auto", "plain"), runtime)
    program = Torch() if runtime == "torch" else LlamaCpp(context.tokenizer)
    original, *quantised = program.forms(stack, "quantize" in allowed, "cut" in allowed)
    job = Job(stack, calibration, tested, goal, seed, work, program, original)
    candidates = [quantised_alone(stack, each) for each in quantised]
    is_enough = goal.name != "loss" and any(each.reaches(goal) for each in candidates)
    if race.is_default:  # by default without the greedy search, since healing makes better use of the time
        options = {"greedy": minutes is not None, "refit": heal is not None and not is_enough}
        planners = [Planner(DEFAULT, options) for _ in planners]
        minutes = PLANNING * _healing_minutes(heal) if minutes is None else minutes
    if "cut" not in allowed and not is_enough and not (candidates and goal.name == "loss"):
        raise BudgetError(_too_much(quantised, goal))
    if "cut" in allowed:
        useful = [] if is_enough else _useful(quantised, goal)
        cut_in = sorted(
            useful or [original], key=lambda each: -each.weights() if goal.is_in_bytes else each.speedup.median
        )
        if not is_enough:
            check_reachable(job, cut_in[-1])
        is_compared = is_enough and race.is_default and budget.minutes is None  # the cut, with little effort
        searched = (  # as far as the slowest or largest form requires
            [Contender(str(plan.provenance.get("method", "plan")), "the given plans", plan, cut_in[0])]
            if plan
            else [search(job, planner, cut_in[0], 0.0 if is_compared else minutes) for planner in planners]
        )
        cuts = _in_forms(job, searched, cut_in)
        for each in cuts:
            each.is_curve = not is_compared and runtime == "torch"  # a point of llama.cpp's is a file
        candidates += cuts
    choose(job, candidates)
    measure_curves(job, candidates)
    best = min(candidates, key=lambda candidate: candidate.rank(goal))

    found = _compression(job, best, candidates, minutes, context)
    found.data = {"calibration": calibration.describe(), "test": test.describe()}
    found.quantize = quantize
    models: dict[str, tuple[Stack, Plan | None]] = {"original": (stack, None)}
    if not best.is_whole:
        models["cut"] = stack, best.plan
    fidelity = FidelityTest(stack, tested)
    if heal is not None and not best.is_whole:
        begin = now()
        healed, training = heal_cut(stack, best.plan, context, heal, work.within("training"), calibration)
        training["seconds"] = now() - begin
        if "note" in training:
            found.notes.append(training.pop("note"))
        if healed is not None:
            assert isinstance(healed.stack, Stack)
            found.changed, found.plan = healed.stack, healed.plan
            models["healed"] = healed.stack, healed.plan
            views = {name: best.form.view(*models[name]) for name in ("cut", "healed")}
            judge = _judge(stack, context, test)
            found.measured["healing"] = training | {
                "fidelity": fidelity.of(views["healed"]).as_dict(confidence_of_each(len(candidates))),
                "unseen": unseen(stack, judge, views),
            }
    found.chosen["form"] = natural_form(found.plan, found.changed) if form == "auto" else form
    *_, last = models.values()
    changed = best.form.view(*last)
    final = found.measured["healing"] if "healed" in models else best.chosen
    found.measured["agreement"] = final["fidelity"]["agreement"] | {"confidence": CONFIDENCE}
    found.measured["samples"] = _samples({"base": stack.model, "changed": changed}, context.tokenizer)
    if tasks:
        scored = {name: best.form.view(*each) for name, each in models.items() if name != "original"}
        if best.is_whole:
            scored = {best.form.name: best.form.view(stack)}
        found.measured["tasks"] = _scores_on({"original": stack.model} | scored, context.tokenizer, tasks, seed)
    others = {
        each.name: Candidate(each.form, each.weights, each.speedup, each.chosen["fidelity"])
        for each in candidates
        if each is not best and not each.is_whole and each.speedup is not None
    }
    shown = program.shown(stack, None if quantize is None or quantize.kind == "int8" else quantize.kind)
    variants = variants_of(models, shown)
    form_of = f", {best.form.name}" if best.form.name else ""
    result = f"{list(models)[-1]}{form_of}"
    known = {f"{'original' if best.is_whole else 'cut'}{form_of}": best.chosen["fidelity"]}
    known[result] = final["fidelity"]
    found.measured["routes"] = routes(fidelity, program, variants, others, known)
    if runtime == "torch":
        rows = sorted(found.measured["routes"], key=lambda row: row["name"] != result)  # the result first
        add_lookup(rows, variants, _prompts(_judge(stack, context, test)))
    return found


def check_options(
    method: Any = "auto",
    allow: tuple[Means, ...] = (),
    budget: Budget = Budget(),
    heal: Heal | None = None,
    quantize: Quantize | None = None,
    form: FormOrAuto = "auto",
    runtime: Program = "torch",
    tasks: tuple[str, ...] = (),
) -> None:
    """Check, before a model is opened, whatever is known to be wrong.

    Args:
        method: the planners.
        allow: the means.
        budget: the goal.
        heal: how to heal the model.
        quantize: how to quantise the result.
        form: form of the export.
        runtime: the program that runs the result.
        tasks: tasks to score on.

    Raises:
        LamellaError: one line that says what is wrong.
    """
    Race.of(method)
    check_quantised(quantize, form, allow, runtime)
    if tasks:
        open_tasks(tasks)
    if heal is not None and heal.train is not None:
        check_source(heal.train)
    Goal.of(budget)


def _too_much(quantised: Sequence[Form], goal: Goal) -> str:
    """Say that quantisation alone does not reach the goal."""
    if not quantised:
        return "the model has no linear layers that can be quantised: allow cut"
    found = max(quantised, key=lambda each: each.speedup.median)
    reached = f"a speed-up of {found.speedup.median:.2f} with {formatting.size(found.weights())} of weights"
    return f"{goal.text} cannot be reached by quantisation alone, which gives {reached}: allow cut"


def _useful(quantised: Sequence[Form], goal: Goal) -> list[Form]:
    """Return the forms in which a cut can be smaller: each loses more than the one before, so it has to gain more.

    For a goal in bytes all are, however fast they decode here.
    """
    if goal.is_in_bytes:
        return list(quantised)
    found: list[Form] = []
    for each in quantised:
        if each.speedup.median >= USEFUL * (found[-1].speedup.median if found else 1.0):
            found.append(each)
    return found


def _in_forms(job: Job, searched: Sequence[Contender], forms: Sequence[Form]) -> list[Contender]:
    """Return the routes that cut in some forms.

    No format has both quantised weights and a cut of single sublayers or a dynamic plan: in torch such a cut runs with
    the weights as they are, and llama.cpp does not run it.

    Args:
        job: the inputs.
        searched: series of plans, each found once.
        forms: the forms.

    Raises:
        ExportError: if llama.cpp runs none of them.
    """
    cuts = []
    for each in searched:
        if all(natural_form(plan, job.stack) == "plain" for plan in each.series):
            cuts += [replace(each, form=form, points=[]) for form in forms]
        elif job.runtime.name == "torch":
            cuts.append(replace(each, form=job.original))
    if not cuts:
        names = ", ".join(each.method for each in searched)
        raise ExportError(f"llama.cpp runs plans of whole layers, and those of {names} are others: name another method")
    return cuts


def _healing_minutes(heal: Heal | None) -> float:
    """Return the minutes of healing, or its default where it is not limited by time."""
    return healing.MINUTES if heal is None or heal.minutes is None else heal.minutes


def _judge(stack: Stack, context: InputContext, test: Text | ImageText) -> Any:
    """Return a function that opens other texts in the form of the test."""
    sequences, length = test.tokens.shape if isinstance(test, Text) else (SEQUENCES, LENGTH)
    own = test.context if isinstance(test, Text) else replace(context, split="test", seed=SEED)
    return lambda name: Text.open(name, own, sequences=sequences, length=length)


def _prompts(judge: Any) -> dict[str, torch.Tensor]:
    """Return the beginning of a sequence [1, time] of every text with which prompt lookup is measured."""
    found = {}
    for name in TEXTS:
        with suppress(DownloadError):  # of a text that is not installed
            found[name] = judge(name).tokens[:1, :PROMPT]
    return found


def _compression(
    job: Job, best: Contender, candidates: list[Contender], minutes: float | None, context: InputContext
) -> Compression:
    """Return the result before healing."""
    stack, smaller = job.stack, best.plan
    variants = {"original": (job.original, stack, None), "changed": (best.form, stack, smaller)}
    timings = job.runtime.bench(variants, job.runtime.batches)
    notes = [
        f"{candidate.name} did not reach {job.goal.text}; its fastest plan is shown."
        for candidate in candidates
        if not candidate.is_whole and not candidate.reaches(job.goal)
    ]
    late = [each.name for each in candidates if minutes and each.seconds >= 60 * minutes]
    if late:
        notes.append(
            f"The search of {', '.join(late)} ended after {minutes:g} minutes with the best candidates that it had "
            "found: with more --minutes it may find a better plan."
        )
    shown = timings["changed"][0].decode_speedup
    weights = best.form.bytes(stack, smaller)
    reached = job.goal.is_reached(shown, weights, weights + best.form.cache(smaller), best.kl)
    if best.reaches(job.goal) and not reached:
        assert best.speedup is not None
        notes.append(
            f"{best.name} was chosen at a speed-up of {best.speedup.median:.2f}; measured again, compared with the "
            f"original only, it was {shown.median:.2f}: the two agree on an idle machine."
        )
    measured = {
        "goal": job.goal.as_dict(),
        "runtime": job.runtime.describe(),
        "target_speedup": job.goal.value if job.goal.name == "speedup" else None,
        "step_seconds": vars(step_times(stack)),
        "base": {"cost": cost(stack).as_dict(), "timings": [timing.as_dict() for timing in timings["original"]]},
        "chosen": {
            "route": best.name,
            "method": best.method,
            "quantised": best.form.name or None,
            "cut": not best.is_whole,
            "alternatives": {
                each.form.name if each.is_whole else "cut": {
                    "speedup": each.speedup.median,
                    "weights": each.weights,
                    "kl": each.chosen["fidelity"]["kl"]["mean"],
                }
                for each in candidates
                if each.speedup is not None and (each.is_whole or not each.form.name)
            },
            "options": {
                name: value for name, value in best.series.provenance.get("options", {}).items() if name != "until"
            },
            "point": best.point,
            "drop": smaller.drop,
            "narrower": _narrower(smaller) if smaller.width else "",
            "path": {name: path.model_dump() for name, path in smaller.path.items()},
            "predicted_speedup": best.form.predicted(smaller),
            "reached": reached,
            "cost": cost(stack, smaller).as_dict(),
            "fidelity": best.chosen["fidelity"],
            "timings": [timing.as_dict() for timing in timings["changed"]],
            "search_seconds": best.seconds,
        },
        "layers": _layers(smaller),
        "curves": [
            {
                "method": candidate.name,
                "label": candidate.label,
                "baseline": candidate.baseline,
                "seconds": candidate.seconds,
                "points": candidate.points,
            }
            for candidate in candidates
        ],
        "scores": _scores(job, best),
    }
    return Compression(
        stack=stack, changed=stack, plan=smaller, measured=measured, notes=notes, processor=context.processing.processor
    )


def _narrower(plan: Plan) -> str:
    """Describe the sizes that a width plan leaves."""
    whole, widths = plan.model.sizes, plan.widths
    assert whole is not None
    axes = [
        ("hidden size", [len(widths.hidden)] if widths.hidden is not None else [], whole.hidden),
        ("MLP channels", [len(kept) for kept in widths.channels.values()], whole.channels),
        ("query heads", [len(heads.keep) for heads in widths.heads.values()], whole.heads),
        ("key-value heads", [len(heads.kv_keep) for heads in widths.heads.values()], whole.kv_heads),
    ]
    return ", ".join(
        f"{name} {min(counts)}{f' to {max(counts)}' if max(counts) > min(counts) else ''} of {size}"
        for name, counts, size in axes
        if counts and min(counts) < size
    )


def _layers(plan: Plan) -> list[dict[str, str]]:
    """Return the state of each sublayer: ``kept``, ``cut``, ``prompt`` (runs on prompts only) or ``some`` (dynamic)."""
    layers = groups_at("block", plan.model.positions)
    if plan.policy is not None:
        return [
            {name: _often(share) for (_, name), share in zip(group, shares, strict=True)}
            for group, shares in zip(layers, plan.work, strict=True)
        ]
    skipped, on_prompt = plan.skipped, {each for run in plan.runs("prefill") for each in run.positions}

    def state(position: Position) -> str:
        return "kept" if position not in skipped else "prompt" if position in on_prompt else "cut"

    return [{position.sublayer: state(position) for position in group} for group in layers]


def _often(share: float) -> str:
    """Return the state of a sublayer that runs for this share of the generated tokens."""
    return "kept" if share > 0.999 else "some" if share > 0 else "prompt"


def _scores(job: Job, best: Contender) -> dict[str, Any]:
    """Return scores for the colours of the stack drawing; removals of single sublayers use a short text."""
    stack, calibration = job.stack, job.calibration
    short = calibration.tokens[:1, :COLOURING] if isinstance(calibration, Text) else sequences(calibration)[0]
    alone, end = OutputDistance(stack, short), now() + COLOURING_SECONDS
    gone = [plan.skipped for plan in best.series][: best.point + 1]
    ordered = all(before <= after for before, after in pairwise(gone))
    order = [[each.site for each in sorted(after - before)] for before, after in pairwise(gone)] if ordered else []
    return {
        "block_influence": block_influence(stack, calibration).values.tolist(),
        "sublayer_influence": sublayer_influence(stack, calibration).values.tolist(),
        "removed_alone": [
            alone.of([each]) if now() < end else None for each in track(stack.positions, "removing single sublayers")
        ],
        "removal_order": order,
    }


@torch.no_grad()
def _samples(models: dict[str, Any], tokenizer: Any, tokens: int = 48) -> list[dict[str, str]]:
    """Return greedy answers of both models to the same prompts."""
    samples = []
    for prompt in track(PROMPTS, "samples"):
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], models["base"].device)
        sample = {"prompt": prompt}
        for name, model in models.items():
            ids = _answered(model, inputs, tokens, tokenizer.pad_token_id)
            sample[name] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        samples.append(sample)
    return samples


def _answered(model: Any, inputs: dict[str, torch.Tensor], tokens: int, padding: int | None) -> torch.Tensor:
    """Return prompts with greedy answers [batch, time], for either objective of the model."""
    if denoises(model):
        return denoise(model, **inputs, sampler=Sampler(length=tokens, block=tokens // 3, steps=tokens // 2))
    ids: torch.Tensor = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=padding)
    return ids


def _scores_on(models: dict[str, Any], tokenizer: Any, names: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Score models on the same questions.

    Args:
        models: the models by name, the original first.
        tokenizer: the tokenizer.
        names: names of tasks that need no permission; see :func:`lamella.evaluate.tasks.score`.
        seed: random seed of few-shot examples.

    Returns:
        For each metric of each task the ``scores`` by model with their standard errors over questions; for all but the
        first also the paired ``difference`` from it, if single questions were scored.
    """
    found = {name: score(model, tokenizer, names, seed=seed) for name, model in models.items()}
    rows = []
    for same in zip(*found.values(), strict=True):
        base = same[0]
        each = {name: {"mean": one.value.mean, "error": one.value.error} for name, one in zip(found, same, strict=True)}
        for name, one in list(zip(found, same, strict=True))[1:]:
            if (since := one.since(base)) is not None:
                each[name]["difference"] = vars(since)
        rows.append({key: base.as_dict()[key] for key in ("task", "metric", "questions", "version")} | {"scores": each})
    return rows
