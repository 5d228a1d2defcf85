"""The command that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, out, print_json, table, working


@app.command()
def heal(
    model: ModelArgument,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of a method with a recipe.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    text: Annotated[str, typer.Option(help="Text to train on: pydoc, stdlib, a file or a datasets name.")] = "pydoc",
    test: Annotated[str, typer.Option(help="Text to measure on, better of another kind.")] = "stdlib",
    sequences: Annotated[int, typer.Option(help="Blocks of training text.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the recipe's own number when left out.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; the recipe's own when left out.")] = None,
    batch: Annotated[int | None, typer.Option(help="Blocks in one step; the recipe's own when left out.")] = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Train back what a plan cost, by its method's own recipe.

    unified-skip tunes all but the embedding, first adds LoRA beside its routers, lora-drop trains its corrections
    alone, rd-prune trains everything and holds its masks. Killed, the same command goes on from the last checkpoint
    with the same result. The folder gets the checkpoint with its plan, the evidence before and after, and heal.html
    with the loss curve.

    Example: lamella heal smollm2 plan.json --steps 200 -o healed
    """
    from lamella.pipeline import heal as run
    from lamella.plan import Plan

    chosen: dict[str, Any] = {"steps": steps, "lr": lr, "batch": batch}
    with working():
        evidence = run(
            model,
            Plan.read(plan_file),
            output,
            text=text,
            test=test,
            sequences=sequences,
            length=length,
            seed=seed,
            overwrite=overwrite,
            options={name: value for name, value in chosen.items() if value is not None},
        )
    if json:
        print_json(evidence)
        return
    before, after = evidence["before"], evidence["after"]
    rows = [
        [label, *(f"{part[name]['mean']:.4g} ± {part[name]['error']:.2g}" for part in (before, after))]
        for name, label in (("perplexity", "perplexity"), ("kl", "KL (nats)"), ("top1", "same top token"))
    ]
    table(f"{evidence['model']} with {evidence['method']}, on {test}", ["", "before", "after"], rows)
    out.print(f"checkpoint, plan and evidence: {output}\nreport: {output / 'heal.html'}", soft_wrap=True)
