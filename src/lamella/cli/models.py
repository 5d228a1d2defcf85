"""The list of methods, and the options of each."""

from __future__ import annotations

from typing import Annotated

import typer

from lamella.cli.app import app
from lamella.cli.console import JsonOption, out, print_json, table
from lamella.registry import get_method
from lamella.registry import methods as all_methods


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(metavar="SLUG", help="Show one method with its options.")] = None,
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
    options = {name: p.default for name, p in entry.declared.options.items()}
    if json:
        print_json(
            {name: getattr(entry, name) for name in ("slug", "title", "purpose", "paper")} | {"options": options}
        )
        return
    out.print(f"[bold]{entry.slug}[/bold]  {entry.title}" + (f"  (arXiv {entry.paper})" if entry.paper else ""))
    out.print(inspect.cleandoc(entry.doc), markup=False, highlight=False)
    table("Options", ["name", "default"], [[name, str(value)] for name, value in options.items()])
