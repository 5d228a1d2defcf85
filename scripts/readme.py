"""Fill the README's figures from the committed results, so that no number in it is typed by hand.

The documentation's page of benchmarks takes its long tables from here, too.

python scripts/readme.py                       # from benchmarks/results and reproductions/results
python scripts/readme.py --demo demo          # first take in new evidence of `make demo`; likewise `--all`
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
from lamella.registry import methods
from lamella.results.record import VERDICTS

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
REPRODUCTIONS = ROOT / "reproductions" / "results"
DEMO = "lamella compress smollm2 --speedup 1.3 --heal-minutes 3 -o demo"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def demonstrated() -> str:
    """What ``lamella compress`` printed."""
    console = Console(record=True, width=88, file=io.StringIO())
    shown = summary(CompressionEvidence.read(BENCHMARKS / "demo.json"))
    for each in shown.tables:
        table(each.title, each.columns, each.rows, console)
    for line in (shown.verdict, *shown.lines):
        console.print(line, highlight=False, markup=False)
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    return f"```console\n$ {DEMO}\n{text}\n```"


def machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    return f"{environment['machine']}, torch {versions['torch']}, transformers {versions['transformers']}"


def everything() -> str:
    """The table of all methods at one target."""
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


def verdict(slug: str) -> str:
    """The verdict on the main claim, and how many checks hold, with a link to those that do not."""
    if not (REPRODUCTIONS / f"{slug}.json").exists():
        return "not yet run"
    result = read(REPRODUCTIONS / f"{slug}.json")
    held, total = sum(bool(check["passed"]) for check in result["checks"]), len(result["checks"])
    checks = f"{held} of {total} checks hold"
    checks = checks if held == total else f"[{checks}](docs/methods/{slug}.md#measured)"
    return f"main claim: {VERDICTS[result['claim_holds']]}; {checks}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="a folder that `make demo` wrote")
    parser.add_argument("--all", type=Path, help="a folder that `lamella compress --method all` wrote")
    arguments = parser.parse_args()
    taken = {"demo": arguments.demo, "compress-all": arguments.all}
    for name, folder in taken.items():
        if folder is not None:
            shutil.copyfile(folder / "evidence.json", BENCHMARKS / f"{name}.json")
    published = [slug for slug, entry in methods().items() if entry.reproduced]
    parts = {"demo": demonstrated()} | {slug: verdict(slug) for slug in published}
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, part in parts.items():
        line = "" if name in published else "\n"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no place for '{name}'")
        text = pattern.sub(
            lambda _, part=part, name=name, line=line: f"<!-- {name} -->{line}{part}{line}<!-- end -->", text
        )
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
