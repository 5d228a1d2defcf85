"""Every corpus: rows that were chosen or made, and an account of how."""

from __future__ import annotations

import json

import pytest
from worlds import COMMANDS, made, of_suite


@pytest.mark.parametrize("command", of_suite("corpora"))
def test_its_rows_are_written_and_read_back(command: str) -> None:
    done = made(command)
    rows = list(done.outcome.result.rows())
    assert rows and all(isinstance(row, dict) and any(row.values()) for row in rows)
    assert COMMANDS[command].signature.result.read(done.out) == rows
    assert [json.loads(line) for line in (done.out / "data.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize("command", of_suite("corpora"))
def test_it_accounts_for_its_rows(command: str) -> None:
    done = made(command)
    findings = done.outcome.evidence.findings
    assert findings and json.loads(json.dumps(findings)) == findings
