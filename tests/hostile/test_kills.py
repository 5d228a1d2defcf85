"""Kills at any moment: one complete version remains, and a repeated command gives the uninterrupted result.

There are two kinds of kills. A sweep kills at every single file system operation, in the middle of every write. Kills
by the clock occur at any time, also inside libraries that write files themselves; their times are drawn from a random
seed. A failure lists all kills that went wrong, with their operation or time. ``-rA`` shows the numbers of outcomes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamella.files import recover

MORTAL = Path(__file__).with_name("mortal.py")
OVER, NEW = True, False
EXPORTS = [
    ("copied", OVER),
    ("copied", NEW),
    ("built", OVER),
    ("out_of_core", OVER),
    ("compressed", OVER),
    ("compressed", NEW),
]

Files = dict[str, bytes] | None  # of a folder, by their relative paths; None where there is none
Mortal = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    """From a job to how its process ended; see mortal.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(MORTAL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(job: str, folder: Path, **request: Any) -> dict[str, Any]:
        print(json.dumps({"job": job, "folder": str(folder), **request}), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"{job}: the process that forks has ended"
        return json.loads(answer)

    yield ask
    process.stdin.close()
    process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def files(folder: Path) -> Files:
    """What is in a folder, or in no folder."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differ(one: Files, other: Files) -> str:
    one, other = one or {}, other or {}
    return ", ".join(sorted(name for name in {**one, **other} if one.get(name) != other.get(name)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kills(answer: dict[str, Any], seed: int, by_clock: int, every: int = 1) -> list[dict[str, Any]]:
    """Requests that kill a job at every so many operations, and by the clock at moments spread over all it takes."""
    draw = random.Random(seed)
    clock = [{"after": draw.uniform(0, 1.02 * answer["seconds"])} for _ in range(by_clock)]
    first = draw.randint(1, every)
    return [{"at": at} for at in range(first, answer["operations"] + 1, every)] + clock


class Versions:
    """The folder ``out``, in which one job replaces an old version by a new one.

    Args:
        before: whether there is an old version.
        beside: other files that remain next to ``out``.
    """

    def __init__(self, mortal: Mortal, job: str, folder: Path, before: bool, *beside: str, **options: Any) -> None:
        self.mortal, self.job, self.folder, self.options = mortal, job, folder, options
        self.beside = sorted(beside)
        self.known: dict[str, Files] = {"none": None}
        if before:
            self.make(version=0)
            self.known = {"old": files(folder / "out")}
        self.before = before
        self.start()
        self.whole = self.make()
        self.known["new"] = files(folder / "out")
        assert names(folder) == sorted(["out", *beside])
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def make(self, **request: Any) -> dict[str, Any]:
        answer = self.mortal(self.job, self.folder, **self.options, **request)
        assert not answer["failed"], answer["failed"]
        return answer

    def start(self) -> None:
        """Restore the folder's state before the job."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, content in (self.known.get("old") or {}).items():
            (self.folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "out" / name).write_bytes(content)

    def standing(self) -> str:
        """Return the name of the present version."""
        if self.options.get("at_once") is False:
            recover(self.folder / "out")
        found = files(self.folder / "out")
        for name, version in self.known.items():
            if found == version:
                return name
        against = {name: differ(found, version) for name, version in self.known.items()}
        raise AssertionError(f"{self.job}: what stands is no version; what differs: {against}")

    def kill(self, **when: Any) -> None:
        """One kill, and what must be true after it."""
        self.start()
        answer = self.make(**when)
        where = f"{when} in {answer['last']}"
        try:
            standing = self.standing()
            self.outcomes[f"killed, {standing} stands" if answer["killed"] else "done before the kill"] += 1
            again = self.mortal(self.job, self.folder, **self.options)
            if self.options.get("overwrite") is False and standing == "new":
                assert "exists" in str(again["failed"]), again["failed"]
            else:
                assert not again["failed"], again["failed"]
            assert self.standing() == "new"
            assert names(self.folder) == sorted(["out", *self.beside])
        except AssertionError as error:
            self.outcomes["WRONG"] += 1
            self.wrong.append(f"killed {where}: {error}")

    def finish(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        print(f"KILLS {self.job}{' over an old version' if self.before else ''}: {counts}")
        assert not self.wrong, "\n".join(self.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["copied", "built_once"])
def test_after_some_kills_one_version_stands_and_the_next_run_succeeds(job: str, mortal: Mortal, folder: Path) -> None:
    cache = job == "built_once"
    versions = Versions(mortal, job, folder, not cache, *([".out.lock"] if cache else []))
    for when in kills(versions.whole, 0, 2, every=4 if cache else 16):
        versions.kill(**when)
    versions.finish()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("job", "before"), EXPORTS, ids=[f"{job} {'over' if old else 'new'}" for job, old in EXPORTS])
def test_an_export_killed_at_any_operation_or_time_leaves_one_version(
    job: str, before: bool, mortal: Mortal, folder: Path
) -> None:
    versions = Versions(mortal, job, folder, before, overwrite=before)
    for when in kills(versions.whole, 1, by_clock=8):
        versions.kill(**when)
    versions.finish()


@pytest.mark.exhaustive
def test_where_names_cannot_change_places_an_export_killed_at_any_operation_is_recovered(
    mortal: Mortal, folder: Path
) -> None:
    versions = Versions(mortal, "copied", folder, OVER, at_once=False)
    for when in kills(versions.whole, 6, by_clock=4, every=2):
        versions.kill(**when)
    versions.finish()


@pytest.mark.exhaustive
def test_of_two_exports_to_one_folder_at_once_one_stands_whole_and_nothing_else(mortal: Mortal, folder: Path) -> None:
    versions = Versions(mortal, "copied", folder, OVER)
    for _ in range(10):
        answer = mortal("copied_by_two", folder)
        assert not answer["failed"], answer["failed"]
        assert versions.standing() in ("old", "new")
        assert names(folder) == ["out"]


@pytest.mark.exhaustive
def test_a_build_in_the_cache_killed_at_any_operation_or_time_is_seen_whole_or_not_at_all(
    mortal: Mortal, folder: Path
) -> None:
    versions = Versions(mortal, "built_once", folder, False, ".out.lock")
    for when in kills(versions.whole, 2, by_clock=10):
        versions.kill(**when)
    versions.finish()


@pytest.mark.exhaustive
def test_a_pull_killed_at_any_operation_or_time_is_seen_whole_or_not_at_all(
    mortal: Mortal, folder: Path, tmp_path: Path
) -> None:
    wheel = tmp_path / "shelf" / "lamella_sample-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lamella_sample/data.txt", "the text")
        archive.writestr("lamella_sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(
            "lamella_sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lamella-sample\nVersion: 1.0\n"
        )
        archive.writestr("lamella_sample-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    versions = Versions(mortal, "pulled", folder, False, ".out.lock", shelf=str(wheel.parent), wheel=digest)
    for when in kills(versions.whole, 3, by_clock=15):
        versions.kill(**when)
    versions.finish()


class Resumed:
    """Work that resumes after a kill, and must have the same result as without interruption.

    Args:
        result: its result in a folder, without parts that differ between runs.
    """

    def __init__(self, mortal: Mortal, job: str, folder: Path, result: Callable[[Path], Files], **options: Any) -> None:
        self.mortal, self.job, self.folder, self.result, self.options = mortal, job, folder, result, options
        self.whole = mortal(job, folder, **options)
        assert not self.whole["failed"], self.whole["failed"]
        self.expected, self.names = result(folder), names(folder)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def kill(self, *times: dict[str, Any]) -> None:
        """Kill the work at each of these times in turn, then let it finish."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        try:
            for when in (*times, {}):
                answer = self.mortal(self.job, self.folder, **self.options, **when)
                assert not answer["failed"], answer["failed"]
                if when:
                    self.outcomes["killed" if answer["killed"] else "done before the kill"] += 1
            assert not differ(self.result(self.folder), self.expected), differ(self.result(self.folder), self.expected)
            assert names(self.folder) == self.names, names(self.folder)
        except AssertionError as error:
            self.outcomes["WRONG"] += 1
            self.wrong.append(f"killed {times}: {error}")

    def finish(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        print(f"KILLS {' '.join([self.job, *self.options.values()])}: {counts}")
        assert not self.wrong, "\n".join(self.wrong)


def training(folder: Path) -> Files:
    """What a run leaves, without Trainer's own state, which has times in it; its files must be there all the same."""
    found = files(folder)
    assert found is not None
    content = ("trained.safetensors", "best.safetensors", "log.json", "trace.json", "replay.json")
    return {name: data if name.endswith(content) else b"" for name, data in found.items()}


def healing(folder: Path) -> Files:
    """An export, without what says when and where it was made."""
    found = files(folder / "out")
    assert found is not None
    evidence = json.loads(found["evidence.json"])
    del evidence["environment"], found["heal.html"]
    return found | {"evidence.json": json.dumps(evidence).encode()}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["finercut", "trained"])
def test_after_some_kills_work_ends_with_the_same_result(job: str, mortal: Mortal, folder: Path) -> None:
    work = Resumed(mortal, job, folder, training if job == "trained" else files)
    for when in kills(work.whole, 0, by_clock=1, every=20 if job == "trained" else 6):
        work.kill(when)
    work.finish()


@pytest.mark.exhaustive
@pytest.mark.parametrize("job", ["finercut", "tracenas"])
def test_a_search_killed_at_any_operation_or_time_ends_with_the_same_series(
    job: str, mortal: Mortal, folder: Path
) -> None:
    work = Resumed(mortal, job, folder, files)
    for when in kills(work.whole, 4, by_clock=8):
        work.kill(when, {"after": work.whole["seconds"] / 2}, {"at": 2})  # killed again while it goes on
    work.finish()


@pytest.mark.exhaustive
@pytest.mark.parametrize("job", ["trained", "sliced"])
def test_training_killed_at_any_operation_or_time_ends_with_the_same_bits(
    job: str, mortal: Mortal, folder: Path
) -> None:
    work = Resumed(mortal, job, folder, training)
    for when in kills(work.whole, 5, by_clock=8, every=2):
        work.kill(when)
    work.finish()


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", ["continual-pretrain", "unified-skip"])
def test_healing_killed_at_any_operation_or_time_ends_with_the_same_bits(
    recipe: str, mortal: Mortal, folder: Path
) -> None:
    work = Resumed(mortal, "healed", folder, healing, recipe=recipe)
    times = kills(work.whole, 6, by_clock=6, every=20)
    for number, when in enumerate(times):
        work.kill(when, times[-1 - number // 2])
    work.finish()
