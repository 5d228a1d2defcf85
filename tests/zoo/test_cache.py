"""The cache contains only complete folders, whatever happens to the process that fills it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamella.errors import DownloadError
from lamella.zoo.cache import build_once, cache_folder, is_complete

BUILD = """
import sys, time
from pathlib import Path
from lamella.zoo.cache import build_once

def build(folder):
    (folder / "half").write_text("first half")
    Path(sys.argv[1]).open("a").write("built\\n")
    time.sleep(float(sys.argv[2]))
    (folder / "whole").write_text("second half")
    return {"name": "thing"}

print(build_once("thing", build, megabytes=1))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("content")
    return {"name": "thing"}


def start(log: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILD, str(log), str(seconds)], stdout=subprocess.PIPE, text=True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never appeared"
        time.sleep(0.02)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", "/somewhere/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/xdg")
    assert cache_folder() == Path("/somewhere/own")
    monkeypatch.delenv("LAMELLA_CACHE")
    assert cache_folder() == Path("/somewhere/xdg/lamella")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lamella"


def test_second_call_does_not_build_again() -> None:
    first = build_once("thing", fill, megabytes=1)
    assert build_once("thing", lambda folder: pytest.fail("built twice"), megabytes=1) == first


def test_a_build_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> dict[str, str]:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("thing", fail, megabytes=1)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_a_killed_build_is_never_seen_and_the_next_one_succeeds(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(log, 60)
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (cache / "thing").exists()
    output, _ = start(log, 0).communicate(timeout=60)
    assert Path(output.strip()) == cache / "thing" and is_complete(cache / "thing")
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == ["thing"]


@pytest.mark.slow
def test_two_processes_at_once_build_once_and_agree(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pair = [start(log, 1), start(log, 1)]
    assert {process.communicate(timeout=60)[0].strip() for process in pair} == {str(cache / "thing")}
    assert log.read_text() == "built\n"


def test_a_damaged_folder_is_built_again() -> None:
    folder = build_once("thing", fill, megabytes=1)
    (folder / "file").write_text("cut")
    assert (build_once("thing", fill, megabytes=1) / "file").read_text() == "content"


def test_a_full_disk_is_refused_before_the_work() -> None:
    with pytest.raises(DownloadError, match=r"needs 1000000000 MB in the cache folder .* LAMELLA_CACHE"):
        build_once("thing", lambda folder: pytest.fail("started"), megabytes=10**9)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="set LAMELLA_CACHE"):
        build_once("thing", fill, megabytes=1)
