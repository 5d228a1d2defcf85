"""Reproductions of published methods, from a checkout of the project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lamella.errors import MethodError
from lamella.registry import command
from lamella.result import Evidence, Summary
from lamella.results import Study
from lamella.results.record import PREMISE, UNDECIDED

FOLDER = Path("reproductions")


class Reproduction(Study):
    """The findings of a reproduction."""

    kind = "reproduction"
    writes = False

    @property
    def code(self) -> int:
        """The exit code: 0 if the claim holds and no check fails."""
        code: int = self.findings["code"]
        return code

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the verdict."""
        method, verdict = evidence.provenance["inputs"]["method"], evidence.findings["verdict"]
        if verdict == PREMISE:
            return Summary(f"The claim of {method} could not be tested: its premise is not met here.")
        return Summary(f"The claim of {method} {'is undecided' if verdict == UNDECIDED else verdict}.")


@command("reproduce", verb="reproduce", on="any")
def reproduce(method: str, *, quick: bool = False, fresh: bool = False) -> Reproduction:
    """Run the reproduction of a published method and check its claims; exits with 1 if one fails.

    It also exits with 1 if the main claim is undecided, that is, within the noise of the measurement, or if its
    premise is not met: model and data do not show the effect that it presupposes.

    A full run takes ten minutes to two hours; the head of its script says how long, and what it measures. A run that
    was stopped resumes: finished parts are kept in the cache folder until the results are written. A change of the code
    repeats the measurements. Runs in a checkout of the project, where reproductions/ is.

    Example: lamella reproduce finercut --quick

    Args:
        method: a method with a reproduction.
        quick: the same claims with less work, in under a minute.
        fresh: discard the finished parts of a stopped run.

    Returns:
        The record of the reproduction.

    Raises:
        MethodError: if there is no reproduction of the method.
    """
    script = FOLDER / f"{method.replace('-', '_')}.py"
    if not script.is_file():
        known = sorted(file.stem.replace("_", "-") for file in FOLDER.glob("*.py"))
        where = (
            f"there are {', '.join(known)}" if known else "run it in a checkout of the project, where reproductions/ is"
        )
        raise MethodError(f"no reproduction of '{method}' here; {where}")
    flags = [*(["--quick"] if quick else []), *(["--fresh"] if fresh else [])]
    done = subprocess.run([sys.executable, str(script), *flags], check=False, stdout=sys.stderr)
    results = FOLDER / "results" / f"{method}{'-quick' if quick else ''}.json"
    return Reproduction(findings=json.loads(results.read_text(encoding="utf-8")) | {"code": done.returncode})
