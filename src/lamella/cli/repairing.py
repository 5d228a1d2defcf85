"""The command that repairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, out, print_json, table, working


@app.command()
def repair(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    bad: Annotated[
        Path | None,
        typer.Option(
            help='What the model shall not write. A .jsonl file: {"prompt": "...", "text": "..."} on each line; or a '
            ".txt file: the prompt, a tab, the continuation."
        ),
    ] = None,
    good: Annotated[
        Path | None,
        typer.Option(help="What it shall write instead: as many lines, with the same prompts in the same order."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help='Instead of both, one .jsonl file: {"prompt": "...", "bad": "...", "good": "..."}; "rejected" and '
            '"chosen" are understood too.'
        ),
    ] = None,
    utility: Annotated[
        str,
        typer.Option(
            help="Text whose distribution is to stay. self: the model writes it. Or pydoc, stdlib, a file or a "
            "datasets name that is like what the model was trained on."
        ),
    ] = "self",
    method: Annotated[
        str,
        typer.Option(
            help="irepair; or to compare with dapt (good text, all weights), dapt-kl (with the same leash), dpo."
        ),
    ] = "irepair",
    select: Annotated[
        str | None,
        typer.Option(
            help="The layer of each step: max, the most sensitive to bad text (the method), min, random, fixed."
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(help="A regular expression that finds the habit: it is counted before and after."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    test: Annotated[str, typer.Option(help="Text to measure everything else on.")] = "stdlib",
    steps: Annotated[int | None, typer.Option(help="The most steps; one pass over the pairs when left out.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of RMSprop; 5e-5 when left out.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which it rises; 150 when left out.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pairs in a step; 4 when left out.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the loss on good text; 0.5 when left out.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of the leash; 1 when left out, 0 for none.")] = None,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction", help="Let no layer's first step be ten times as long as others.")
    ] = False,
    per_parameter: Annotated[
        bool, typer.Option("--per-parameter", help="Divide sensitivities by the layers' sizes, where those differ.")
    ] = False,
    seed: SeedOption = 202,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Train a bad habit away, at each step only in the layer that is most responsible for it.

    At every step the loss on bad continuations says which layer to blame; that layer alone takes a step towards the
    good ones, held to the original on other text. Most tensors stay as they are to the bit. A fifth of the pairs, 50 at
    most, is kept to measure the habit on. Give some hundreds of pairs, best with continuations in the model's own
    style. Killed, the same command goes on from the last checkpoint with the same result.

    The folder gets the checkpoint, plan.json (applied to the original it gives the same, dropped it is undone),
    trace.json with the layer of each step, evidence.json and repair.html.

    Example: lamella repair smollm2 --bad bad.jsonl --good good.jsonl --match "As an AI" --chat -o repaired
    lamella repair gpt2 --pairs toxic.jsonl --method dpo -o with-dpo
    """
    from lamella.methods.irepair import repair as run

    chosen: dict[str, Any] = {
        "select": select,
        "steps": steps,
        "lr": lr,
        "warmup": warmup,
        "batch": batch,
        "beta": beta,
        "gamma": gamma,
        "per_layer_bias_correction": bias_correction or None,
        "per_parameter": per_parameter or None,
    }
    with working():
        evidence = run(
            model,
            output,
            bad=bad,
            good=good,
            pair_file=pairs,
            utility=utility,
            method=method,
            match=match,
            chat=chat,
            test=test,
            seed=seed,
            overwrite=overwrite,
            options={name: value for name, value in chosen.items() if value is not None},
        )
    if json:
        print_json(evidence)
        return
    rows = []
    both = [evidence["before"], evidence["after"]]
    if match is not None:
        rows.append(["continuations with the habit", *(f"{part['habit']:.1%}" for part in both)])
    rows += [
        ["good one likelier than bad one", *(f"{part['preferred']:.1%}" for part in both)],
        ["loss on bad continuations", *(f"{part['bad']:.4g}" for part in both)],
        ["loss on good continuations", *(f"{part['good']:.4g}" for part in both)],
        [f"perplexity on {test}", *(_estimate(part["perplexity"]) for part in both)],
        ["KL from the original (nats)", "", _estimate(evidence["after"]["kl"])],
    ]
    title = f"{evidence['model']['name']} with {method}, on {evidence['counts']['judged']} pairs it was not trained on"
    table(title, ["", "before", "after"], rows)
    changed = ", ".join(evidence["sites"]) or "nothing"
    out.print(f"changed: {changed} ({evidence['share']:.1%} of all parameters)", soft_wrap=True)
    out.print(f"checkpoint, plan and evidence: {output}\nreport: {output / 'repair.html'}", soft_wrap=True)


def _estimate(value: dict[str, float]) -> str:
    return f"{value['mean']:.4g} ± {value['error']:.2g}"
