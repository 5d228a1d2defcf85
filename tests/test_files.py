"""Files that appear all at once: written by several at once, and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.errors import ExportError
from lamella.files import replacing, write


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_two_that_write_one_file_at_once_both_finish(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    with replacing(file) as one:
        one.write_text("one")
        with replacing(file) as other:
            other.write_text("other")
        assert file.read_text() == "other" and one.read_text() == "one"
    assert file.read_text() == "one" and names(tmp_path) == ["it.json"]


def test_what_a_kill_has_left_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    left = tmp_path / ".it.json.partial-0123abcd"
    left.mkdir()
    (left / "it.json.partial").write_text("{")
    write(tmp_path / "other.json", "{}")
    assert left.exists()
    write(tmp_path / "it.json", "{}")
    assert names(tmp_path) == ["it.json", "other.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    write(file, "old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and names(tmp_path) == ["it.json"]
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "nowhere" / "it.json", "new")
