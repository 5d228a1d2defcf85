"""Commands about models: what is there, and what their layers do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, ModelArgument, PickleOption, SeedOption, out, print_json, table, working
from lamella.registry import get_method
from lamella.registry import methods as all_methods


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(help="Show one method with its options.")] = None,
    json: JsonOption = False,
) -> None:
    """List the methods, or show one with its options and their defaults."""
    import inspect

    if slug is None:
        rows = [
            [m.slug, m.purpose, "baseline" if m.baseline else "", m.paper or "", m.summary]
            for m in all_methods().values()
        ]
        if json:
            print_json([dict(zip(("slug", "purpose", "role", "paper", "summary"), row, strict=True)) for row in rows])
        else:
            table("Methods", ["slug", "for", "", "arXiv", "what it does"], rows)
        return
    entry = get_method(slug)
    options = {name: p.default for name, p in entry.options.items()}
    if json:
        print_json(
            {name: getattr(entry, name) for name in ("slug", "title", "purpose", "paper")} | {"options": options}
        )
        return
    out.print(f"[bold]{entry.slug}[/bold]  {entry.title}" + (f"  (arXiv {entry.paper})" if entry.paper else ""))
    out.print(inspect.getdoc(entry.call), markup=False, highlight=False)
    table("Options (--set NAME=VALUE)", ["name", "default"], [[name, str(value)] for name, value in options.items()])


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="What to fetch; without it, the list is shown.")] = "",
    json: JsonOption = False,
) -> None:
    """Fetch a zoo model or text into the cache, once; it needs the network only then.

    The cache is ~/.cache/lamella; set LAMELLA_CACHE to move it.
    """
    from lamella.zoo import ZOO
    from lamella.zoo import pull as fetch

    if not name:
        rows = [[entry.name, entry.kind, f"{entry.download} MB", entry.description] for entry in ZOO.values()]
        if json:
            print_json([dict(zip(("name", "kind", "download", "description"), row, strict=True)) for row in rows])
        else:
            table("The zoo", ["name", "kind", "download", "what it is"], rows)
        return
    folder = fetch(name)
    print_json({"name": name, "folder": str(folder)}) if json else out.print(f"{name} is in {folder}", soft_wrap=True)


@app.command()
def inspect(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the page depth.html and depth.json here.")
    ] = None,
    text: Annotated[str, typer.Option(help="Text to measure on: pydoc, stdlib, a file or a datasets name.")] = "pydoc",
    sequences: Annotated[int, typer.Option(help="How many sequences of 256 tokens.")] = 4,
    brief: Annotated[
        bool, typer.Option("--brief", help="Leave out what takes minutes: who misses each layer, and who reads it.")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="A second model, often a deeper one, with the same tokenizer: linear maps to it.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Look at a model layer by layer: what each layer and sublayer does, and what removing it alone would cost.

    Block influence (how far a layer turns the stream), stream norms, angular distances between layers, and the
    Jensen-Shannon divergence of the output when one layer or one sublayer is left out. Higher means it matters more.

    Then the study of Csordas et al.: how large what a layer adds is and which way it points, what the head would say
    half-way (logit lens), which later layers and tokens miss a layer, and how many layers hold nine tenths of what
    layers do for one another. The page draws them all.

    Example: lamella inspect smollm2 -o depth
    """
    from lamella.methods.depth_efficiency import depth_report

    with working():
        report = depth_report(
            model,
            text=text,
            sequences=sequences,
            seed=seed,
            study=not brief,
            compare=compare,
            output=output,
            allow_pickle=allow_pickle,
        )
    if json:
        print_json(report)
        return
    scores = report["scores"]
    without = iter(scores["sublayer_removed"]["values"])
    rows = [
        [
            layer,
            scores["block_influence"]["values"][layer],
            scores["stream_norm"]["values"][layer],
            *(next(without), next(without)),
            scores["layer_removed"]["values"][layer],
        ]
        for layer in range(report["model"]["layers"])
    ]
    columns = ["layer", "block influence", "norm before", "without attn", "without mlp", "without layer"]
    table(f"{report['model']['name']}: depth report (last three: output JSD, nats)", columns, rows)
    if study := report.get("study"):
        profile, future = study["profile"], study["skip_future"]
        parts = (profile["ratio_layer"], profile["cosine_layer"], profile["lens_kl"], future["output_mean"])
        rows = [[layer, *(part["values"][layer] for part in parts)] for layer in range(report["model"]["layers"])]
        columns = ["layer", "adds / stream", "cosine", "lens KL before", "later tokens without it"]
        table("What layers add, and what later tokens lose (distance of probabilities)", columns, rows)
        turning = "at no layer" if study["turning"] is None else f"at layer {study['turning']}"
        out.print(
            f"nine tenths of what layers do for later ones: in the first {study['effective_depth']} layers\n"
            f"the logit lens closes in from point {study['refinement']} on; layers turn to amplifying {turning}",
            soft_wrap=True,
        )
    if maps := report.get("maps"):
        out.print(
            f"linear maps to {maps['target']}: best at a relative depth {maps['offset']:.2f} away, "
            f"rank correlation {maps['correlation']:.2f}",
            soft_wrap=True,
        )
    if output:
        out.print(f"page: {output / 'depth.html'}", soft_wrap=True)
