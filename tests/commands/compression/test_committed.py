"""The committed evidence of compressions has the schema that the page, the README and the benchmarks read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamella.commands.compress.page import page, summary
from lamella.commands.compress.result import CompressionEvidence

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["demo", "compress-all"])
def test_committed_evidence_has_the_schema_that_is_read(name: str) -> None:
    evidence = CompressionEvidence.read(RESULTS / f"{name}.json")
    assert evidence.method == "compress"
    assert evidence.chosen["method"] in summary(evidence).tables[0].title
    assert evidence.goal["text"] in page(evidence)
