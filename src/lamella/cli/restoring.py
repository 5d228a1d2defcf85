"""The command that puts pre-trained layers back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, SeedOption, out, print_json, table, working


@app.command()
def restore(
    model: Annotated[
        str, typer.Argument(metavar="POST", help="The post-trained model: a checkpoint folder, a zoo name or a hub id.")
    ],
    base: Annotated[
        str, typer.Option(metavar="PRE", help="The model that it was trained from, before instructions or preferences.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    data: Annotated[
        str,
        typer.Option(
            help="crc: one random character of a set, built in. Or a .jsonl file of your own, one question a line: "
            '{"prompt": "Pick a random vowel.", "answers": ["A", "E", "I", "O", "U"]}. Answers are single tokens; '
            "every other line is kept to report on."
        ),
    ] = "crc",
    prefill: Annotated[
        str,
        typer.Option(help="What the answer begins with, such as the closed reasoning of a model that thinks."),
    ] = "",
    min_quality: Annotated[
        float, typer.Option(help="Floor of Q, the mass on valid answers, as a share of the post-trained model's.")
    ] = 0.9,
    min_validity: Annotated[
        float, typer.Option(help="Leave out questions that the post-trained model answers with less valid mass.")
    ] = 0.2,
    stride: Annotated[
        int, typer.Option(help="Look at every n-th layer first, then around the best; 1 looks at every interval.")
    ] = 1,
    samples: Annotated[
        int, typer.Option(help="Answers to sample to each of 12 open questions, before and after; 0: none.")
    ] = 32,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Bring diversity back to a model that always says the same: pre-trained weights in one range of its layers.

    Nothing is trained, and the result runs at the same cost. Questions with many right answers, such as "a random
    vowel", are answered by one forward pass each. Every range of layers gets two figures: Q, the mass on right answers,
    and D, how evenly it is spread over them. The range of the highest D is taken whose Q stays above the floor, and
    reported on other questions, beside soups of the two models and other ranges of the same length.

    The folder gets an ordinary checkpoint with plan.json, evidence.json and restore.html. Killed, the same command goes
    on where it was. The floor holds for these questions: check your own task before you use the result.

    Example: lamella restore org/model-instruct --base org/model -o diverse
    lamella restore instruct --base base --data questions.jsonl --stride 4 -o diverse
    """
    from lamella.methods.slr import restore as run

    with working():
        evidence = run(
            model,
            base,
            output,
            data=data,
            prefill=prefill,
            min_quality=min_quality,
            min_validity=min_validity,
            stride=stride,
            samples=samples,
            seed=seed,
            overwrite=overwrite,
        )
    if json:
        print_json(evidence)
        return
    from lamella.methods.slr import described, verdict

    rows: list[list[Any]] = [
        [described(row), f"{row['quality']:.3f}", f"{row['diversity']:.3f}"] for row in evidence["report"]
    ]
    table("On questions that nothing was chosen on", ["model", "Q (valid)", "D (diverse)"], rows)
    if "open" in evidence:
        before, after = evidence["open"]["before"], evidence["open"]["after"]
        title = f"Open questions, {before['samples']} answers to each"
        parts = [("different right answers", "distinct", ".2f"), ("right", "valid", ".0%")]
        table(title, ["", "before", "after"], [
            [label, format(before[name], form), format(after[name], form)] for label, name, form in parts
        ])  # fmt: skip
    told = evidence["search"]
    out.print(verdict(evidence), soft_wrap=True)
    out.print(
        f"{told['evaluations']} intervals on {told['questions']} questions in {told['seconds']:.0f} s; "
        f"{len(told['dropped'])} questions left out",
        soft_wrap=True,
    )
    out.print(f"checkpoint, plan and evidence: {output}\nreport: {output / 'restore.html'}", soft_wrap=True)
