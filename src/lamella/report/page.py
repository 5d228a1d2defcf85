"""Self-contained HTML pages: templates, style, scripts and figures in one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lamella import formatting
from lamella.report.drawing import StackDrawing
from lamella.report.figures import Axes, Figure
from lamella.report.plotting import plotted
from lamella.result import shown

FILTERS = ("number", "ratio", "spread", "estimate", "percent", "count", "size", "duration")


def render_page(
    template: str | Path, figures: Mapping[str, Figure], data: Mapping[str, Any] | None = None, **context: Any
) -> str:
    """Render a template.

    Args:
        template: a file of ``templates/``, or the path of a method's own, which may extend and import those.
        figures: by their identifiers. Those with data are the template's ``figures``, shown by the macro ``figure`` of
            ``parts.html``. Plotly's script is included only if one of them is a plot.
        data: further data for the page's scripts, as JSON; also available in the template as ``data``.
        context: variables that only the template uses.
    """
    from markupsafe import Markup

    template = Path(template)
    drawn = {name: each for name, each in figures.items() if not each.is_empty}
    plots = {name: plotted(each).to_plotly_json() for name, each in drawn.items() if isinstance(each, Axes)}
    scripts = {"css": Markup(_read("page.css")), "js": Markup(_read("page.js")), "plotly": ""}
    if plots:
        scripts |= {"plotly": Markup(_plotly()), "plots": Markup(_read("plots.js"))}
    scores = next((each.scores for each in drawn.values() if isinstance(each, StackDrawing)), {})
    page_data = finite(dict(data or {}) | {"plots": plots, "scores": scores})
    rendered = _templates(template.parent).get_template(template.name)
    return str(rendered.render(data=page_data, figures=drawn, **scripts, **context)).rstrip() + "\n"


@cache  # templates are compiled once
def _templates(folder: Path) -> Any:
    """Return the environment of our templates and those of a folder."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("lamella.report"), FileSystemLoader(folder)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formatting, name) for name in FILTERS}
    environment.filters |= {"shown": shown, "flat": flat}
    environment.globals["change"] = formatting.change
    return environment


def flat(value: Any) -> str:
    """Return a description as one line: names with their values."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {flat(each)}" for name, each in value.items())
    return ", ".join(map(flat, value)) if isinstance(value, list) else shown(value)


def _plotly() -> str:
    """Return plotly's script, of several megabytes."""
    from plotly.offline import get_plotlyjs  # imported here because it is slow and few commands need it

    script: str = get_plotlyjs()
    return script


def _read(name: str) -> str:
    return (resources.files("lamella.report") / "templates" / name).read_text(encoding="utf-8")


def finite(value: Any) -> Any:
    """Return the same document with None for every number that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
