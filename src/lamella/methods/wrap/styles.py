"""The styles: what a rephraser is asked for, in files that each run names by their content.

easy      a very small vocabulary, for a child
medium    diverse, high-quality English as in an encyclopaedia: the paper's main one
hard      terse and abstruse, for a scholar
qa        a conversation of questions and answers
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import MethodError
from lamella.reading import read_text

PROMPTS = Path(__file__).with_name("prompts")
KNOWN = ("easy", "medium", "hard", "qa")
PLACE = "{passage}"
REAL = "real"  # what documents are called that are as they were
SYSTEM = (PROMPTS / "system.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Style:
    """One way to say it again.

    Attributes:
        name: of a known style, or of the file.
        instruction: with a place for the passage.
        ratio: tokens of the answer for one of the passage, at most.
        longest: tokens of the answer for one of the passage, above which it is dropped.
        answers: whether it must have questions and answers.
    """

    name: str
    instruction: str
    ratio: float = 1.5
    longest: float = 2.5
    answers: bool = False

    @property
    def digest(self) -> str:
        """Of all that the rephraser is told beside the passage."""
        return hashlib.sha256(f"{SYSTEM}\n{self.instruction}".encode()).hexdigest()[:12]

    def messages(self, passage: str) -> list[dict[str, str]]:
        """The conversation that asks for one rephrase."""
        asked = self.instruction.replace(PLACE, passage.strip())
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def open_styles(names: tuple[str, ...]) -> list[Style]:
    """Styles by their names, or by files that say what is wanted around ``{passage}``.

    Raises:
        MethodError: for a style that is unknown, named twice or as real text is, or has no place for the passage.
    """
    if len(set(names)) < len(names):
        raise MethodError(f"styles {', '.join(names)}: name some of {', '.join(KNOWN)}, each once")
    styles = [_open(name) for name in names]
    called = [style.name for style in styles]
    again = next((each for each in called if each == REAL or called.count(each) > 1), None)
    if again is not None:
        others = "real text is" if again == REAL else "another style is"
        raise MethodError(f"styles {', '.join(names)}: one is called '{again}' as {others}: rename its file")
    return styles


def _open(name: str) -> Style:
    if name in KNOWN:
        text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").strip()
        return Style(name, text, 2.0, 3.0, True) if name == "qa" else Style(name, text)
    if not name.endswith(".txt"):
        raise MethodError(f"no style '{name}'; there are {', '.join(KNOWN)}, or name a .txt file with {PLACE} in it")
    text = read_text(name, "give a text file that says what is wanted").strip()
    if PLACE not in text:
        raise MethodError(f"{name} does not say where the passage goes: write {PLACE} there")
    return Style(Path(name).stem, text)
