"""Rewrite evidence of compressions from the schema lamella.evidence/1 to lamella.evidence/2.

    python scripts/migrate_evidence.py benchmarks/results/demo.json benchmarks/results/compress-all.json

Measured values are unchanged. The chosen method with its options, which was at the top level, is moved to ``chosen``,
and the seed to ``provenance``. Files of other schemas are rejected and not changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lamella.commands.compress.result import CompressionEvidence
from lamella.errors import LamellaError

OLD = "lamella.evidence/1"


def migrated(old: dict[str, Any]) -> CompressionEvidence:
    """Return evidence of the schema ``lamella.evidence/2`` for one of ``lamella.evidence/1``.

    Raises:
        LamellaError: for evidence of another schema.
    """
    if old.get("schema") != OLD:
        raise LamellaError(f"the schema is {old.get('schema')}: give a file of {OLD}")
    rest = {name: value for name, value in old.items() if name not in ("schema", "method", "options", "seed")}
    environment = old["environment"]
    chosen = {name: value for name, value in old["options"].items() if name != "until"}  # a function, not a setting
    rest["chosen"] = old["chosen"] | {"method": old["method"], "options": chosen}
    provenance = {
        "method": "compress",
        "version": environment["versions"]["lamella"],
        "options": {"speedup": old["target_speedup"]},
        "inputs": {"stack": old["model"]} | old["data"],
        "seed": old["seed"],
        "machine": environment["machine"],
    }
    return CompressionEvidence.model_validate({"kind": "compression", "provenance": provenance} | rest)


def main() -> int:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="evidence.json, or a copy of it")
    failed = 0
    for file in parser.parse_args().files:
        try:
            file.write_text(migrated(json.loads(file.read_text(encoding="utf-8"))).dump(), encoding="utf-8")
        except LamellaError as error:
            print(f"{file}: {error}", file=sys.stderr)
            failed = 2
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
