"""Commands that measure: fidelity, tasks and speed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, print_json, table, working
from lamella.cli.groups import with_fields
from lamella.errors import LamellaError, PlanError

TASKS = "Tasks"
TasksOption = Annotated[
    list[str],
    typer.Option(
        "--tasks",
        metavar="NAME",
        help="Tasks to score on, with commas or repeated: definitions, gsm8k, humaneval, a task of lm-eval's, or a "
        "task file (.yaml) of your own. Needs the extra eval.",
        rich_help_panel=TASKS,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(help="The first so many questions of each task; all if left out.", rich_help_panel=TASKS)
]


@dataclass(frozen=True)
class Scoring:
    """Which tasks, and how they are asked."""

    tasks: TasksOption = field(default_factory=list)
    limit: LimitOption = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the questions through the chat template.", rich_help_panel=TASKS)
    ] = False
    batch: Annotated[int, typer.Option(help="Questions that run together.", rich_help_panel=TASKS)] = 16
    trust_tasks: Annotated[
        bool,
        typer.Option(
            "--trust-tasks",
            help="Task files may name Python functions, which are run, files elsewhere and data of the hub.",
            rich_help_panel=TASKS,
        ),
    ] = False
    run_generated_code: Annotated[
        bool,
        typer.Option(
            "--run-generated-code",
            help="humaneval: run what the model writes, in a process that has no network, cannot write files and is "
            "soon stopped (on Linux; elsewhere what is left to it is said).",
            rich_help_panel=TASKS,
        ),
    ] = False

    @property
    def asked(self) -> dict[str, Any]:
        """The same as :func:`lamella.evaluate.tasks.score` takes it."""
        return {
            "limit": self.limit,
            "chat": self.chat,
            "batch": self.batch,
            "trusted": self.trust_tasks,
            "run_generated_code": self.run_generated_code,
        }


@app.command("eval")
@with_fields
def evaluate(
    model: ModelArgument,
    scoring: Scoring,
    changed: Annotated[
        list[str] | None,
        typer.Argument(metavar="CHANGED", help="Plan files, exported folders or models to compare."),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            help="Test text: pydoc, stdlib, gsm8k, humaneval, a datasets name, or a file (its last fifth, since plans "
            "may have been made on the rest). Of a model that reads images, rows of images with text, too."
        ),
    ] = "pydoc",
    whole: Annotated[bool, typer.Option("--whole", help="Use all of a file, which no plan was made on.")] = False,
    sequences: Annotated[int, typer.Option(help="Test sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens in each; the first quarter is prompt and not scored.")] = 256,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """How close changed models stay to the original, or how well all of them do on tasks.

    Fidelity: KL, top-1 agreement and perplexity on a text, with standard errors over sequences. With --tasks instead
    the scores of the original and of what is compared, with standard errors over questions, and the differences, which
    are surer: all answer the same questions. Plans that skip layers while generating are scored as they generate: full
    depth on the prompt, thin after it.

    Example: lamella eval smollm2 plan.json --text gsm8k
    lamella eval smollm2 smaller --tasks definitions
    """
    from lamella.data import ImageText, load_text, windows
    from lamella.evaluate import FidelityTest
    from lamella.jobs.checks import check_changed, check_source
    from lamella.zoo import open_tokenizer, open_written

    changed = changed or []
    if scoring.tasks:
        _score(model, changed, scoring.tasks, json, **scoring.asked, seed=seed)
        return
    if not changed:
        raise PlanError(f"nothing to compare with {model}: give plan files, folders or models, or --tasks")
    with working():
        for name in (model, *changed):
            check_changed(name)
        check_source(text)
        written = open_written(model)
        original = written.running
        split: Literal["whole", "test"] = "whole" if whole else "test"
        tokens: Any
        if ImageText.fits(original, text):
            tokens = _rows(original, model, text, split, sequences, seed)
            data, cut = tokens.describe(), ""
        else:
            source = load_text(text, split)
            tokens = windows(open_tokenizer(original.path or model), source, sequences, length, seed)
            data, cut = source.provenance(tokens), source.cut
        test = FidelityTest(original, tokens)
        results = {name: test.of(written.view(name)) for name in changed}
    if json:
        print_json({"data": data, "results": {name: f.as_dict() for name, f in results.items()}})
        return
    first = next(iter(results.values()))
    rows = [["(original)", "", "", str(first.base_perplexity)]]
    rows += [[name, str(f.kl), str(f.top1), str(f.perplexity)] for name, f in results.items()]
    where = f"{cut} of {text}" if cut else text
    amount = f"{first.positions} tokens in {first.sequences} sequences"
    title = f"Fidelity to {original.name} on {where}: {amount}, ± standard error"
    table(title, ["model", "KL (nats)", "same top token", "perplexity"], rows)


def _rows(original: Any, model: str, name: str, split: Any, rows: int, seed: int) -> Any:
    """Rows of images with text, as a model reads them."""
    from lamella.data import ImageText
    from lamella.jobs.held_out import reader_for

    return ImageText.open(name, replace(reader_for(original, model, seed), split=split), rows=rows)


def _score(model: str, changed: list[str], tasks: list[str], json: bool, **asked: Any) -> None:
    """Print what the original and changed models reach on tasks."""
    from lamella.evaluate.tasks import open_tasks, score
    from lamella.jobs.checks import check_changed
    from lamella.provenance import environment
    from lamella.zoo import open_tokenizer, open_written

    names = [name for given in tasks for name in given.split(",") if name]
    with working():
        open_tasks(names, trusted=asked["trusted"], run_generated_code=asked["run_generated_code"])  # before the models
        for name in (model, *changed):
            check_changed(name)
        written = open_written(model)
        tokenizer = open_tokenizer(written.whole.path or model)
        scores = {model: score(written.running, tokenizer, names, **asked)}
        for name in changed:
            scores[name] = score(written.view(name), _tokenizer(name, tokenizer), names, **asked)
    first = scores[model]
    if json:
        said = {
            name: [
                each.as_dict() | ({} if (since := each.since(base)) is None else {"difference": vars(since)})
                for each, base in zip(found, first, strict=True)
            ]
            for name, found in scores.items()
        }
        print_json({"seed": asked["seed"], "limit": asked["limit"], "scores": said, "environment": environment()})
        return
    rows = []
    for number, base in enumerate(first):
        for name, found in scores.items():
            since = None if name == model else found[number].since(base)
            what = f"{base.task}, {base.metric}" if name == model else ""
            rows.append([what, name, str(found[number].value), "" if since is None else str(since)])
    questions = ", ".join(
        f"{count} questions of {task}" for task, count in {x.task: x.questions for x in first}.items()
    )
    table(f"{questions}; ± standard error", ["task", "model", "score", "against the original"], rows)


def _tokenizer(changed: str, original: Any) -> Any:
    """That of a changed model: of a plan, or of a folder without one, the original's."""
    from lamella.zoo import open_tokenizer

    if changed.endswith(".json"):
        return original
    try:
        return open_tokenizer(changed)
    except LamellaError:
        return original


