"""Assemble the section of CHANGELOG.md on methods from changes/SLUG.md, one file per method.

The lines are between the markers ``<!-- methods -->`` and ``<!-- end -->`` of the unreleased version. At its release,
delete the markers and the files, so that the lines are no longer replaced.

python scripts/changelog.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"(<!-- methods -->\n).*?(<!-- end -->)", re.DOTALL)


def assembled(text: str, changes: Path) -> str:
    """Return the changelog with the lines of every method, in the order of their slugs."""
    lines = "\n".join(file.read_text(encoding="utf-8").strip() for file in sorted(changes.glob("*.md")))
    written, count = SECTION.subn(lambda found: f"{found[1]}\n{lines}\n\n{found[2]}", text)
    if count != 1:
        raise SystemExit(f"CHANGELOG.md has {count} sections between <!-- methods --> and <!-- end -->: it needs one")
    return written


if __name__ == "__main__":
    changelog = ROOT / "CHANGELOG.md"
    changelog.write_text(assembled(changelog.read_text(encoding="utf-8"), ROOT / "changes"), encoding="utf-8")
