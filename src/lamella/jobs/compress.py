"""The main job: from a model to a smaller, measured, exported one, with its evidence."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lamella.data import ImageText, Text
from lamella.errors import BudgetError, MethodError
from lamella.evaluate import FidelityTest, bench, cost, measure_step, peak_memory
from lamella.evaluate.fidelity import judged
from lamella.evaluate.speed import denoises
from lamella.evaluate.tasks import open_tasks
from lamella.files import check_free, discard, new_folder
from lamella.jobs.candidates import STEPS, Contender, Data, Job, choose, measure_curves, reaches, run_method
from lamella.jobs.checks import check_input, check_source
from lamella.jobs.held_out import reader_for
from lamella.jobs.mend import Healing, material_of, mend, unseen
from lamella.jobs.planning import PLANS, ceiling
from lamella.jobs.quantize import write_beside
from lamella.jobs.tasks import scores
from lamella.jobs.variants import check_quantised, forms, variants
from lamella.measure import OutputDistance, block_influence, sequences, sublayer_influence
from lamella.plan import Plan
from lamella.plan.export import check_floats, export, natural_form
from lamella.progress import track, tracker
from lamella.provenance import environment
from lamella.registry import Method, get_method, methods
from lamella.report import render
from lamella.results import model_card
from lamella.runtime import Sampler, apply, denoise
from lamella.stack import Position, Stack, groups_at
from lamella.zoo import chat_inputs, open_model

DEFAULT_METHOD = "portfolio"
MINUTES = 2.0  # for the default method's search: what it takes on two idle cores with the embedded model
COLOURING = 128  # tokens on which each sublayer is removed alone
PROMPTS = (
    "Write a short note that explains what a list comprehension is.",
    "What is the capital of France, and why is it famous?",
    "Give three tips for sleeping well.",
)


def compress(
    model: Any,
    out: str | Path,
    *,
    speedup: float = 1.3,
    minutes: float | None = None,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    calibration: str = "pydoc",
    test: str = "pydoc",
    form: str = "auto",
    heal: Healing = Healing(),
    quantize: str | None = None,
    tasks: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turn a model into a smaller, measured, exported one.

    Plans with ``method`` (or with ``all`` of them), picks the smallest cut whose predicted decode speed-up reaches the
    target, verifies it by measurement, and writes the checkpoint with its plan, evidence, model card and report.

    Args:
        model: a zoo name, a folder or a hub id.
        out: the folder to write; beside it, ``.OUT.journal`` lets an interrupted run go on.
        speedup: the decode speed-up to reach at batch 1 (1.3 is 30 % more tokens per second).
        minutes: for which each search may compare; see :class:`lamella.evaluate.Budget`. Left out, the default method
            has 2 minutes, and a method that is named has no limit.
        method: a planning method, or ``all``. Left out, it is ``portfolio``: whole layers, the best of what several
            planners begin with, improved; a plain checkpoint.
        options: options of the method.
        calibration, test: texts to plan and to measure on, see :func:`lamella.load_text`; or images with text, see
            :class:`lamella.data.ImageText`, which are measured on other rows of theirs where ``test`` is a text.
        form: of the export; ``auto`` is ``plain`` where a standard config can express the plan, else ``native``.
        heal: how to train back what the cut cost, before it is exported; with ``all`` methods, that of the one kept.
        quantize: ``int8`` or ``q8_0`` writes the result in 8 bits too, in ``out`` (see :mod:`lamella.jobs.quantize`).
        tasks: to score the original, the cut and the healed model on, such as ``definitions`` (extra ``eval``).
        seed: of everything that is drawn.
        overwrite: replace ``out``.

    Returns:
        The evidence, as written to ``evidence.json``.

    Raises:
        BudgetError: when the target cannot be reached; the message says what can.
        MethodError: for a method whose plans leave out no work, or an unknown way to heal.
        ExportError: when ``out`` exists, or cannot be written.
    """
    out = Path(out)
    if method is None:
        method, minutes = DEFAULT_METHOD, MINUTES if minutes is None else minutes
    if speedup < 1:
        raise BudgetError(f"a speed-up of {speedup:g} would slow the model down: give 1 or more")
    check_quantised(quantize, form)
    if tasks:
        open_tasks(tasks)  # what is unknown is told before any work
    check_free(out, overwrite)
    if method != "all":
        get_method(method).signature.gathered(
            method, options or {}
        )  # what is wrong is refused before the model is read
    check_input((Stack,), model)
    for source in (calibration, test, heal.text):
        check_source(source)
    stack = judged(open_model(model))
    check_floats(stack)
    shows = ImageText.fits(stack, calibration)
    if heal.way != "none" and denoises(stack.model):
        raise MethodError(
            f"{stack.name} predicts masked tokens, and healing trains models that predict the next: --no-heal"
        )
    entries = _entries(method, stack, shows)
    reader = reader_for(stack, model, seed)
    tokenizer = reader.tokenizer
    data = Data.load(reader, stack, calibration, test)
    if heal.text is not None:
        material_of(stack, reader, heal.text)  # told before the model is planned
    torch.manual_seed(seed)

    times = measure_step(stack)
    if speedup > ceiling(stack, times):
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached on {stack.name}: {ceiling(stack, times):.2f} is left with a "
            "single sublayer, since the head and the loop stay; ask for less"
        )
    job = Job(stack, data, times, speedup, minutes, options or {}, seed, journals=out.parent / f".{out.name}.journal")
    candidates = [run_method(job, entry) for entry in entries]
    choose(job, candidates)
    measure_curves(job, candidates)
    best = min(candidates, key=lambda candidate: candidate.loss(speedup))

    evidence = _evidence(job, best, candidates)
    evidence["scores"] = _scores(job, best)
    changed, plan = stack, best.plan
    training = out.parent / f".{out.name}.training"
    views = {"original": stack.model, "cut": apply(stack, plan)}
    fidelity = FidelityTest(stack, data.test)
    known = {"cut": best.chosen["fidelity"]}
    if heal.way != "none":
        begin = time.perf_counter()
        healed, told = mend(stack, plan, reader, heal, training, calibration=calibration)
        told["seconds"] = time.perf_counter() - begin
        if healed is None:
            evidence["notes"].append(told["note"])
        else:
            assert isinstance(healed.stack, Stack)
            changed, plan = healed.stack, healed.plan
            views["healed"] = apply(changed, plan)
            known["healed"] = fidelity.of(views["healed"]).as_dict()
            others = unseen(stack, tokenizer, {"cut": views["cut"], "healed": views["healed"]})
            evidence["healing"] = told | {"fidelity": known["healed"], "unseen": others}
    *_, last = views.values()
    evidence["samples"] = _samples({"base": stack.model, "changed": last}, tokenizer)
    if tasks:
        evidence["tasks"] = scores(views, tokenizer, tasks, seed)
    evidence["variants"] = variants(fidelity, views, forms(quantize), known)
    with tracker(f"exporting and measuring {out.name}"):
        _write(stack, changed, plan, out, form, evidence, reader.processing.processor, overwrite, quantize)
        for folder in (job.journals, training):
            discard(folder, out)
    return evidence