@app.command("bench")
def bench_command(
    model: ModelArgument,
    changed: Annotated[
        list[str], typer.Argument(metavar="CHANGED", help="Plan files, exported folders or models to compare.")
    ],
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    text: Annotated[
        str | None, typer.Option(help="Rows of images with text, whose prompts are read in place of random tokens.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Decoding steps per round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the peak memory of folders, each in a process of its own.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Speed of models side by side, in interleaved runs: prefill and decode, as ratios to the first with quartiles.

    Example: lamella bench smollm2 plan.json --batch 1,8
    lamella bench VLM plan.json --text shapes:caption
    """
    from lamella.evaluate import bench, cost, measure_step, peak_memory
    from lamella.evaluate.fidelity import judged
    from lamella.jobs.checks import check_changed, check_source
    from lamella.plan import Plan
    from lamella.provenance import environment
    from lamella.zoo import open_written

    batches = _batches(batch)
    for name, value in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise PlanError(f"--{name} {value}: give a whole number from 1 on")
    with working():
        for name in (model, *changed):
            check_changed(name)
        if text is not None:
            check_source(text)
        written = open_written(model)
        stack: Any = judged(written.whole) if text is None else written.whole
        models = {model: written.running.model} | {name: written.view(name) for name in changed}
        read: Any = prompt if text is None else _rows(stack, model, text, "test", max(batches), 0)
        timings = bench(models, batches, read, tokens, rounds)
        known = models if text is None else {}  # what a step costs is known of random tokens
        plans = {name: getattr(view, "lamella_plan", None) for name, view in known.items()}
        times = measure_step(stack) if any(isinstance(plan, Plan) for plan in plans.values()) else None
        folders = {name: folder for name, folder in _folders(stack, models).items() if memory}
        peaks = {name: peak_memory(folder) for name, folder in folders.items()}
    predicted = {name: times.speedup(plan) for name, plan in plans.items() if times and isinstance(plan, Plan)}
    own = predicted.pop(model, 1.0)  # of the first model, which the others are compared with
    predicted = {name: speedup / own for name, speedup in predicted.items()}
    if json:
        results = {name: [timing.as_dict() for timing in rows] for name, rows in timings.items()}
        costs = {name: cost(stack, plan).as_dict() for name, plan in plans.items() if isinstance(plan, Plan)}
        document = {"environment": environment(), "timings": results, "predicted_speedup": predicted, "cost": costs}
        print_json(document | {"memory": {name: peak.as_dict() for name, peak in peaks.items()}})
        return
    rows = []
    for name, each in timings.items():
        for timing in each:
            forecast = f"{predicted[name]:.2f}" if name in predicted and timing.batch == 1 else ""
            peak = f"{peaks[name].peak / 2**20:.0f} MiB" if name in peaks and timing.batch == batches[0] else ""
            rows.append([name, timing.batch, str(timing.decode_speedup), forecast, str(timing.prefill_speedup), peak])
    columns = ["model", "batch", "decode speed-up", "predicted", "prefill speed-up", "peak memory"]
    table(f"Median of {rounds} interleaved rounds (quartiles), against {model}", columns, rows)


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise PlanError(f"--batch {text}: give whole numbers from 1 on, with commas, such as 1,8")
    return batches


def _folders(stack: Any, models: dict[str, Any]) -> dict[str, Path]:
    folders = {name: Path(name) for name in models if Path(name).is_dir()}
    if stack.path is not None:
        folders[next(iter(models))] = stack.path
    return folders
