"""Fills the documentation with what the code and the measurements say, so that no table is typed by hand.

A page asks with a comment that stands alone on its line:

    <!-- results: finercut -->     reproductions/results/finercut.json
    <!-- benchmark: planner -->    benchmarks/results/planner.json
    <!-- figure: cstrl-retention -->  docs/assets/cstrl-retention.svg, as soon as a reproduction has drawn it
    <!-- methods -->               the registry, with what the reproductions found
    <!-- which -->                 methods by what they are for, and what each needs and leaves
    <!-- raced -->                 all methods on one model, at one target
    <!-- inputs -->                the types of data that methods take, each with an example
    <!-- families -->              the architecture table
    <!-- architectures: types -->  which types of transformers open, and what can be done with them
    <!-- commands -->              every command with its options
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

from lamella.plan import SiteModule
from lamella.plan.parts import parts_in
from lamella.registry import Method, all_commands, submodule
from lamella.registry import commands as commands_of
from lamella.results import Adapted, Edit
from lamella.results.record import FAILS, HOLDS, PREMISE, UNDECIDED, VERDICTS
from lamella.signature import kind_of
from lamella.stack import ARCHITECTURES, ASSEMBLIES, Slot

ROOT = Path(__file__).resolve().parent.parent
METHOD_PAGES = ROOT / "docs" / "methods"
SHOWN = 5  # lines of an example
ADMONITIONS = {HOLDS: "success", FAILS: "failure", UNDECIDED: "warning", PREMISE: "warning"}
SAID = {HOLDS: HOLDS, FAILS: FAILS, UNDECIDED: "is undecided", PREMISE: "is not tested, since its premise is not met"}
OTHERS = {False: "not", None: "undecided"}
MARKER = re.compile(r"^<!-- (\w+)(?:: ([\w.-]+))? -->$", re.MULTILINE)


def _readme() -> Any:
    """The script that fills the README, whose tables some pages show at length."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


README = _readme()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every method page into the navigation, so that a new method is a new page and nothing else."""
    pages = sorted(page.name for page in METHOD_PAGES.glob("[!_]*.md") if page.name != "index.md")
    section = next(entry["Methods"] for entry in config.nav or [] if "Methods" in entry)
    section[1:] = [f"methods/{page}" for page in pages]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the markers of a page."""

    def fill(match: re.Match[str]) -> str:
        name, argument = match.groups()
        if name not in FILLERS:
            raise PluginError(f"{page.file.src_path}: unknown marker '{name}'; there are: {', '.join(FILLERS)}")
        return FILLERS[name](*([argument] if argument else []))

    path = Path(page.file.src_path)
    if path.parent.name == METHOD_PAGES.name and (needs := needs_of(path.stem)):
        markdown = markdown.replace("\n## Limits\n", f"\n## What it needs\n\n{needs}\n\n## Limits\n", 1)
    return MARKER.sub(fill, markdown)


ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):(<code[^>]*>)~?")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Show names in docstrings as code, without the roles that say what they are."""
    return ROLE.sub(r"\1", html) if page.file.src_path.startswith("api/") else html


def reproduction(slug: str) -> str:
    """What the reproduction of a method measured."""
    return render(ROOT / "reproductions" / "results" / f"{slug}.json", command=f"lamella reproduce {slug}")


def benchmark(name: str) -> str:
    """What a benchmark measured."""
    return render(ROOT / "benchmarks" / "results" / f"{name}.json", command=f"python benchmarks/{name}.py")


def needs_of(slug: str) -> str:
    """What the commands of a method need at the size of published models; nothing for one that takes no decoder."""
    path = ROOT / "benchmarks" / "results" / "full_size.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))["tables"][0]
    rows = [row for row in found["rows"] if row[0].split()[0] == slug]
    if not rows:
        return ""
    said = (
        "Memory and time of a run on a published model in bfloat16, with one thread, as `--estimate` predicts them "
        "([how](../estimates.md)):"
    )
    return f"{said}\n\n{table(found['columns'], rows)}"


def figure(name: str) -> str:
    """What a reproduction has drawn, called by its own title; nothing before it has."""
    path = ROOT / "docs" / "assets" / f"{name}.svg"
    if not path.exists():
        return ""
    title = re.search("<title>(.*?)</title>", path.read_text(encoding="utf-8"))
    return f"![{title.group(1) if title else name}](../assets/{name}.svg)"