def _entries(method: str, stack: Stack, shows: bool) -> list[Method]:
    """The methods that race: the one that is named, or all that can plan for the model soon, with less work.

    Args:
        shows: whether they plan on images.
    """
    if method == "all":
        planning = [e for e in methods().values() if e.result == PLANS and not e.dense and not e.slow]
        return [entry for entry in planning if entry.takes(stack) and (entry.reads_images or not shows)]
    entry = get_method(method)
    if entry.dense:
        raise MethodError(
            f"{method} sets weights to zero, which dense kernels compute with all the same, so it cannot reach a "
            f"speed-up: use `lamella plan {method}` and `lamella apply`"
        )
    return [entry]


def _evidence(job: Job, best: Contender, candidates: list[Contender]) -> dict[str, Any]:
    stack = job.stack
    smaller = best.plan
    timings = bench({"original": stack.model, "changed": apply(stack, smaller)}, batches=(1, 8), tokens=STEPS)
    notes = [
        f"{candidate.method.slug} did not reach the target of {job.speedup:g}; the fastest plan tried stands for it."
        for candidate in candidates
        if not candidate.reaches(job.speedup)
    ]
    late = [each.method.slug for each in candidates if job.minutes is not None and each.seconds >= 60 * job.minutes]
    if late:
        notes.append(
            f"The search of {', '.join(late)} stopped comparing after {job.minutes:g} minutes and took what had seemed "
            "best until then: with more --minutes it may find a better plan."
        )
    shown = timings["changed"][0].decode_speedup
    reached = reaches(shown, job.speedup)
    if best.reaches(job.speedup) and not reached:
        assert best.speedup is not None
        notes.append(
            f"{best.method.slug} was chosen at a speed-up of {best.speedup.median:.2f}; measured once more, beside the "
            f"original alone, it was {shown.median:.2f}: on a machine with nothing else to do the two agree."
        )
    return {
        "schema": "lamella.evidence/1",
        "model": {
            "name": stack.name,
            "family": stack.architecture.name,
            "layers": len(stack),
            "parameters": cost(stack).parameters,
        },
        "target_speedup": job.speedup,
        "method": best.method.slug,
        "options": best.series.provenance.get("options", {}),
        "seed": job.seed,
        "environment": environment(),
        "data": job.data.provenance,
        "step_seconds": vars(job.times),
        "base": {"cost": cost(stack).as_dict(), "timings": [timing.as_dict() for timing in timings["original"]]},
        "chosen": {
            "method": best.method.slug,
            "point": best.point,
            "drop": smaller.drop,
            "narrower": _narrower(smaller) if smaller.width else "",
            "path": {name: path.model_dump() for name, path in smaller.path.items()},
            "predicted_speedup": job.times.speedup(smaller),
            "reached": reached,
            "cost": cost(stack, smaller).as_dict(),
            "fidelity": best.chosen["fidelity"],
            "timings": [timing.as_dict() for timing in timings["changed"]],
            "search_seconds": best.seconds,
        },
        "layers": _layers(smaller),
        "curves": [
            {
                "method": candidate.method.slug,
                "label": candidate.method.title,
                "baseline": candidate.method.baseline,
                "seconds": candidate.seconds,
                "points": candidate.points,
            }
            for candidate in candidates
        ],
        "notes": notes,
    }


