"""One run of a reproduction: its command line, its record, and a journal of the arms that are finished.

A full run takes an hour or more. Stopped and started again it does not repeat what the journal holds, and ends with the
same tables. A script is an experiment, a function that fills the run it is given; CONTRIBUTING.md shows one.

Arithmetic has one thread, whatever the machine has: small models trained on two end elsewhere than on one, and some
claims with them. The results say how many there were where the command line asked for more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from transformers import set_seed

import lamella.methods
from lamella.files import Finished
from lamella.provenance import PACKAGES, package_version
from lamella.report.figures import Axes
from lamella.report.plotting import svg
from lamella.results import Record
from lamella.zoo.cache import cache_folder

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "docs" / "assets"


def _is_of(journal: Path, depends: dict[str, Any]) -> bool:
    return journal.exists() and journal.read_text(encoding="utf-8").startswith(json.dumps(depends) + "\n")


@dataclass(kw_only=True)
class Run(Record):
    """The record of one run, which knows what an earlier run has finished.

    Attributes:
        variant: "quick", or another of the script that leaves something out; "" is the full run.
        work: a folder for checkpoints of arms, which goes when the run has finished.
        arms: what is finished.
    """

    variant: str
    work: Path
    arms: Finished

    @property
    def quick(self) -> bool:
        return self.variant == "quick"

    def arm(self, name: str, find: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """What ``find(*given, **options)`` returns, as JSON gives it back; from the journal where it is finished.

        ``find`` must not need what an earlier arm left in memory, and is not run again when its name comes again.
        Whether it runs or not, the generators of random numbers stand at the run's seed before it and behind it.
        """

        def timed() -> Any:
            began = time.perf_counter()
            found = find(*given, **options)
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            return found

        set_seed(self.seed)
        found = self.arms.once(name, timed)
        set_seed(self.seed)
        return found

    def picture(self, name: str, figure: Axes) -> None:
        """Keep a figure as docs/assets/NAME.svg, where pages show it; a quick run, which says nothing, keeps none."""
        if self.quick:
            return
        try:
            drawn = svg(figure)
        except (RuntimeError, ValueError) as error:  # as plotly says that kaleido or its browser is missing
            print(f"{name}.svg stays as it is: {error}", file=sys.stderr)
        else:
            (ASSETS / f"{name}.svg").write_text(drawn + "\n", encoding="utf-8")

    def part(self, name: str, make: Callable[..., None], *given: Any) -> None:
        """The tables and checks that ``make(run, *given)`` adds, as one arm: made, or taken from the journal."""
        known, tables, checks = name in self.arms, len(self.tables), len(self.checks)

        def find() -> dict[str, Any]:
            make(self, *given)
            return {"tables": self.tables[tables:], "checks": self.checks[checks:]}

        found = self.arm(name, find)
        if known:
            for table in found["tables"]:
                self.table(**table)
            for check in found["checks"]:
                self.check(**check)


def main(experiment: Callable[[Run], None], *, seed: int = 0, quick: str, **variants: str) -> int:
    """Run a script's experiment as the command line says, write its results beside it, and return the exit code.

    Args:
        experiment: fills a run.
        seed: where the command line says nothing.
        quick: what ``--quick`` leaves out.
        variants: further flags, with what they leave out. Each has results and a journal of its own.

    Returns:
        What :meth:`Record.finish` says: 0 when all that must hold does, else 1.
    """
    module = sys.modules[experiment.__module__]
    script = Path(str(module.__file__)).resolve()
    slug = script.stem.replace("_", "-")
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shorter = parser.add_mutually_exclusive_group()
    for name, leaves_out in {"quick": quick, **variants}.items():
        said = f"{leaves_out}; writes {slug}-{name}.json"
        shorter.add_argument(f"--{name}", dest="variant", action="store_const", const=name, default="", help=said)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1, help="of arithmetic; others than 1 change what is trained")
    parser.add_argument("--fresh", action="store_true", help="forget what a stopped run has found")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    threadpool_limits(chosen.threads)

    name = f"{slug}-{chosen.variant}" if chosen.variant else slug
    work = cache_folder() / "reproductions" / name
    depends = {
        "seed": chosen.seed,
        "threads": chosen.threads,
        "versions": [package_version(package) for package in PACKAGES],
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in sources(script))).hexdigest(),
    }
    journal = work / "arms.jsonl"
    if chosen.fresh or not _is_of(journal, depends):
        shutil.rmtree(work, ignore_errors=True)
    arms = Finished(journal, depends)
    if arms:
        print(f"goes on from {work}: {len(arms)} arms are finished", file=sys.stderr)
    run = Run(slug, "", chosen.seed, variant=chosen.variant, work=work, arms=arms)
    experiment(run)
    verdict = run.finish(script.parent / "results" / f"{name}.json")
    shutil.rmtree(work, ignore_errors=True)  # a finished run measures anew next time
    return verdict


def sources(script: Path) -> list[Path]:
    """The files that results depend on: the script, what all of them share, and the method but for its pictures."""
    method = Path(lamella.methods.__path__[0]) / script.stem
    rooms = method.rglob("*.py") if method.is_dir() else [method.with_suffix(".py")]
    own = [file for file in rooms if file.is_file() and file.stem != "page"]
    return [script, *sorted(HERE.glob("*.py")), *sorted(own)]
