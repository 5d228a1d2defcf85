"""Commands about models: what is there, and what their layers do."""

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
    table("Options (--set NAME=VALUE)", ["name", "default"], [[name, str(value)] for name, value in options.items()])


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to fetch; without it, the list is shown.")] = "",
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