def _narrower(plan: Plan) -> str:
    """What a width plan leaves of each axis that it narrows."""
    whole, widths = plan.model.sizes, plan.widths
    assert whole is not None
    axes = [
        ("stream", [len(widths.stream)] if widths.stream is not None else [], whole.stream),
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
    """What each sublayer of each layer does: ``kept``, ``cut``, ``prompt`` (prompts alone run it) or ``some`` do."""
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
    """The state of a sublayer that this share of generated tokens runs."""
    return "kept" if share > 0.999 else "some" if share > 0 else "prompt"


def _scores(job: Job, best: Contender) -> dict[str, Any]:
    """What the drawing of the stack is coloured by; removals alone on a short text, since they only colour."""
    stack, calibration = job.stack, job.data.calibration
    short = calibration.tokens[:1, :COLOURING] if isinstance(calibration, Text) else sequences(calibration)[0]
    alone = OutputDistance(stack, short)
    gone = [plan.skipped for plan in best.series][: best.point + 1]
    ordered = all(before <= after for before, after in pairwise(gone))
    order = [[each.site for each in sorted(after - before)] for before, after in pairwise(gone)] if ordered else []
    return {
        "block_influence": block_influence(stack, calibration).values.tolist(),
        "sublayer_influence": sublayer_influence(stack, calibration).values.tolist(),
        "removed_alone": [alone.of([each]) for each in track(stack.positions, "each sublayer alone")],
        "removal_order": order,
    }


@torch.no_grad()
def _samples(models: dict[str, Any], tokenizer: Any, tokens: int = 48) -> list[dict[str, str]]:
    """Greedy answers of both models to the same prompts."""
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
    """Prompts with their likeliest answers [batch, time], by whatever the model predicts."""
    if denoises(model):
        return denoise(model, **inputs, sampler=Sampler(length=tokens, block=tokens // 3, steps=tokens // 2))
    ids: torch.Tensor = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=padding)
    return ids


def _write(
    stack: Stack,
    changed: Stack,
    plan: Plan,
    out: Path,
    form: str,
    evidence: dict[str, Any],
    processor: Any,
    overwrite: bool,
    quantize: str | None,
) -> None:
    """Export, and measure the memory of what was exported, which the documents say, before it appears."""
    form = natural_form(plan, changed) if form == "auto" else form
    evidence["chosen"]["form"] = form
    with new_folder(out, size=0, overwrite=overwrite, source=stack.path) as folder:
        exported = export(changed, plan, folder / "export" / out.name, form=form, tokenizer=processor)
        evidence["chosen"]["memory"] = peak_memory(exported).as_dict()
        if stack.path is not None:
            evidence["base"]["memory"] = peak_memory(stack.path).as_dict()
        if quantize is not None:
            evidence["quantised"] = write_beside(exported, quantize)
        for name, text in _documents(evidence).items():
            (exported / name).write_text(text, encoding="utf-8")
        for path in exported.iterdir():
            path.rename(folder / path.name)
        shutil.rmtree(folder / "export")


def _documents(evidence: dict[str, Any]) -> dict[str, str]:
    return {
        "evidence.json": json.dumps(evidence, indent=2) + "\n",
        "README.md": model_card(evidence),
        "report.html": render(evidence),
    }
