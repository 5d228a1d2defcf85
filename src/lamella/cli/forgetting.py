"""The command that makes a model forget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, out, print_json, table, working
from lamella.errors import MethodError


@app.command()
def forget(
    model: ModelArgument,
    forget: Annotated[
        Path,
        typer.Option(
            help="Records to forget: text parted by blank lines, else by lines; or .jsonl with a text, or a prompt and "
            "its response, in each line."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    retain: Annotated[
        list[str],
        typer.Option(
            help="The rest of the training data, or what stands for it: a file of records, or pydoc, stdlib or a "
            "datasets name. Repeat it for several."
        ),
    ] = [],  # noqa: B006
    test: Annotated[
        str | None, typer.Option(help="Text that the model never saw, for membership inference; as for --retain.")
    ] = None,
    importance: Annotated[Path | None, typer.Option(help="A stored F_D instead of measuring it on --retain.")] = None,
    save_importance: Annotated[Path | None, typer.Option(help="Keep F_D in this file, for further requests.")] = None,
    retrained: Annotated[
        str | None, typer.Option(help="A model that was trained without these records, to stand beside.")
    ] = None,
    variant: Annotated[
        str, typer.Option(help="ssd; assd, which finds alpha itself; lfssd, which uses no labels.")
    ] = "ssd",
    alpha: Annotated[
        float | None,
        typer.Option(help="How much more a weight must matter to the records than to all data; 10 when left out."),
    ] = None,
    lam: Annotated[float, typer.Option("--lambda", help="Below 1 it dampens more.")] = 1.0,
    reference: Annotated[
        str, typer.Option(help="What F_D is measured on: full (retained and forgotten records) or retain.")
    ] = "full",
    layers: Annotated[
        str,
        typer.Option(help="Change these alone, with commas: layers.3, layers.5.mlp, head; or names, *down_proj*."),
    ] = "",
    skip: Annotated[str, typer.Option(help="Leave these as they are, with commas: norm, bias.")] = "",
    batch: Annotated[
        int, typer.Option(help="Samples whose mean gradient is squared; 1 is the Fisher information.")
    ] = 1,
    max_drop: Annotated[
        float, typer.Option(help="How much perplexity on --retain may rise, as a share; above it no model is written.")
    ] = 0.05,
    sequences: Annotated[int, typer.Option(help="Sequences of a text that is no file of records.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in a sample; longer records are cut into several.")] = 128,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a language model forget some of its training records, without retraining: selective synaptic dampening.

    Weights that matter far more to the records than to all training data are scaled down, once; nothing is trained.
    How much a weight matters is its mean squared gradient, measured in one pass over --retain, which can be kept with
    --save-importance, and one over --forget. With n records of N to forget, an alpha from N/n on selects nothing, and
    is refused. If what should be kept suffers, no model is written.

    The folder gets an ordinary checkpoint with plan.json, evidence.json (forget, retain and test figures, membership
    inference, ZRF) and forget.html, which shows layer by layer what was dampened. The model itself is never changed.

    Example: lamella forget tuned --forget gone.jsonl --retain rest.jsonl --retain pydoc --test stdlib -o forgot
    lamella forget tuned --forget more.txt --importance fisher.safetensors --variant assd -o forgot
    """
    from lamella.methods.ssd.job import forget as run

    with working():
        evidence = run(
            model,
            output,
            forget=forget,
            retain=retain,
            test=test,
            importance=importance,
            save_importance=save_importance,
            retrained=retrained,
            variant=variant,
            alpha=alpha,
            lam=lam,
            reference_of=reference,
            layers=_listed("--layers", layers),
            skip=_listed("--skip", skip),
            batch=batch,
            max_drop=max_drop,
            sequences=sequences,
            length=length,
            seed=seed,
            overwrite=overwrite,
        )
    if json:
        print_json(evidence)
        return
    columns = [name for name in ("before", "after", "retrained") if name in evidence]
    rows = []
    for part, label in (("forget", "forget set"), ("retain", "retained data"), ("test", "text never seen")):
        if evidence["after"][part] is not None:
            rows.append([f"loss, {label} (nats)", *(evidence[column][part]["loss"] for column in columns)])
    for part, label in (("membership", "taken for training data"), ("zrf", "ZRF")):
        if evidence["after"][part] is not None:
            rows.append([label, *(evidence[column][part] for column in columns)])
    total = evidence["total"]
    title = (
        f"{evidence['model']['name']}: {evidence['samples']['forget']} of {evidence['samples']['reference']} samples "
        f"forgotten, {total['share']:.2%} of the weights dampened"
    )
    table(title, ["", *columns], rows)
    most: list[dict[str, Any]] = sorted(evidence["sites"], key=lambda site: -site["removed"])[:5]
    rows = [[site["name"], f"{site['share']:.2%}", f"{site['removed_share']:.2%}"] for site in most]
    table("Where most was removed", ["site", "selected", "mass removed"], rows)
    for note in evidence["notes"]:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(f"checkpoint, plan and evidence: {output}\nreport: {output / 'forget.html'}", soft_wrap=True)


def _listed(option: str, text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",")) if text.strip() else ()
    if not all(parts):
        raise MethodError(f"{option} {text}: an entry is empty; write them with single commas")
    return parts
