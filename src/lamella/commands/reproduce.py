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

FOLDER = Path("reproductions")


class Reproduction(Study):
    """What a reproduction has found."""

    kind = "reproduction"
    writes = False

    @property
    def code(self) -> int:
        """The exit code: 0 where the claim holds and nothing fails."""
        code: int = self.findings["code"]
        return code

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        holds = {True: "holds", False: "does not hold", None: "is undecided"}[evidence.findings["claim_holds"]]
        return Summary(f"The claim of {evidence.provenance['inputs']['method']} {holds}.")


@command("reproduce", verb="reproduce", on="any")
def reproduce(method: str, *, quick: bool = False, fresh: bool = False) -> Reproduction:
    """Run the reproduction of a published method and check its claims; exits with 1 when one fails.

    It does so too when the main claim is undecided: within the noise of what was measured.

    A full run takes ten minutes to two hours; how long, and what it shows, stands at the top of its script. Stopped and
    started again it goes on: what is finished lies in the cache folder until the results are written. A change of the
    code measures again. Works in a checkout of the project, where reproductions/ is.

    Example: lamella reproduce finercut --quick

    Args:
        method: one with a reproduction.
        quick: the same claims on less work, under a minute.
        fresh: forget what a stopped run has found.

    Returns:
        The record of the reproduction.

    Raises:
        MethodError: for a method without a reproduction here.
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
