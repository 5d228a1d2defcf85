"""Evidence of compressions of the former schema is rewritten, and what reads the committed files can read them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lamella.commands.compress.page import summary
from lamella.commands.compress.result import CompressionEvidence

ROOT = Path(__file__).parent.parent
COMMITTED = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("demo", "compress-all")]


@pytest.fixture
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("migrate_evidence", ROOT / "scripts" / "migrate_evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def former(current: dict[str, Any]) -> dict[str, Any]:
    """Evidence as it was written before."""
    new = {"kind", "provenance", "findings", "tasks", "quantised", "schema", "chosen"}
    chosen = {name: value for name, value in current["chosen"].items() if name != "options"}
    options = current["chosen"]["options"] | {"until": "module.run_method.<locals>.<lambda>"}
    return {
        "schema": "lamella.evidence/1",
        **{name: value for name, value in current.items() if name not in new},
        "chosen": chosen,
        "method": chosen["method"],
        "options": options,
        "seed": 3,
    }


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_evidence_has_the_schema_that_is_read(file: Path) -> None:
    evidence = CompressionEvidence.read(file)
    assert evidence.schema_ == "lamella.evidence/2" and evidence.method == "compress"
    assert evidence.data["test"]["data"] == "pydoc"  # the default when it was measured
    assert evidence.chosen["method"] in summary(evidence).tables[0].title


def test_evidence_of_the_former_schema_is_rewritten_in_place(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = json.loads(COMMITTED[0].read_text(encoding="utf-8"))
    file = tmp_path / "evidence.json"
    file.write_text(json.dumps(former(current)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["migrate_evidence.py", str(file)])
    assert script.main() == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["provenance"].pop("seed") == 3 and current["provenance"].pop("seed") == 0
    assert written.pop("agreement") is None  # which was not measured then
    assert written == current


def test_other_schemas_are_refused_and_left_alone(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "evidence.json"
    file.write_text(before := COMMITTED[0].read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["migrate_evidence.py", str(file)])
    assert script.main() == 2
    assert "the schema is lamella.evidence/2: give a file of lamella.evidence/1" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == before
