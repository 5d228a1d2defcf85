"""The command that trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, SeedOption, out, print_json, print_summary, table, working
from lamella.cli.groups import with_fields
from lamella.errors import MethodError


@dataclass(frozen=True)
class What:
    """What to train on."""

    text: Annotated[
        str,
        typer.Option(
            help="Text to train on: pydoc, stdlib, a file or a datasets name. For a model that reads images "
            "also rows of images with text: a .jsonl file, or shapes."
        ),
    ] = "pydoc"
    sequences: Annotated[int | None, typer.Option(help="Blocks of training text, or rows; 64 when left out.")] = None
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256
    replay_text: Annotated[
        str | None, typer.Option(help="Text like that which the model was trained on, to replay a share of.")
    ] = None
    select: Annotated[
        str | None,
        typer.Option(
            help="paser: train on those samples of --text, a .jsonl file of instructions, that show what the plan has "
            "damaged; selection.json says why."
        ),
    ] = None
    keep: Annotated[float, typer.Option(help="Share of the samples that --select chooses.")] = 0.2


@dataclass(frozen=True)
class How:
    """How to train; what is left out is the recipe's own."""

    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the recipe's own number when left out.")] = None
    minutes: Annotated[
        float | None, typer.Option(help="How long to train, in place of --steps; where a teacher is learnt from.")
    ] = None
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; the recipe's own when left out.")] = None
    batch: Annotated[int | None, typer.Option(help="Blocks in one step; the recipe's own when left out.")] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="rewarm (the default): warm up, decay to a tenth. infinite: also cool down, stay, then anneal. wsd: "
            "warm up, stay, anneal. step: stay, then a tenth. cosine: down to 0. constant."
        ),
    ] = None
    replay: Annotated[
        str | None, typer.Option(help="Share of every batch that is replayed, such as 0.05; auto measures the shift.")
    ] = None
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank; all parameters when left out.")] = None
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Split the model over the processes of accelerate launch, when it does not fit one device."
        ),
    ] = False

    @property
    def options(self) -> dict[str, Any]:
        """What was given, as the recipe takes it."""
        given = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        if {"minutes", "steps"} <= given.keys():
            raise MethodError("--minutes and --steps both say how long to train: leave one out")
        return given | ({"replay": _share(self.replay)} if self.replay is not None else {})


