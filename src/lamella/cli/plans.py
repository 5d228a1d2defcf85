"""Commands that make plans, carry them out and export the result."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lamella import formatting
from lamella.cli.app import app
from lamella.cli.console import (
    STACK_HELP,
    JsonOption,
    ModelArgument,
    PickleOption,
    SeedOption,
    SetOption,
    out,
    print_json,
    read_options,
    table,
    working,
)
from lamella.cli.groups import with_fields
from lamella.errors import LamellaError, MethodError, PlanError
from lamella.registry import get_method
from lamella.report import tasks as task_table
from lamella.report import variants

HEALING = "Healing"
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
FormOption = Annotated[
    str,
    typer.Option(
        help="plain: an ordinary checkpoint (whole layers, common widths). portable: the same function everywhere, "
        "single sublayers zeroed. native: all cuts, with its own modelling file; plans that skip while generating run "
        "when lamella.load opens it. auto: plain where it can, else native."
    ),
]


@dataclass(frozen=True)
class Cutting:
    """What to cut, and by what it is judged."""

    speedup: Annotated[
        float, typer.Option(help="Decode speed-up to reach at batch 1; 1.3 is 30 % more tokens a second.")
    ] = 1.3
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Minutes for which each search may compare. Left out: 2 for the default method, no limit for another."
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="A planning method, or 'all' to run them all and draw the Pareto front. Left out: portfolio, "
            "which cuts whole layers and exports as a plain checkpoint.",
            show_default=False,
        ),
    ] = None
    set_: SetOption = field(default_factory=list)
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to plan on: pydoc, stdlib, a file or a datasets name. For a model that reads images also rows "
            "of images with text: a .jsonl file, or shapes."
        ),
    ] = "pydoc"
    test: Annotated[
        str,
        typer.Option(
            help="What to measure on; its split never overlaps the calibration. Images are measured on other rows of "
            "theirs where a built-in text is named."
        ),
    ] = "pydoc"


@dataclass(frozen=True)
class Mending:
    """How what was cut is healed."""

    heal: Annotated[
        str,
        typer.Option(
            help="auto: train back what the cut cost, by distillation from the original, or by the method's own recipe "
            "where it decides while the model runs. recipe: its own, or continual pre-training. none: do not.",
            rich_help_panel=HEALING,
        ),
    ] = "auto"
    no_heal: Annotated[bool, typer.Option("--no-heal", help="The same as --heal none.", rich_help_panel=HEALING)] = (
        False
    )
    heal_minutes: Annotated[float, typer.Option(help="How long distillation may train.", rich_help_panel=HEALING)] = 8.0
    heal_steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps, in place of --heal-minutes or a recipe's own number: repeatable to the bit.",
            rich_help_panel=HEALING,
        ),
    ] = None
    heal_text: Annotated[
        str | None,
        typer.Option(
            help="Text to heal with, or rows of images; when left out built-in text of many kinds (general), or what "
            "was planned on where that holds images.",
            rich_help_panel=HEALING,
        ),
    ] = None


@app.command()
@with_fields
def compress(
    model: ModelArgument,
    output: OutputOption,
    cutting: Cutting,
    mending: Mending,
    form: FormOption = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Also write the result in 8 bits: q8_0, a GGUF file for llama.cpp; or int8, a folder for torch. The "
            "report compares cutting with quantising in any case."
        ),
    ] = None,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            metavar="NAME",
            help="Also score all models on these, such as definitions; see lamella eval. Needs the extra eval.",
        ),
    ] = [],  # noqa: B006
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """The main job: plan, apply, measure, heal, export, report.

    Searches the smallest cut that reaches the speed-up in the cost model, verifies it by measurement, and writes the
    checkpoint with plan.json, evidence.json, a model card and report.html. An interrupted run goes on where it was.
    """
    from lamella.jobs.compress import DEFAULT_METHOD
    from lamella.jobs.compress import compress as run
    from lamella.jobs.mend import Healing

    chosen = get_method(cutting.method or DEFAULT_METHOD) if cutting.method != "all" else None
    options = {} if chosen is None else read_options(chosen, cutting.set_)
    way = "none" if mending.no_heal else mending.heal
    _check_form(form, "auto")
    with working():
        evidence = run(
            model,
            output,
            speedup=cutting.speedup,
            minutes=cutting.minutes,
            method=cutting.method,
            options=options,
            calibration=cutting.calibration,
            test=cutting.test,
            form=form,
            heal=Healing(way, mending.heal_minutes, mending.heal_steps, mending.heal_text),
            quantize=quantize,
            tasks=[name for given in tasks for name in given.split(",") if name],
            seed=seed,
            overwrite=overwrite,
        )
    if json:
        print_json(evidence)
        return
    print_evidence(evidence)
    out.print(f"checkpoint, plan and evidence: {output}\nreport: {output / 'report.html'}", soft_wrap=True)
    if quantised := evidence.get("quantised"):
        said = f"not written, {quantised['refused']}" if "refused" in quantised else str(output / quantised["output"])
        out.print(f"{quantised['form']}: {said}", soft_wrap=True)


def print_evidence(evidence: dict[str, Any], console: Console = out) -> None:
    """Print what was gained and lost, and the methods side by side where there are several."""
    chosen, base = evidence["chosen"], evidence["base"]
    fidelity = chosen["fidelity"]
    before, after = base["timings"], chosen["timings"]
    whole = {"perplexity": f"{fidelity['base_perplexity']['mean']:.2f}"}
    rows = [
        ["parameters", f"{base['cost']['parameters'] / 1e6:.1f} M", f"{chosen['cost']['parameters'] / 1e6:.1f} M"],
        ["sublayers a token runs", f"{base['cost']['sublayers']:g}", f"{chosen['cost']['sublayers']:g}"],
        ["cache per token", f"{base['cost']['kv_bytes_per_token']} B", f"{chosen['cost']['kv_bytes_per_token']} B"],
        *([name, whole.get(name, ""), value] for name, value in _quality(fidelity).items()),
    ]
    for old, new in zip(before, after, strict=True):
        for what in ("decode", "prefill"):
            ratio = new[f"{what}_speedup"]
            seconds = "decode_seconds_per_step" if what == "decode" else "prefill_seconds"
            speed = f"{new[seconds] * 1e3:.1f} ms  ({ratio['median']:.2f}x, {ratio['low']:.2f}-{ratio['high']:.2f})"
            rows.append([f"{what}, batch {old['batch']}", f"{old[seconds] * 1e3:.1f} ms", speed])
    title = f"{evidence['model']['name']} with {chosen['method']}: predicted {chosen['predicted_speedup']:.2f}x"
    columns = ["", "original", "changed"]
    if "healing" in evidence:  # training changes what the model says, not its shape or speed
        columns = ["", "original", "cut", "healed"]
        healed = _quality(evidence["healing"]["fidelity"])
        rows = [[*row, healed.get(row[0], "")] for row in rows]
        for other in evidence["healing"].get("unseen", ()):
            kls = [f"{other['fidelity'][when]['kl']['mean']:.4f} nats" for when in ("cut", "healed")]
            rows.append([f"KL on {other['text']['data']}", "", *kls])
    table(title, columns, rows, console)
    if found := task_table.rows(evidence):
        table("Tasks, ± standard error", task_table.columns(evidence), found, console)
    if beside := variants.rows(evidence):
        table("Beside quantisation", list(variants.COLUMNS), beside, console)
    if chosen.get("narrower"):
        console.print(f"left of each layer: {chosen['narrower']}", soft_wrap=True)
    if len(evidence["curves"]) > 1:
        methods = []
        for curve in evidence["curves"]:
            point = next(point for point in curve["points"] if point["chosen"])
            speed, kl, words = point["measured_speedup"], point["fidelity"]["kl"], point["fidelity"]["perplexity"]
            front = "yes" if point["pareto"] else ""
            quality = [f"{kl['mean']:.4f}", f"{words['mean']:.2f}", f"{point['fidelity']['top1']['mean']:.1%}"]
            speeds = [f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})"]
            methods.append(
                [
                    curve["method"],
                    f"{point['sublayers_removed']:g}",
                    *speeds,
                    *quality,
                    front,
                    f"{curve['seconds']:.0f} s",
                ]
            )
        columns = ["method", "sublayers gone", "decode speed-up", "KL", "perplexity", "same top", "Pareto", "search"]
        table(f"All methods at a target of {evidence['target_speedup']:g}", columns, methods, console)
    for note in evidence["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _quality(fidelity: dict[str, Any]) -> dict[str, str]:
    return {
        "perplexity": f"{fidelity['perplexity']['mean']:.2f}",
        "same top token": f"{fidelity['top1']['mean']:.1%}",
        "KL from the original": f"{fidelity['kl']['mean']:.4f} nats",
    }


@dataclass(frozen=True)
class Calibration:
    """What a plan is made on."""

    data: Annotated[
        str,
        typer.Option(
            help="Calibration text: pydoc, stdlib, a file or a datasets name. For a model that reads images also rows "
            "of images with text: a .jsonl file, or shapes."
        ),
    ] = "pydoc"
    sequences: Annotated[int, typer.Option(help="Calibration sequences, or rows.")] = 4
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256


@app.command()
@with_fields
def plan(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method; `lamella methods` lists them.")],
    model: ModelArgument,
    calibration: Calibration,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the plan (JSON); the screen when left out.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of all sublayers to remove; picks that plan of the series.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Decode speed-up to reach in the cost model; picks that plan.")
    ] = None,
    series: Annotated[bool, typer.Option("--series", help="Write the whole series instead of one plan of it.")] = False,
    of_stack: Annotated[str | None, typer.Option("--stack", help=STACK_HELP)] = None,
    set_: SetOption = [],  # noqa: B006
    seed: SeedOption = 0,
    json: JsonOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Make a plan with one method.

    Without --ratio or --speedup the last plan of the method's series is taken.
    Example: lamella plan finercut smollm2 --ratio 0.2 -o plan.json
    """
    from lamella.evaluate import Budget, measure_step
    from lamella.jobs.checks import check_input, check_source
    from lamella.jobs.held_out import reader_for
    from lamella.jobs.planning import first_reaching, make_plan, planned_on
    from lamella.stack import Stack
    from lamella.zoo import open_for

    entry = get_method(method)
    options = read_options(entry, set_)
    if output is not None and not output.parent.is_dir():  # before the work, not after it
        raise PlanError(f"{output}: there is no folder {output.parent}; make it, or choose another file")
    if ratio is not None and speedup is not None:
        raise PlanError("--ratio and --speedup both pick a plan of the series: give one of them")
    if ratio is not None and not 0 <= ratio < 1:
        raise PlanError(f"--ratio {ratio:g}: give the share of sublayers to remove, from 0 to below 1")
    if speedup is not None and not speedup >= 1:
        raise PlanError(f"--speedup {speedup:g}: it is a ratio to the speed of the whole model, from 1 on")
    with working():
        check_input((Stack,), model, allow_pickle=allow_pickle)
        entry.signature.gathered(method, options)
        if entry.text or entry.samples:
            check_source(calibration.data)
        stack = open_for(entry, model, stack=of_stack, allow_pickle=allow_pickle)
        data: Any = None
        if entry.text or entry.samples:
            count, length = calibration.sequences, calibration.length
            reader = reader_for(stack, model, seed)
            data = planned_on(stack, reader, calibration.data, sequences=count, length=length, rows=count)
        times = measure_step(stack) if speedup is not None else None
        until = (lambda gone: times.speedup_without(gone, len(stack)) >= speedup) if times and speedup else None
        budget = Budget(remove=ratio, until=until)
        made = make_plan(method, stack, data, **entry.signature.completed(options, budget, seed=seed))
        made.provenance |= {"data": data and data.describe(), "seed": seed}
        index = len(made) - 1 if times is None or speedup is None else first_reaching(made, times, speedup)
        chosen = made.at_ratio(ratio) if ratio is not None else made[index]
    document = made if series else chosen
    if output is not None:
        document.write(output)
    if json or output is None:
        print(document.dump(), end="")
    else:
        said = (
            f"{formatting.counted(len(made), 'plan')} in the series" if series else f"{chosen.effect}{_masked(chosen)}"
        )
        out.print(f"{output}: {said}", soft_wrap=True)


