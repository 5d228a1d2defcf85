"""Fill the README from the registry and the committed results, so that no list or value in it is edited by hand.

Generated parts are between a marker such as ``<!-- methods -->`` and ``<!-- end -->``. The documentation also uses the
long tables and the order of the purposes from here.

python scripts/readme.py                # the table of methods, from the registry and reproductions/results
python scripts/readme.py --demo demo    # also the output of `make demo` in the folder demo; likewise `--all`
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from lamella.cli.console import table
from lamella.commands.compress.page import summary
from lamella.commands.compress.result import CompressionEvidence
from lamella.registry import Method, methods

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
REPRODUCTIONS = ROOT / "reproductions" / "results"
PURPOSES = {  # in the order of the tables, with their headings
    "prune": "A smaller model",
    "skip": "Less work for each generated token",
    "heal": "Train back, or train on",
    "adapt": "Learn something new",
    "repair": "Repair what a model does",
    "rewrite": "Texts or models in another form",
    "recycle": "Use work again",
    "measure": "Understand a model",
    "vision": "Models of images and scenes",
}
DEMO = "lamella compress smollm2 --size 142 --heal-minutes 1 -o demo"


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def demonstrated(evidence: Path) -> str:
    """Return the printed output of the demo."""
    console = Console(record=True, width=88, file=io.StringIO())
    found = summary(CompressionEvidence.read(evidence))
    for each in found.tables:
        table(each.title, each.columns, each.rows, console)
    for line in (found.verdict, *found.lines):
        console.print(line, highlight=False, markup=False)
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    return f"```console\n$ {DEMO}\n{text}\n```"


def outcomes() -> str:
    """Return the table of what `lamella compress` returned for real models and several goals."""
    every = [read(each) for each in sorted(BENCHMARKS.glob("outcomes-*.json")) if not each.stem.endswith("-quick")]
    columns = every[0]["tables"][0]["columns"]
    lines = [f"| {' | '.join(['command', *columns[2:]])} |", f"| {'--- | ' * (len(columns) - 1)}"[:-1]]
    for model, goal, *cells in (row for found in every for row in found["tables"][0]["rows"]):
        lines.append(f"| `compress {model} {goal}` | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"{every[0]['machine']}; `python benchmarks/outcomes.py`."])


def machine(environment: dict[str, Any]) -> str:
    """Return the description of a machine and its versions."""
    versions = environment["versions"]
    return f"{environment['machine']}, torch {versions['torch']}, transformers {versions['transformers']}"


def everything() -> str:
    """Return the table of all methods at one target."""
    if not (BENCHMARKS / "compress-all.json").exists():
        return "The comparison of all methods has not been run yet: `lamella compress smollm2 --method all -o all`."
    evidence = read(BENCHMARKS / "compress-all.json")
    chosen = [(curve, next(p for p in curve["points"] if p["chosen"])) for curve in evidence["curves"]]
    chosen.sort(key=lambda pair: pair[1]["fidelity"]["kl"]["mean"])
    base = chosen[0][1]["fidelity"]["base_perplexity"]["mean"]
    lines = [
        f"`lamella compress smollm2 --speedup {evidence['target_speedup']:g} --method all`, SmolLM2-135M-Instruct "
        f"(perplexity {base:.1f} before), measured on {evidence['data']['test']['data']}, "
        f"{machine(evidence['environment'])}:",
        "",
        "| method | sublayers gone of 60 | decode speed-up | KL (nats) | perplexity | same top token | planning |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve, point in chosen:
        speed, fidelity = point["measured_speedup"], point["fidelity"]
        lines.append(
            f"| `{curve['method']}` | {point['sublayers_removed']:.3g} "
            f"| {speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f}) "
            f"| {fidelity['kl']['mean']:.2f} ± {fidelity['kl']['error']:.2f} "
            f"| {fidelity['perplexity']['mean']:.1f} ± {fidelity['perplexity']['error']:.1f} "
            f"| {fidelity['top1']['mean']:.0%} | {curve['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def state(entry: Method) -> str:
    """Return the outcome of a reproduction's main claim and the number of passed checks, with a link to failed ones."""
    page = f"docs/methods/{entry.slug}.md#measured"
    if entry.baseline:
        return "baseline"
    if not entry.reproduced:
        return f"our own; [measured]({page})"
    if not (REPRODUCTIONS / f"{entry.slug}.json").exists():
        return "not yet run"
    result = read(REPRODUCTIONS / f"{entry.slug}.json")
    held, total = sum(bool(check["passed"]) for check in result["checks"]), len(result["checks"])
    checks = f"{held} of {total} checks hold"
    checks = checks if held == total else f"[{checks}]({page})"
    return f"main claim: {result['verdict']}; {checks}"


def by_purpose() -> dict[str, list[Method]]:
    """Return Lamella's methods by purpose, with baselines last."""
    own = [entry for entry in methods().values() if entry.module.startswith("lamella.")]
    own.sort(key=lambda entry: (entry.baseline, entry.slug))
    return {wanted: [entry for entry in own if entry.purpose == purpose] for purpose, wanted in PURPOSES.items()}


def method_table() -> str:
    """Return a table of all methods with summary and state of the reproduction, grouped by purpose."""
    lines = ["| method | what it does | reproduction |", "| --- | --- | --- |"]
    for wanted, entries in by_purpose().items():
        lines.append(f"| **{wanted}** | | |")
        lines += [
            f"| [`{entry.slug}`](docs/methods/{entry.slug}.md) | {entry.summary} | {state(entry)} |"
            for entry in entries
        ]
    return "\n".join(lines)


def filled(text: str, **parts: str) -> str:
    """Return the README with some of its parts replaced.

    Args:
        text: the README.
        parts: the new parts by marker.
    """
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, part=part: f"{found[1]}{part}{found[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for '{name}': it needs one")
    return text


def main() -> None:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="a folder that `make demo` wrote")
    parser.add_argument("--all", type=Path, help="a folder that `lamella compress --method all` wrote")
    arguments = parser.parse_args()
    folders = {"demo": arguments.demo, "compress-all": arguments.all}
    for name, folder in folders.items():
        if folder is not None:
            shutil.copyfile(folder / "evidence.json", BENCHMARKS / f"{name}.json")
    parts = {"methods": method_table()}
    if any(BENCHMARKS.glob("outcomes-*.json")):
        parts["outcomes"] = outcomes()
    if arguments.demo is not None:
        parts["demo"] = demonstrated(BENCHMARKS / "demo.json")
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8"), **parts), encoding="utf-8")


if __name__ == "__main__":
    main()
