"""The main job: from a model to a smaller, measured, exported one, with its evidence."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor

from lamella.errors import BudgetError, ExportError, MethodError
from lamella.evaluate import FidelityTest, Ratio, StepTimes, bench, cost, environment, measure_step, peak_memory
from lamella.plan import Plan, PlanSeries
from lamella.plan.export import export
from lamella.progress import track
from lamella.registry import Method, get_method, methods
from lamella.report import check_installed, model_card, render
from lamella.runtime import apply
from lamella.scoring import OutputDistance, block_influence, half_influence
from lamella.stack import Stack
from lamella.zoo import load_text, open_stack, open_tokenizer, windows

DEFAULT_METHOD = "finercut"
TOLERANCE = 0.98  # of the target: what counts as reached, since two runs of one model differ by about as much
MARGIN = 1.1  # how far past the target a search goes, in case the measurement disagrees with the cost model
ATTEMPTS = 4
CURVE_POINTS = 6
TEST_SEQUENCES = 8
PROMPTS = (
    "Write a short note that explains what a list comprehension is.",
    "What is the capital of France, and why is it famous?",
    "Give three tips for sleeping well.",
)


@dataclass(frozen=True)
class Data:
    """The texts of one job, cut into windows of tokens, with what evidence says of them."""

    calibration: LongTensor
    test: LongTensor
    provenance: dict[str, Any]

    @classmethod
    def load(
        cls, tokenizer: Any, calibration: str, test: str, seed: int, sequences: int = 4, length: int = 256
    ) -> Data:
        """Cut both texts; their splits never overlap, even when both are the same source."""
        to_plan, to_test = load_text(calibration, "calibration"), load_text(test, "test")
        plan_blocks = windows(tokenizer, to_plan, sequences, length, seed)
        test_blocks = windows(tokenizer, to_test, TEST_SEQUENCES, length, seed)
        provenance = {"calibration": to_plan.provenance(plan_blocks), "test": to_test.provenance(test_blocks)}
        return cls(plan_blocks, test_blocks, provenance)


@dataclass
class Candidate:
    """One method's series, and the point of it that answers the target.

    Attributes:
        seconds: how long planning took.
        point: the index of the chosen plan.
        speedup: the decode speed-up that was measured for it.
        points: what was measured along the series, as evidence holds it.
    """

    method: Method
    series: PlanSeries
    seconds: float
    point: int = 0
    speedup: Ratio | None = None
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.series[self.point]

    def loss(self, speedup: float) -> tuple[bool, float]:
        """How good the chosen plan is, the least being the best: reaching the target first, then KL."""
        assert self.speedup is not None
        chosen = next(point for point in self.points if point["chosen"])
        return self.speedup.median < TOLERANCE * speedup, chosen["fidelity"]["kl"]["mean"]


def make_plan(slug: str, model: Any, calibration: LongTensor | None = None, **options: Any) -> PlanSeries:
    """Run one planning method.

    Args:
        slug: a method of kind plan or policy; see :func:`lamella.methods`.
        model: anything that :func:`lamella.open` takes.
        calibration: token ids [sequences, time], for the methods that need them.
        options: the method's own options.

    Raises:
        MethodError: for an unknown method or option, or one that makes no plans.
    """
    entry = get_method(slug)
    if entry.kind not in ("plan", "policy"):
        raise MethodError(f"{slug} is a {entry.kind} method and makes no plan; `lamella methods` says what does")
    stack = open_stack(model)
    if not stack.family.causal and entry.families == "decoder":
        raise MethodError(f"{slug} works on decoders; {stack.name} is a {stack.family.name}")
    if "calibration" not in entry.needs:
        return entry(stack, **options)
    if calibration is None:
        raise MethodError(f"{slug} needs calibration tokens [sequences, time]: make them with lamella.windows")
    return entry(stack, calibration, **options)


def first_reaching(series: PlanSeries, times: StepTimes, speedup: float) -> int:
    """The point of the series with the fewest halves removed whose predicted decode speed-up reaches the target.

    Raises:
        BudgetError: when none does; the message says the highest that can be reached.
    """
    predicted = [times.speedup(plan) for plan in series]
    reaching = [index for index, value in enumerate(predicted) if value >= speedup]
    if not reaching:
        name = series.provenance.get("method", "this series")
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached by {name}: {max(predicted):.2f} is the highest it can"
        )
    return min(reaching, key=lambda index: len(series[index].skipped))


def ceiling(stack: Stack, times: StepTimes) -> float:
    """The decode speed-up with a single MLP half left: more than any plan can bring."""
    return times.speedup_without(frozenset(range(2 * len(stack) - 1)), len(stack))


def compress(
    model: Any,
    out: str | Path,
    *,
    speedup: float = 1.3,
    method: str = DEFAULT_METHOD,
    options: dict[str, Any] | None = None,
    calibration: str = "pydoc",
    test: str = "pydoc",
    form: str = "auto",
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
        method: a planning method, or ``all``.
        options: options of the method.
        calibration, test: texts to plan and to measure on; see :func:`lamella.load_text`.
        form: of the export; ``auto`` is ``plain`` where a standard config can express the plan, else ``native``.
        seed: of everything that is drawn.
        overwrite: replace ``out``.

    Returns:
        The evidence, as written to ``evidence.json``.

    Raises:
        BudgetError: when the target cannot be reached; the message says what can.
        ExportError: when ``out`` exists, or cannot be written.
    """
    out = Path(out)
    if speedup < 1:
        raise BudgetError(f"a speed-up of {speedup:g} would slow the model down: give 1 or more")
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists: choose another folder, or add --overwrite to replace it")
    check_installed()
    entries = _entries(method)
    stack = open_stack(model)
    tokenizer = open_tokenizer(stack.path or model)
    data = Data.load(tokenizer, calibration, test, seed)
    torch.manual_seed(seed)

    times = measure_step(stack)
    if speedup > ceiling(stack, times):
        raise BudgetError(
            f"a speed-up of {speedup:g} cannot be reached on {stack.name}: {ceiling(stack, times):.2f} is left with a "
            "single half, since the head and the loop stay; ask for less"
        )
    journals = out.parent / f".{out.name}.journal"
    candidates = [_plan(entry, stack, data, times, speedup, options or {}, seed, journals) for entry in entries]
    _choose(stack, candidates, times, speedup)
    _measure_curves(stack, candidates, times, FidelityTest(stack, data.test))
    best = min(candidates, key=lambda candidate: candidate.loss(speedup))

    evidence = _evidence(stack, best, candidates, times, data, speedup, seed)
    evidence["scores"] = _scores(stack, data.calibration, best)
    evidence["samples"] = _samples(stack, best.plan, tokenizer)
    _write(stack, best.plan, out, form, evidence, tokenizer, overwrite)
    shutil.rmtree(journals, ignore_errors=True)
    return evidence