def _masked(plan: Any) -> str:
    return f", {plan.masked} weights masked" if plan.masked else ""


@app.command()
def apply(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    model: ModelArgument,
    output: OutputOption,
    form: FormOption = "auto",
    out_of_core: Annotated[
        bool, typer.Option("--out-of-core", help="Copy from disk to disk instead of loading (plain form).")
    ] = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Carry a plan out and export the checkpoint.

    --out-of-core writes a plain checkpoint from a folder of any size with a small, constant amount of memory.
    Example: lamella apply plan.json smollm2 -o small --form native
    """
    from lamella.files import check_free
    from lamella.jobs.checks import check_input
    from lamella.plan import Plan
    from lamella.plan.export import export, export_out_of_core, natural_form
    from lamella.stack import Stack
    from lamella.zoo import open_model, open_processor, resolve

    _check_form(form, "auto")
    chosen = Plan.read(plan_file)
    actual = natural_form(chosen) if form == "auto" else form
    check_free(output, overwrite)
    with working():
        check_input((Stack,), model, allow_pickle=allow_pickle)
        if out_of_core:
            folder = resolve(model)
            if actual != "plain" or not isinstance(folder, Path):
                raise PlanError("--out-of-core writes the plain form, from a local folder or zoo name")
            export_out_of_core(folder, chosen, output, overwrite=overwrite)
        else:
            opened = open_model(model, allow_pickle=allow_pickle)
            reader = _tokenizer(open_processor, opened.path or model)
            export(opened, chosen, output, form=actual, overwrite=overwrite, tokenizer=reader)
    if json:
        print_json({"output": str(output), "form": actual, "sublayers_removed": chosen.removed})
        return
    gone = f"{chosen.effect}{_masked(chosen)}"
    if not chosen.is_static:
        gone += "; they are skipped when lamella.load opens it, and plain transformers would run the whole model"
    if chosen.adapters:
        gone += "; its adapters run when lamella.load opens it, and plain transformers would leave them out"
    out.print(f"{output}: {actual} checkpoint, {gone}", soft_wrap=True)


def _tokenizer(opener, place):  # type: ignore[no-untyped-def]
    """A checkpoint without a tokenizer is exported without one."""
    try:
        return opener(place)
    except LamellaError:
        return None


def _check_form(form: str, *more: str) -> None:
    forms = ("plain", "portable", "native", *more)
    if form not in forms:
        raise MethodError(f"unknown form '{form}'; known are {', '.join(forms)}")


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="int8: the folder to write. Else the file, which ends in .gguf.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="q8_0: a GGUF file for llama.cpp, 8 bits a weight; bf16, f16 or f32: the same in more. int8: a folder "
            "for torch, which needs the extra quantize."
        ),
    ] = "q8_0",
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint in fewer bits: a GGUF file for llama.cpp, or int8 for torch.

    Takes what `compress` and `apply` wrote as plain checkpoints, too: cut first, then quantise.
    Example: lamella quantize small --to q8_0 -o small.gguf
    """
    from lamella.jobs.quantize import quantize as run

    with working():
        report = run(model, output, to=to, overwrite=overwrite)
    if json:
        print_json(report)
        return
    before, after = (formatting.size(report[when]) for when in ("before", "after"))
    out.print(f"{output}: {to}, {after} where the checkpoint's weights take {before}", soft_wrap=True)


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="A method with a reproduction.")],
    quick: Annotated[bool, typer.Option("--quick", help="The same claims on less work, under a minute.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what a stopped run has found.")] = False,
    json: JsonOption = False,
) -> None:
    """Run the reproduction of a published method and check its claims; exits with 1 when one fails.

    It does so too when the main claim is undecided: within the noise of what was measured.

    A full run takes ten minutes to two hours; how long, and what it shows, stands at the top of its script. Stopped and
    started again it goes on: what is finished lies in the cache folder until the results are written. A change of the
    code measures anew. Works in a checkout of the project, where reproductions/ is.
    """
    import subprocess
    import sys

    script = Path("reproductions") / f"{slug.replace('-', '_')}.py"
    if not script.is_file():
        known = sorted(file.stem.replace("_", "-") for file in Path("reproductions").glob("*.py"))
        where = (
            f"there are {', '.join(known)}" if known else "run it in a checkout of the project, where reproductions/ is"
        )
        raise MethodError(f"no reproduction of '{slug}' here; {where}")
    flags = [*(["--quick"] if quick else []), *(["--fresh"] if fresh else [])]
    done = subprocess.run([sys.executable, str(script), *flags], check=False, stdout=sys.stderr if json else None)
    if json:
        results = Path("reproductions/results") / f"{slug}{'-quick' if quick else ''}.json"
        print_json(json_module.loads(results.read_text(encoding="utf-8")))
    raise typer.Exit(done.returncode)
