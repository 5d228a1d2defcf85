"""Compare two folders of results: which options differ, and which measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from lamella.errors import LamellaError
from lamella.formatting import counted
from lamella.reading import parse_json, read_text
from lamella.registry import command
from lamella.result import Evidence, Summary, Table
from lamella.results import Study
from lamella.signature import Argument

SCHEMA = "lamella.evidence/2"
EXCLUDED = ("schema", "kind", "provenance", "environment", "notes")  # fields that are no measurements


@dataclass(frozen=True)
class Results:
    """The evidence in a folder of results, whatever command wrote it.

    Attributes:
        name: name of the folder.
        evidence: the JSON document.
    """

    name: str
    evidence: Mapping[str, Any]

    metavar: ClassVar[str] = "FOLDER"
    source_help: ClassVar[str] = "a folder of results, or its evidence.json"

    @classmethod
    def open(cls, name: str | Path) -> Results:
        """Read the evidence of a folder.

        Args:
            name: the folder, or its evidence.json.

        Raises:
            LamellaError: if there is no evidence.
        """
        path = Path(name).expanduser()
        file = path / "evidence.json" if path.is_dir() else path
        try:
            found = parse_json(read_text(file))
        except ValueError as error:
            raise LamellaError(f"{file}: no evidence ({error}); give a folder that Lamella has written") from None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise LamellaError(f"{file}: no evidence of the schema {SCHEMA}; give a folder that Lamella has written")
        return cls(str(name), found)

    @classmethod
    def check(cls, name: str | Path) -> None:
        """Check that there is evidence."""
        cls.open(name)

    def describe(self) -> str:
        """Return the name, for provenance."""
        return self.name


class Difference(Study):
    """The differences of two results."""

    kind = "difference"

    @classmethod
    def summary(cls, evidence: Evidence) -> Summary:
        """Summarise the differences in tables."""
        found = evidence.findings
        first, second = found["names"]
        options = [[each["name"], each["first"], each["second"]] for each in found["options"]]
        rows = [[each["name"], each["first"], each["second"], each["change"]] for each in found["measured"]]
        tables = [Table("Different options", ["", first, second], options)] if options else []
        tables += [Table("Different measurements", ["", first, second, "change"], rows)] if rows else []
        count = counted(len(rows), "measurement")
        return Summary(f"{count} of {found['common']} common ones differ.", tables)


@command("diff", verb="diff", on="any")
def diff(
    first: Results, second: Annotated[Results, Argument()], *, at_least: Annotated[float, Ge(0)] = 0.0
) -> Difference:
    """Compare two folders of results: which options differ, and which measurements.

    Example: lamella diff small healed --at-least 0.01

    Args:
        first: a folder of results.
        second: another folder, of the same command or another.
        at_least: minimum relative difference of the measurements that are listed.

    Returns:
        Both values of every measurement that differs, by its path in the evidence.
    """
    ours, theirs = (dict(_measured(each.evidence)) for each in (first, second))
    common = [name for name in ours if name in theirs]
    measured = []
    for name in (each for each in common if ours[each] != theirs[each]):
        change = _change(ours[name], theirs[name])
        if change is None or abs(change) >= at_least:
            measured.append({"name": name, "first": ours[name], "second": theirs[name], "change": change})
    options = [dict(_leaves(each.evidence["provenance"].get("options", {}))) for each in (first, second)]
    changed = [
        {"name": name, "first": _text(options[0].get(name)), "second": _text(options[1].get(name))}
        for name in sorted({*options[0], *options[1]})
        if options[0].get(name) != options[1].get(name)
    ]
    names = [first.name, second.name]
    return Difference(findings={"names": names, "common": len(common), "options": changed, "measured": measured})


def _measured(evidence: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number of the evidence by its path, such as ``fidelity.kl.mean``."""
    for name, value in _leaves({name: each for name, each in evidence.items() if name not in EXCLUDED}):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a document by their paths."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{path}.{number}")
    else:
        yield path, value


def _change(first: float, second: float) -> float | None:
    """Return the relative change from the first value to the second; None if the first is zero."""
    return None if first == 0 else (second - first) / abs(first)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
