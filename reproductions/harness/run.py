"""One run of a reproduction: its command line, its record, and a journal of finished arms.

A full run takes an hour or more. When it is interrupted and started again, it does not repeat the arms in the journal,
and ends with the same tables. A script defines an experiment, a function that fills a run; CONTRIBUTING.md shows one.

Computations use one thread, regardless of the machine: small models trained with two threads differ from those trained
with one, and so do some claims. The results contain the number of threads if the command line asks for more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from transformers import set_seed

import lamella.methods
from harness.fingerprint import fingerprint, source_digest
from lamella.files import Finished
from lamella.provenance import PACKAGES, package_version
from lamella.report.figures import Axes
from lamella.report.plotting import svg
from lamella.results import Record
from lamella.results.record import PremiseNotMet
from lamella.zoo.cache import cache_folder

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "docs" / "assets"


def _is_of(journal: Path, dependencies: dict[str, Any]) -> bool:
    return journal.exists() and journal.read_text(encoding="utf-8").startswith(json.dumps(dependencies) + "\n")


@dataclass(kw_only=True)
class Run(Record):
    """The record of one run, with the finished arms of an interrupted one.

    Attributes:
        variant: "quick", or another reduced variant of the script; "" is the full run.
        work: a folder for checkpoints of arms, which is removed when the run has finished.
        arms: the finished arms.
        design: what :meth:`freeze` has fixed, for the results.
    """

    variant: str
    work: Path
    arms: Finished
    design: dict[str, Any] | None = field(default=None, init=False)

    @property
    def quick(self) -> bool:
        """Whether this is a quick run."""
        return self.variant == "quick"

    def arm(self, name: str, find: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the result of ``find(*given, **options)`` as JSON values; from the journal if it is finished.

        The journal knows an arm by its name and :func:`harness.fingerprint.fingerprint`: by what it computes. ``find``
        must not need in-memory results of an earlier arm. The global random state is that of the run's seed before and
        after it, whether it runs or not.

        Args:
            name: the name of the arm.
            find: computes the result.
            arguments: its positional arguments.
            options: its keyword arguments.
        """
        return self._once(name, fingerprint(find, *arguments, **options), lambda: find(*arguments, **options))

    def _once(self, name: str, computes: str, find: Callable[[], Any]) -> Any:
        def timed() -> Any:
            started = time.perf_counter()
            found = find()
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            return found

        set_seed(self.seed)
        found = self.arms.once(f"{name} [{computes}]", timed)
        set_seed(self.seed)
        return found

    def freeze(self, statistic: str, seeds: Sequence[int], **recipe: Any) -> None:
        """Fix the design of the experiment before its final seeds run; results contain it, and its digest.

        Args:
            statistic: the statistic of the main claim, as text.
            seeds: the final seeds, of which none chose a part of the recipe.
            recipe: everything else as JSON values, such as steps, sizes, the grid of learning rates and chosen ones.

        Raises:
            ValueError: for a second design.
        """
        if self.design is not None:
            raise ValueError("the design is frozen already")
        content = {"statistic": statistic, "seeds": list(seeds), "recipe": recipe}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        self.design = content | {"digest": digest}

    def document(self) -> dict[str, Any]:
        """Return the results as JSON values, with the frozen design if there is one."""
        return super().document() | ({} if self.design is None else {"design": self.design})

    def figure(self, name: str, figure: Axes) -> None:
        """Save a figure as docs/assets/NAME.svg for the documentation; a quick run saves none.

        Args:
            name: the name of the file.
            figure: the figure.
        """
        if self.quick:
            return
        try:
            content = svg(figure)
        except (RuntimeError, ValueError) as error:  # plotly's errors if kaleido or its browser is missing
            print(f"{name}.svg is not updated: {error}", file=sys.stderr)
        else:
            (ASSETS / f"{name}.svg").write_text(content + "\n", encoding="utf-8")

    def part(self, name: str, make: Callable[..., None], *arguments: Any) -> None:
        """Add the tables and checks of ``make(run, *given)`` as one arm, computed or taken from the journal.

        Args:
            name: the name of the arm.
            make: adds tables and checks to the run.
            arguments: its further arguments.
        """
        tables, checks = len(self.tables), len(self.checks)
        made = False

        def find() -> dict[str, Any]:
            nonlocal made
            made = True
            make(self, *arguments)
            return {"tables": self.tables[tables:], "checks": self.checks[checks:]}

        found = self._once(name, fingerprint(make, *arguments), find)
        if not made:
            for table in found["tables"]:
                self.table(**table)
            for check in found["checks"]:
                self.check(**check)


def main(experiment: Callable[[Run], None], *, seed: int = 0, quick: str, **variants: str) -> int:
    """Run a script's experiment with the options of the command line, write its results, and return the exit code.

    Args:
        experiment: fills a run.
        seed: the default random seed.
        quick: what ``--quick`` omits.
        variants: further flags, with what they omit. Each has its own results and journal.

    Returns:
        The result of :meth:`Record.finish`: 0 if all required checks pass, otherwise 1.
    """
    module = sys.modules[experiment.__module__]
    script = Path(str(module.__file__)).resolve()
    slug = script.stem.replace("_", "-")
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shorter = parser.add_mutually_exclusive_group()
    for name, leaves_out in {"quick": quick, **variants}.items():
        help_ = f"{leaves_out}; writes {slug}-{name}.json"
        shorter.add_argument(f"--{name}", dest="variant", action="store_const", const=name, default="", help=help_)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1, help="number of threads; other values than 1 change results")
    parser.add_argument("--fresh", action="store_true", help="discard the results of an interrupted run")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    threadpool_limits(chosen.threads)

    name = f"{slug}-{chosen.variant}" if chosen.variant else slug
    work = cache_folder() / "reproductions" / name
    dependencies = {
        "seed": chosen.seed,
        "threads": chosen.threads,
        "versions": [package_version(package) for package in PACKAGES],
        "code": source_digest(sources(script)),
    }
    journal = work / "arms.jsonl"
    if chosen.fresh or not _is_of(journal, dependencies):
        shutil.rmtree(work, ignore_errors=True)
    arms = Finished(journal, dependencies)
    if arms:
        print(f"resuming from {work}: {len(arms)} arms are finished", file=sys.stderr)
    run = Run(slug, "", chosen.seed, variant=chosen.variant, work=work, arms=arms)
    try:
        experiment(run)
    except PremiseNotMet as error:
        print(f"The experiment ends here, since its premise was not shown: {error}", file=sys.stderr)
    verdict = run.finish(script.parent / "results" / f"{name}.json")
    shutil.rmtree(work, ignore_errors=True)  # a finished run measures everything again next time
    return verdict


def sources(script: Path) -> list[Path]:
    """Return the files on which every arm depends: those of the method without its page.

    What an arm needs of the script and of the harness is in its fingerprint.
    """
    method = Path(lamella.methods.__path__[0]) / script.stem
    files = method.rglob("*.py") if method.is_dir() else [method.with_suffix(".py")]
    own = [file for file in files if file.is_file() and file.stem != "page"]
    return sorted(own)
