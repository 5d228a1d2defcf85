"""The main job runs on what a plain install brings: everything else is hidden from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NANO_LLAMA = ROOT / "tests" / "models" / "nano-llama"
HIDING = """
import json, sys
from importlib.machinery import PathFinder

HIDDEN = set(json.loads(sys.argv.pop(1)))


class Seen(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path = [Seen if each is PathFinder else each for each in sys.meta_path]
from lamella.cli import main
main()
"""


def named(text: str) -> str:
    return text.lower().replace("_", "-").replace(".", "-")


def plain() -> set[str]:
    """The distributions that a plain install brings, those that they need included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted, found = [Requirement(each) for each in project["dependencies"]], {"lamella", "pip", "setuptools"}
    while wanted:
        each = wanted.pop()
        if named(each.name) in found or (each.marker and not each.marker.evaluate({"extra": ""})):
            continue
        found.add(named(each.name))
        try:
            wanted += [Requirement(text) for text in metadata.requires(each.name) or ()]
        except metadata.PackageNotFoundError:  # of another platform
            continue
    return found


def test_the_report_needs_nothing_but_a_plain_install() -> None:
    assert {"plotly", "jinja2", "scipy", "torch", "transformers"} <= plain() and not {
        "lm-eval",
        "scikit-learn",
        "pytest",
    } & plain()


@pytest.mark.slow
def test_the_main_job_runs_and_reports_on_a_plain_install(tmp_path: Path) -> None:
    kept = plain()
    owners = metadata.packages_distributions()
    hidden = [module for module, of in owners.items() if not {named(each) for each in of} & kept]
    assert {"lm_eval", "sklearn", "datasets"} <= set(hidden)
    # A target that every machine reaches, however busy it is.
    arguments = ("compress", str(NANO_LLAMA), "--speedup", "1", "--heal-steps", "2", "-o", str(tmp_path / "small"))
    done = subprocess.run(
        [sys.executable, "-c", HIDING, json.dumps(hidden), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout and "<svg" in (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