def _entries(method: str) -> list[Method]:
    if method != "all":
        return [get_method(method)]
    return [entry for entry in methods().values() if entry.kind in ("plan", "policy")]


def _plan(
    entry: Method,
    stack: Stack,
    data: Data,
    times: StepTimes,
    speedup: float,
    options: dict[str, Any],
    seed: int,
    journals: Path,
) -> Candidate:
    """Run one method as far as the target needs, and a little further in case the measurement disagrees."""
    chosen = {name: value for name, value in options.items() if name in entry.options}
    if set(options) - set(chosen):
        entry(stack, **options)  # says which option is unknown
    known = {
        "until": lambda gone: times.speedup_without(gone, len(stack)) >= MARGIN * speedup,
        "remove": 1.0,
        "journal": journals / f"{entry.slug}.jsonl",
        "seed": seed,
    }
    chosen = {name: value for name, value in known.items() if name in entry.options} | chosen
    begin = time.perf_counter()
    series = make_plan(entry.slug, stack, data.calibration, **chosen)
    return Candidate(entry, series, time.perf_counter() - begin)


def _choose(stack: Stack, candidates: list[Candidate], times: StepTimes, speedup: float) -> None:
    """Pick each series' smallest cut by the cost model, then measure, and go on where the target was missed."""
    for candidate in candidates:
        try:
            candidate.point = first_reaching(candidate.series, times, speedup)
        except BudgetError:
            if len(candidates) == 1:
                raise
            candidate.point = len(candidate.series) - 1
    pending = candidates
    for _ in range(ATTEMPTS):
        views = {candidate.method.slug: apply(stack, candidate.plan) for candidate in pending}
        timings = bench({"original": stack.model} | views)
        missed = []
        for candidate in pending:
            candidate.speedup = timings[candidate.method.slug][0].decode_speedup
            if candidate.speedup.median < TOLERANCE * speedup:
                wanted = times.speedup(candidate.plan) * speedup / candidate.speedup.median
                further = [i for i, plan in enumerate(candidate.series) if times.speedup(plan) >= wanted]
                if (
                    further
                    and (point := min(further, key=lambda i: len(candidate.series[i].skipped))) != candidate.point
                ):
                    candidate.point = point
                    missed.append(candidate)
        if not missed:
            return
        pending = missed