@app.command()
@with_fields
def heal(
    model: ModelArgument,
    what: What,
    how: How,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="What the model runs under; the whole model when left out.")
    ] = None,
    test: Annotated[
        str,
        typer.Option(
            help="Text to measure on, better of another kind. Of images with text, other rows of "
            "--text where a text is named here."
        ),
    ] = "stdlib",
    budget_tokens: Annotated[
        int | None, typer.Option(help="Instead of --sequences and --steps: one pass over this many tokens of the text.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A model to learn from, such as the original of a checkpoint that was cut before."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="kd: the divergence from the teacher's output (default with --teacher, and for images). "
            "kd+hidden: states inside too. ce: the text alone."
        ),
    ] = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Train back what a plan cost, or train a model on.

    unified-skip tunes all but the embedding, first adds LoRA beside its routers, lora-drop trains its corrections
    alone, rd-prune trains everything and holds its masks. Every other plan, and a model without plan, is trained on by
    continual pre-training, to which --replay belongs, and on images with text by distillation; --schedule and --lora
    serve distillation, too. Killed, the same command goes on from the last checkpoint with the same result. The folder
    gets the checkpoint with its plan, the evidence before and after, and heal.html with the loss curve. Several
    processes share the work under `accelerate launch -m lamella.cli heal`.

    Example: lamella heal smollm2 plan.json --replay-text stdlib --steps 200 -o healed
    lamella heal small --teacher smollm2 --loss kd --text general --lora 128 --lr 2e-3 --minutes 8 -o healed
    lamella heal smollm2 plan.json --text alpaca.jsonl --select paser --keep 0.1 -o healed
    """
    from lamella.jobs.heal import Material
    from lamella.jobs.heal import heal as run
    from lamella.plan import Plan

    options, sequences = how.options, what.sequences or 64
    if budget_tokens is not None:
        if any(each is not None for each in (how.steps, how.minutes, what.sequences)):
            raise MethodError("--budget-tokens says how long to train: leave --steps, --minutes and --sequences out")
        options["batch"] = how.batch or 4
        options["steps"] = max(1, budget_tokens // (options["batch"] * what.length))
        sequences = options["steps"] * options["batch"]
    with working():
        evidence = run(
            model,
            None if plan_file is None else Plan.read(plan_file),
            output,
            material=Material(**asdict(what) | {"sequences": sequences}),
            test=test,
            teacher=teacher,
            loss=loss,
            seed=seed,
            overwrite=overwrite,
            options=options,
        )
    if json:
        print_json(evidence)
        return
    before, after = evidence["before"], evidence["after"]
    rows = [
        [label, *(f"{part[name]['mean']:.4g} ± {part[name]['error']:.2g}" for part in (before, after))]
        for name, label in (("perplexity", "perplexity"), ("kl", "KL (nats)"), ("top1", "same top token"))
    ]
    for name, source in {"new": what.text, "old": what.replay_text}.items():
        held_out = [point[name] for point in evidence["held_out"] if name in point]
        if held_out:
            rows.append([f"held-out loss, {source}", f"{held_out[0]:.4g}", f"{held_out[-1]:.4g}"])
    table(
        f"{evidence['model']} with {evidence['method']}, on {evidence['data']['test']['data']}",
        ["", "before", "after"],
        rows,
    )
    if past := evidence["settings"].get("replay"):
        out.print(f"replayed: {past['fraction']:.0%} of every batch, from {what.replay_text}", soft_wrap=True)
    out.print(f"checkpoint, plan and evidence: {output}\nreport: {output / 'heal.html'}", soft_wrap=True)


def _share(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"--replay {text}: give a share of every batch, such as 0.05, or auto") from None


@app.command()
def compare(
    model: ModelArgument,
    new: Annotated[str, typer.Option(help="Text to learn: pydoc, stdlib, general, a file or a datasets name.")],
    old: Annotated[list[str], typer.Option(help="Text that the model knows, which is not trained on; repeat it.")] = [  # noqa: B006
        "pydoc"
    ],
    methods: Annotated[
        str | None,
        typer.Option("--with", help="Methods, with commas: all that adapt a model to a text when left out."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the longest run.")] = 64,
    batch: Annotated[int, typer.Option(help="Windows of text in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    rates: Annotated[
        str | None,
        typer.Option(
            help="Learning rates to try, with commas; the best on further windows is shown. Its own if left out."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write: evidence.json, report.html and a card.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """What methods that adapt a model learn of one text by the same tokens, and what each forgets.

    Each is trained from the original for a quarter, half and all of the steps, so that the report draws its way: how
    far the loss on the new text falls, and how far the loss on old texts rises. An interrupted comparison goes on.

    Example: lamella compare smollm2 --new manual.txt --old pydoc --with lora,layra,smora -o compared
    """
    from lamella.jobs.compare import compare as run
    from lamella.jobs.compare import summary

    names = [] if methods is None else [name for name in methods.split(",") if name]
    tried = [] if rates is None else [_number(rate) for rate in rates.split(",")]
    with working():
        evidence = run(
            model,
            new,
            output,
            old=old,
            names=names,
            steps=steps,
            batch=batch,
            length=length,
            rates=tried,
            seed=seed,
            overwrite=overwrite,
        )
    if json:
        print_json(evidence.model_dump(by_alias=True))
        return
    print_summary(summary(evidence), evidence.notes)
    if output is not None:
        out.print(f"report: {output / 'report.html'}", soft_wrap=True, highlight=False)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"--rates {text}: give numbers with commas, such as 1e-4,3e-4") from None
