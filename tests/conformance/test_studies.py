"""Every study: findings that are values, the same wherever they are read, and no model changed."""

from __future__ import annotations

import json

import pytest
from worlds import COMMANDS, made, of_suite


@pytest.mark.parametrize("command", of_suite("studies"))
def test_its_findings_are_values_and_can_be_read_back(command: str) -> None:
    done = made(command)
    findings = done.outcome.result.findings
    assert findings and json.loads(json.dumps(findings)) == json.loads(json.dumps(done.outcome.evidence.findings))
    again = COMMANDS[command].signature.result.read(done.out)
    for name in findings:
        assert again[name] == json.loads(json.dumps(findings[name]))


@pytest.mark.parametrize("command", of_suite("studies"))
def test_it_leaves_no_model_behind(command: str) -> None:
    done = made(command)
    assert not (done.out / "config.json").exists() and not (done.out / "model.safetensors").exists()


@pytest.mark.parametrize("command", of_suite("studies"))
def test_what_it_says_first_is_in_page_and_card(command: str) -> None:
    done = made(command)
    assert done.outcome.summary.verdict.endswith(".") and "\n" not in done.outcome.summary.verdict
    assert all(note.endswith(".") for note in done.outcome.evidence.notes)