def render(path: Path, command: str) -> str:
    """One result file as Markdown: the verdict, its checks, the tables, how they came about."""
    if not path.exists():
        return f'!!! note "Not yet run"\n    `{command}` measures it and writes the tables that belong here.'
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        found, checks = result["verdict"], result["checks"]
        of_method = any("kind" in check for check in checks)  # else of a benchmark: several stand on one page
        what = "main claim" if of_method else "claim"
        verdict = f'!!! {ADMONITIONS[found]} "The {what} {SAID[found]}: {counted(checks)}"'
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        parts = [
            f"{verdict}\n    Measured by `{command}`: data {result['data']}; seed {result['seed']}; "
            f"{result['machine']}; {versions}."
        ]
        failing = [check for check in checks if not check["passed"]]
        if of_method and failing:
            parts.append("### What does not hold, or is undecided {#fails}")
            parts.append(check_table(failing))
            parts.append("### All checks")
        if checks:
            parts.append(check_table(checks))
        for part in result["tables"]:
            parts.append(f"**{part['title']}**")
            parts.append(table(part["columns"], part["rows"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(path, error, command) from error
    return "\n\n".join(parts)


def counted(checks: Sequence[dict[str, Any]]) -> str:
    """How many checks hold, and how many do not."""
    passed = [check["passed"] for check in checks]
    others = [f"{passed.count(each)} {said}" for each, said in OTHERS.items() if each in passed]
    return ", ".join([f"{passed.count(True)} of {len(passed)} checks hold", *others])


def check_table(checks: Sequence[dict[str, Any]]) -> str:
    """Checks with their verdicts, and their kinds where they have one."""
    kinds = ["kind"] if any("kind" in check for check in checks) else []
    rows = [
        [*(check[key] for key in (*kinds, "name", "expected", "measured")), VERDICTS[check["passed"]]]
        for check in checks
    ]
    return table([*map(str.capitalize, kinds), "Check", "Expected", "Measured", "Verdict"], rows)


def broken(path: Path, error: Exception, command: str) -> PluginError:
    """What to say of a result file that cannot be read."""
    return PluginError(f"{path.relative_to(ROOT)}: not a result file ({error!r}); run `{command}` again")


def method_table() -> str:
    """Every method of Lamella by purpose, with a link to its page and the verdict of its reproduction."""
    rows = [
        [_linked(known), known.summary, wanted, _paper(known), *_verdict(known)]
        for wanted, entries in README.by_purpose().items()
        for known in entries
    ]
    return table(["Method", "What it does", "For", "Paper", "Main claim", "Checks"], rows)


def which_table() -> str:
    """What each method is for, and what it needs and leaves, as its declaration and signature say; no baselines."""
    rows = []
    for wanted, entries in README.by_purpose().items():
        for first in (entry for entry in entries if not entry.baseline):
            needs = [_needed(each) for each in first.signature.inputs.values()]
            data = ", ".join(sorted({each for each in needs if each}))
            on = first.on if isinstance(first.on, str) else ", ".join(first.on)
            recipes = [each for each in commands_of(first.slug).values() if each.name and "lr" in each.options]
            rows.append([wanted, _linked(first), _training(first, recipes), data, on, _export(first)])
    return table(["You want", "Method", "Training", "Data", "Models", "Leaves"], rows)


def _needed(each: Any) -> str:
    """The type of data behind an input; nothing for models and plans."""
    kind = kind_of(each)
    return f"`{kind.__name__}`" if hasattr(kind, "source_help") else ""


def _training(first: Method, recipes: Sequence[Method]) -> str:
    if "lr" in first.options:
        return "itself" + (", then its recipe" if recipes else "")
    return "none; a recipe heals it" if recipes else "none"


def _export(known: Method) -> str:
    """What is left of a run: a plan in the form in which it can be exported, a model, or something else."""
    if known.purpose == "skip":
        return "a plan; native, run by `lamella.load`"
    if known.result == "PlanSeries":
        return "a plan; plain" if known.dense else "a plan; plain where whole layers or common widths go, else native"
    kind = known.signature.result
    if issubclass(kind, Adapted):
        return "an adapter, as a plan; native, with the model"
    if issubclass(kind, Edit):
        return "a model; native" if parts_in(submodule(known.slug, "modules"), SiteModule) else "a model; plain"
    said = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
    return said[:1].lower() + said[1:]


def raced() -> str:
    """All methods at one target."""
    return str(README.everything())


def _linked(known: Method) -> str:
    return f"[`{known.slug}`]({known.slug}.md)" if (METHOD_PAGES / f"{known.slug}.md").exists() else f"`{known.slug}`"


def _paper(known: Method) -> str:
    return f"[{known.paper}](https://arxiv.org/abs/{known.paper})" if known.paper else ""


def _verdict(known: Method) -> tuple[str, str]:
    """The verdict on the main claim, and how many checks hold, with a link to those that do not."""
    if known.baseline:
        return "baseline", ""
    if not known.reproduced:
        return "no paper", f"[measured]({known.slug}.md#measured)"
    path = ROOT / "reproductions" / "results" / f"{known.slug}.json"
    if not path.exists():
        return "not yet run", ""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        hold, *others = counted(result["checks"]).split(", ")
        linked = [f"[{', '.join(others)}]({known.slug}.md#fails)"] if others else []
        return result["verdict"], ", ".join([hold, *linked])
    except (ValueError, KeyError, TypeError) as error:
        raise broken(path, error, f"lamella reproduce {known.slug}") from error


def family_table() -> str:
    """Every architecture of the table with its addresses, then the models with several stacks."""
    rows = [
        [f"`{each.name}`", each.stack, f"`{each.prefix}N`", f"`{each['attn'].out}`", f"`{each['mlp'].out}`"]
        for each in ARCHITECTURES.values()
    ]
    for assembly in ASSEMBLIES.values():
        for each in assembly.stacks:
            if isinstance(each, Slot):
                place = each.inside or each.changes["base"]
                rows.append([f"`{assembly.name}`", f"as `{each.config}` says", f"`{place}`", "", ""])
            else:
                where = [f"`{each.prefix}N`", f"`{each['attn'].out}`", f"`{each['mlp'].out}`"]
                rows.append([f"`{assembly.name}`", each.stack, *where])
    return table(["Architecture (`model_type`)", "Stack", "Layer N", "Attention writes with", "MLP writes with"], rows)


OPENED = {"entry": "by an entry", "derived": "derived, proved"}


def architecture_table(part: str) -> str:
    """Every type of transformers of one part: how it opens and what can be done with it, or why it does not open.

    Args:
        part: ``types``, those with a causal class, or ``with_images``, those that read images beside text.
    """
    path = ROOT / "docs" / "architectures.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = sorted(found[part], key=lambda row: row["type"].lower())
        good = [row for row in rows if row["decodes"]]
        counts = {opens: sum(row["opens"] == opens for row in good) for opens in OPENED}
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        said = (
            f"**{len(good)} of {len(rows)}** open, compose to the bit, and decode right with one attention and one MLP "
            f"removed: {counts['entry']} by an entry, {counts['derived']} derived. Measured by `make architectures` in "
            f"{sum(row['seconds'] for row in rows):.0f} s of one core, with {versions}. Of "
            f"{sum(row['experts'] for row in good)} the experts are known: only those that a token uses count as work."
        )
        shown = [
            [f"`{row['type']}`", OPENED[row["opens"]], row["sublayers"], ", ".join(row["forms"]),
             "yes" if row["width"] else "", "yes" if row["experts"] else "",
             "; ".join(f"{form}: {why}" for form, why in row["refused"].items())]
            for row in good
        ]  # fmt: skip
        rest = [[f"`{row['type']}`", _reason(row["why"])] for row in rows if not row["decodes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(path, error, "make architectures") from error
    columns = ["Type", "Opens", "Layers", "Exports", "Width", "Experts", "What is refused, and why"]
    return "\n\n".join([said, table(columns, shown), "What is left:", table(["Type", "Why"], rest)])


def _reason(why: str) -> str:
    """Why a type does not open, without the message around it, which shows how to add an entry."""
    inside = re.search(r"cannot be derived \((.*?)\)(;|$)", why)
    return inside[1] if inside else why.split(": add an entry")[0]


def input_examples() -> str:
    """Every type of data that some method takes: what it can be opened from, and the smallest example."""
    kinds: dict[Any, list[str]] = {}
    for slug, known in all_commands().items():
        for kind in {kind_of(each) for entry in known.values() for each in entry.signature.inputs.values()}:
            if hasattr(kind, "example"):
                kinds.setdefault(kind, []).append(slug)
    parts = []
    for kind in sorted(kinds, key=lambda each: each.__name__):
        example = kind.example
        lines = (example.content or "").splitlines()
        shown = [f"{example.source}:" if lines else example.source, *lines[:SHOWN], *(["..."] if lines[SHOWN:] else [])]
        parts.append(f"**{kind.__name__}** ({', '.join(f'`{slug}`' for slug in kinds[kind])}): {kind.source_help}.")
        parts.append("\n".join(["```text", *shown, "```"]))
    return "\n\n".join(parts)


def commands() -> str:
    """The reference of the command line, from its own help texts."""
    describe = ["--app", "app", "lamella.cli", "utils", "docs", "--name", "lamella"]
    done = subprocess.run([sys.executable, "-m", "typer", *describe], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise PluginError(f"typer could not describe lamella.cli: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.partition("\n")[2].strip()  # without the title: the page has its own


def table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table.

    Raises:
        ValueError: for a row that is longer or shorter than the header.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"the row {row} has {len(row)} cells, the table {len(columns)} columns")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


FILLERS: dict[str, Callable[..., str]] = {
    "results": reproduction,
    "benchmark": benchmark,
    "figure": figure,
    "methods": method_table,
    "which": which_table,
    "raced": raced,
    "inputs": input_examples,
    "families": family_table,
    "architectures": architecture_table,
    "commands": commands,
}
