"""Speed of several models, in interleaved runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from lamella.data import ImageText
from lamella.errors import PlanError
from lamella.evaluate import DraftGain, cost, drafted_prompts, peak_memory, step_times
from lamella.evaluate import bench as timed
from lamella.evaluate.fidelity import predicting_stack
from lamella.plan import Plan
from lamella.progress import track
from lamella.registry import command
from lamella.report.drafting import gains_table
from lamella.result import Evidence, Summary, Table
from lamella.results import Study
from lamella.signature import Argument, Split
from lamella.stack import Model
from lamella.zoo import ComparedModel, NamedDraft, SavedModel, open_tokenizer
from lamella.zoo.opening import tokenizer_of


class Benchmark(Study):
    """Speeds of models, as ratios to the first."""

    kind = "benchmark"

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the speed-ups in a table."""
        found, rows = evidence.findings, []
        for name, timings in found["timings"].items():
            for each in timings:
                first = each["batch"] == timings[0]["batch"]
                predicted = found["predicted_speedup"].get(name) if each["batch"] == 1 else None
                peak = found["memory"].get(name) if first else None
                rows.append(
                    [
                        name,
                        each["batch"],
                        _ratio(each["decode_speedup"]),
                        "" if predicted is None else f"{predicted:.2f}",
                        _ratio(each["prefill_speedup"]),
                        "" if peak is None else f"{peak['peak_bytes'] / 2**20:.0f} MiB",
                    ]
                )
        columns = ["model", "batch", "decode speed-up", "predicted", "prefill speed-up", "peak memory"]
        tables = [Table("Medians of interleaved rounds (quartiles)", columns, rows)]
        if found.get("draft"):
            title = f"Decoding with draft {found['draft_name']}; time of a pass and of drafting in plain steps"
            tables.append(gains_table(title, "model", found["draft"]))
        return Summary(f"Speed compared with {found['model']}.", tables)


@command("bench", verb="bench", on="any", brief={"prompt": 8, "tokens": 4, "rounds": 2})
def bench(
    model: SavedModel,
    changed: Annotated[tuple[ComparedModel, ...], Argument()] = (),
    text: Annotated[ImageText | None, Split("test")] = None,
    draft: NamedDraft | None = None,
    *,
    batch: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (1, 8),
    prompt: Annotated[int, Ge(1)] = 128,
    tokens: Annotated[int, Ge(1)] = 32,
    rounds: Annotated[int, Ge(1)] = 5,
    memory: bool = False,
) -> Benchmark:
    """Measure the speed of several models in interleaved runs: prefill and decode, as ratios to the first.

    Example: lamella bench smollm2 plan.json --batch 1,8
    lamella bench VLM plan.json --text shapes:caption

    Args:
        model: the first model; a folder written by Lamella runs with its plan.
        changed: models to compare: plan files, exported folders or models.
        text: rows of images with text, whose prompts replace random tokens.
        draft: also measure what a draft gains on each model, decoding prompts of four kinds: lookup proposes what
            followed the most recent tokens before, a smaller model with the same tokenizer generates.
        batch: batch sizes.
        prompt: tokens of the prompt.
        tokens: decoding steps per round.
        rounds: maximum number of interleaved rounds.
        memory: also measure the peak memory of folders, each in a process of its own.

    Returns:
        Timings by name, predicted speed-ups, costs, peak memory and what drafts gain.

    Raises:
        PlanError: if there is nothing to compare.
    """
    check_options(changed, draft)
    stack: Any = predicting_stack(model.whole) if text is None else model.whole
    first = model.whole.name
    models = {first: model.running.model} | {each.name: model.view(each.name) for each in changed}
    timings = timed(models, batch, prompt if text is None else text, tokens, rounds)
    known = models if text is None else {}  # the cost model predicts steps on random tokens
    plans = {
        name: plan for name, view in known.items() if isinstance(plan := getattr(view, "lamella_plan", None), Plan)
    }
    times = step_times(stack) if plans else None
    predicted = {name: times.speedup(plan) for name, plan in plans.items() if times is not None}
    own = predicted.pop(first, 1.0)  # of the first model, the reference
    peaks = {name: peak_memory(folder).as_dict() for name, folder in _folders(stack, models).items() if memory}
    drafting: dict[str, Any] = {}
    if draft is not None:
        drafting = {"draft_name": draft.name, "draft": _drafted(model, models, draft, tokens, rounds)}
    return Benchmark(
        findings={
            "model": first,
            "timings": {name: [each.as_dict() for each in rows] for name, rows in timings.items()},
            "predicted_speedup": {name: speedup / own for name, speedup in predicted.items()},
            "cost": {name: cost(stack, plan).as_dict() for name, plan in plans.items()},
            "memory": peaks,
        }
        | drafting
    )


def check_options(changed: tuple[ComparedModel, ...] = (), draft: NamedDraft | str | None = None) -> None:
    """Check, before a model is opened, whether there is something to compare.

    Args:
        changed: models to compare with the first one.
        draft: what proposes tokens.

    Raises:
        PlanError: if there is not.
    """
    if not changed and draft is None:
        raise PlanError("nothing to compare: give plan files, folders or models, or a draft")


def _drafted(
    model: SavedModel, models: Mapping[str, Any], draft: NamedDraft, tokens: int, prompts: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return what a draft gains on each prompt, by model and kind of text."""
    own = open_tokenizer(model.whole.path or model.whole.name)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, view in track(models.items(), "drafting"):
        tokenizer = own if name == model.whole.name else tokenizer_of(name, own)
        opened = draft.draft_of(view, tokenizer)
        if opened is not None:
            found[name] = {
                kind: [vars(DraftGain.of(view, opened, each.to(view.device), tokens)) for each in rows]
                for kind, rows in drafted_prompts(tokenizer, prompts).items()
            }
    return found


def _folders(stack: Model, models: dict[str, Any]) -> dict[str, Path]:
    """Return the folders of those models that have one, by name."""
    folders = {name: Path(name) for name in models if Path(name).is_dir()}
    if stack.path is not None:
        folders[next(iter(models))] = stack.path
    return folders


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
