"""The command that searches paths through the layers, sample by sample."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, out, print_json, table, working
from lamella.errors import ExportError, MethodError
from lamella.files import write


@app.command()
def cola(
    model: ModelArgument,
    samples: Annotated[
        Path,
        typer.Option(
            help='JSONL, one sample a line: {"prompt": "...\\nAnswer:", "answer": " B", "options": [" A", " B"]}. '
            "Without options the answer is written and compared; 'wrong' may list wrong answers for the control."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for paths, report and plans.")],
    sims: Annotated[
        int, typer.Option(help="Simulations of each search; the paper: 200, its authors' code: 100.")
    ] = 100,
    penalty: Annotated[
        float, typer.Option(help="Lambda: how much the search prefers short paths; 0 not at all.")
    ] = 5.0,
    protect: Annotated[str, typer.Option(help="First and last layers that are never edited, such as 2,2.")] = "0,0",
    tokens: Annotated[int, typer.Option(help="The most new tokens of an answer without options.")] = 10,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(help="More samples: train the path predictor on what was found, and run its paths on these."),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster (auto: the running one, local: start one here).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of a finished run.")] = False,
    seed: SeedOption = 42,
    json: JsonOption = False,
) -> None:
    """Which layers to skip or repeat so that a model gets a question right: a diagnosis that needs the answer.

    For every sample a tree search looks for the shortest path through the layers that gives the known answer. With
    that many tries some path gives almost any answer, so the same search runs for wrong answers, at random, with
    skips alone and with repeats alone. Read the results beside those controls, never alone.

    The folder holds study.json (every path, valid or not), report.json, plans/ (one per sample, for `lamella apply`)
    and answers.jsonl, with which an interrupted run goes on. Example:
    lamella cola smollm2 --samples questions.jsonl --sims 50 -o paths
    """
    from lamella.methods.cola import Settings, read_samples, report, train_predictor
    from lamella.methods.cola import cola as search
    from lamella.zoo import open_stack, open_tokenizer

    ends = _ends(protect)
    settings = Settings(simulations=sims, penalty=penalty, protect=ends, tokens=tokens, chat=chat, seed=seed)
    questions = read_samples(samples)
    unseen = None if held_out is None else read_samples(held_out)
    _check_output(output, overwrite)
    with working():
        stack = open_stack(model)
        tokenizer = open_tokenizer(stack.path or model)
        journal = output / "answers.jsonl"
        study = search(stack, questions, tokenizer=tokenizer, settings=settings, journal=journal, cluster=cluster)
        numbers = report(study)
        if unseen is not None:
            predictor = train_predictor(stack, study, tokenizer, seed=seed)
            numbers["predictor"] = predictor.score(stack, unseen, tokenizer, tokens)._asdict()
            predictor.save(output / "predictor.safetensors")
    (output / "plans").mkdir(exist_ok=True)
    plans = study.plans()
    for number, each in enumerate(questions):
        if each.id in plans:
            plans[each.id].write(output / "plans" / f"{number:03d}-{re.sub(r'[^A-Za-z0-9.-]', '_', each.id)}.json")
    for name, document in (("report", numbers), ("study", study.as_dict())):
        write(output / f"{name}.json", json_module.dumps(document, indent=1) + "\n")
    if json:
        print_json(numbers)
        return
    _print_report(numbers, stack.name)
    executed, asked = (sum(getattr(each, name) for each in study.samples) for name in ("executed", "asked"))
    if asked:
        out.print(f"layers executed: {executed}, {executed / asked:.0%} of what running every path alone takes")
    out.print(f"paths, report and plans: {output}", soft_wrap=True)


def _print_report(numbers: dict[str, Any], model: str) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    names = {
        "tree": "tree search",
        "random": "random (as many evaluations)",
        "skip": "skips alone",
        "repeat": "repeats alone",
        "wrong target": "a wrong answer (control)",
    }
    rows = [[text, share(numbers["shorter"][name]), share(numbers["repaired"][name])] for name, text in names.items()]
    right, total = numbers["right"], numbers["samples"]
    title = f"{model} answers {right} of {total} itself"
    table(title, ["search", "right: shorter path", "wrong: any path"], rows)
    excess = numbers["excess"]
    if excess["p"] is not None:
        out.print(
            f"valid paths above the control, over {excess['samples']} samples: {excess['mean']:+.2f} "
            f"± {excess['standard_error']:.2f} (p = {excess['p']:.3f})"
        )
    if "predictor" in numbers:
        score = numbers["predictor"]
        out.print(
            f"path predictor on {score['samples']} held-out samples: pass@1 {score['pass_1']:.0%}, pass@5 "
            f"{score['pass_5']:.0%} (which of 5 needs the answer), the model itself {score['base']:.0%}"
        )


def _ends(text: str) -> tuple[int, int]:
    try:
        first, last = (int(part) for part in text.split(","))
    except ValueError:
        raise MethodError(f"--protect {text}: give two whole numbers with a comma, such as 2,2") from None
    return first, last


def _check_output(output: Path, overwrite: bool) -> None:
    if (output / "study.json").exists() and not overwrite:
        raise ExportError(f"{output} holds a finished study: choose another folder, or add --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({error.strerror or error}); choose another folder") from None
