"""A page that needs no network: templates, style, scripts and plotly in one file."""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lamella import formatting
from lamella.result import shown

FILTERS = ("number", "ratio", "spread", "estimate", "percent", "count", "size", "duration")


def filled(template: str | Path, data: dict[str, Any], **context: Any) -> str:
    """Fill a template.

    Args:
        template: a file of ``templates/``, or the path of a method's own, which may extend and import those.
        data: what the page's script draws, as JSON; the template gets it as ``data`` too.
        context: what only the template uses.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs  # here, since it takes long and few commands draw

    template = Path(template)
    static = {name: Markup(_read(f"page.{name}")) for name in ("css", "js")}
    rendered = (
        _templates(template.parent)
        .get_template(template.name)
        .render(data=data, plotly=Markup(get_plotlyjs()), **static, **context)
    )
    return rendered.rstrip() + "\n"


@cache  # templates are compiled once
def _templates(folder: Path) -> Any:
    """Our own templates, and those of a folder."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("lamella.report"), FileSystemLoader(folder)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formatting, name) for name in FILTERS}
    environment.filters |= {"shown": shown, "told": told}
    environment.globals["change"] = formatting.change
    return environment


def told(value: Any) -> str:
    """A description as a line: names with their values."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {told(each)}" for name, each in value.items())
    return ", ".join(map(told, value)) if isinstance(value, list) else shown(value)


def _read(name: str) -> str:
    return (resources.files("lamella.report") / "templates" / name).read_text(encoding="utf-8")


def finite(value: Any) -> Any:
    """The same document with None for every number that JSON cannot say."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