def _measure_curves(stack: Stack, candidates: list[Candidate], times: StepTimes, fidelity: FidelityTest) -> None:
    """Fidelity and measured speed along every series, at the chosen point and at a few before it."""
    for candidate in track(candidates, "fidelity against speed"):
        series = candidate.series
        before = [index for index in range(len(series)) if len(series[index].skipped) <= len(candidate.plan.skipped)]
        before.sort(key=lambda index: len(series[index].skipped))
        count = min(CURVE_POINTS, len(before))
        indices = [before[round(k * (len(before) - 1) / max(count - 1, 1))] for k in range(count)]
        views = {str(index): apply(stack, series[index]) for index in dict.fromkeys([*indices, candidate.point])}
        timings = bench({"original": stack.model} | views, tokens=16, rounds=3)
        for name, view in views.items():
            plan = series[int(name)]
            candidate.points.append(
                {
                    "point": int(name),
                    "halves_removed": len(plan.skipped),
                    "predicted_speedup": times.speedup(plan),
                    "measured_speedup": vars(timings[name][0].decode_speedup),
                    "fidelity": fidelity.of(view).as_dict(),
                    "chosen": int(name) == candidate.point,
                    "pareto": False,
                }
            )
    points = [point for candidate in candidates for point in candidate.points]
    for point in points:
        point["pareto"] = not any(_beats(other, point) for other in points)


def _beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether ``other`` is faster and closer to the original."""
    faster = other["measured_speedup"]["median"] - point["measured_speedup"]["median"]
    closer = point["fidelity"]["kl"]["mean"] - other["fidelity"]["kl"]["mean"]
    return faster >= 0 and closer >= 0 and (faster > 0 or closer > 0)


def _evidence(
    stack: Stack,
    best: Candidate,
    candidates: list[Candidate],
    times: StepTimes,
    data: Data,
    speedup: float,
    seed: int,
) -> dict[str, Any]:
    plan = best.plan
    timings = bench({"original": stack.model, "changed": apply(stack, plan)}, batches=(1, 8), tokens=24)
    chosen = next(point for point in best.points if point["chosen"])
    reached = timings["changed"][0].decode_speedup.median >= TOLERANCE * speedup
    notes = [] if reached else [f"The target of {speedup:g} was not reached: no plan of this series is that fast here."]
    for candidate in candidates:
        if candidate is not best and candidate.loss(speedup)[0]:
            notes.append(f"{candidate.method.slug} did not reach the target; its smallest model was measured instead.")
    return {
        "schema": "lamella.evidence/1",
        "model": {
            "name": stack.name,
            "family": stack.family.name,
            "layers": len(stack),
            "parameters": cost(stack).parameters,
        },
        "target_speedup": speedup,
        "method": best.method.slug,
        "options": best.series.provenance.get("options", {}),
        "seed": seed,
        "environment": environment(),
        "data": data.provenance,
        "step_seconds": vars(times),
        "base": {"cost": cost(stack).as_dict(), "timings": [timing.as_dict() for timing in timings["original"]]},
        "chosen": {
            "method": best.method.slug,
            "point": best.point,
            "drop": plan.drop,
            "path": {name: path.model_dump() for name, path in plan.path.items()},
            "predicted_speedup": times.speedup(plan),
            "reached": reached,
            "cost": cost(stack, plan).as_dict(),
            "fidelity": chosen["fidelity"],
            "timings": [timing.as_dict() for timing in timings["changed"]],
            "search_seconds": best.seconds,
        },
        "layers": _layers(plan),
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


def _layers(plan: Plan) -> list[dict[str, str]]:
    """What each half of each layer does: ``kept``, ``cut``, or ``prompt`` where generated tokens skip it."""
    on_prompt = {2 * run.layer + half for run in plan.runs("prefill") for half in (0, 1) if (run.attn, run.mlp)[half]}

    def state(half: int) -> str:
        return "kept" if half not in plan.skipped else "prompt" if half in on_prompt else "cut"

    return [{"attn": state(2 * layer), "mlp": state(2 * layer + 1)} for layer in range(plan.model.layers)]


def _scores(stack: Stack, calibration: LongTensor, best: Candidate) -> dict[str, Any]:
    """What the drawing of the stack is coloured by; removals alone on one sequence, since they only colour."""
    alone = OutputDistance(stack, calibration[:1])
    halves = range(2 * len(stack))
    removed: list[int] = []
    order = []
    for plan in best.series:
        order.append(sorted(plan.skipped - set(removed)))
        removed += order[-1]
    return {
        "block_influence": block_influence(stack, calibration).values.tolist(),
        "half_influence": half_influence(stack, calibration).values.tolist(),
        "removed_alone": [alone.of([half]) for half in track(halves, "each half alone")],
        "removal_order": order[1 : best.point + 1],
    }


@torch.no_grad()
def _samples(stack: Stack, plan: Plan, tokenizer: Any, tokens: int = 48) -> list[dict[str, str]]:
    """Greedy answers of both models to the same prompts."""
    models: dict[str, Any] = {"base": stack.model, "changed": apply(stack, plan)}
    samples = []
    for prompt in track(PROMPTS, "samples"):
        inputs = chat_inputs(tokenizer, [{"role": "user", "content": prompt}], stack.device)
        sample = {"prompt": prompt}
        for name, model in models.items():
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            sample[name] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        samples.append(sample)
    return samples


def chat_inputs(tokenizer: Any, messages: list[dict[str, str]], device: torch.device) -> dict[str, torch.Tensor]:
    """A conversation as model inputs: through the chat template where there is one, as plain text elsewhere."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def _write(
    stack: Stack,
    plan: Plan,
    out: Path,
    form: str,
    evidence: dict[str, Any],
    tokenizer: Any,
    overwrite: bool,
) -> None:
    """Export, then measure the memory of what was exported, and put that into the evidence too."""
    whole = all(half ^ 1 in plan.skipped for half in plan.skipped)
    form = ("plain" if plan.is_static and whole else "native") if form == "auto" else form
    evidence["chosen"]["form"] = form
    documents = _documents(evidence)
    card = documents.pop("README.md")
    export(stack, plan, out, form=form, overwrite=overwrite, tokenizer=tokenizer, card=card, files=documents)
    evidence["chosen"]["memory"] = peak_memory(out).as_dict()
    if stack.path is not None:
        evidence["base"]["memory"] = peak_memory(stack.path).as_dict()
    for name, text in _documents(evidence).items():
        partial = out / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def _documents(evidence: dict[str, Any]) -> dict[str, str]:
    return {
        "evidence.json": json.dumps(evidence, indent=2) + "\n",
        "README.md": model_card(evidence),
        "report.html": render(evidence),
    }
