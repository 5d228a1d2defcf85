"""The styles: prompts of the rephraser, in files that are identified by their content in each run.

easy      a very small vocabulary, for a child
medium    diverse, high-quality English as in an encyclopaedia: the paper's main style
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
PLACEHOLDER = "{passage}"
REAL = "real"  # the name of original documents
SYSTEM = (PROMPTS / "system.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Style:
    """One style of rephrasing.

    Attributes:
        name: the name of a known style, or of the file.
        instruction: the prompt, with a placeholder for the passage.
        ratio: maximum tokens of the output relative to the passage.
        longest: tokens relative to the passage above which the output is dropped.
        answers: whether it must contain questions and answers.
    """

    name: str
    instruction: str
    ratio: float = 1.5
    longest: float = 2.5
    answers: bool = False

    @property
    def digest(self) -> str:
        """A digest of the prompt without the passage."""
        return hashlib.sha256(f"{SYSTEM}\n{self.instruction}".encode()).hexdigest()[:12]

    def messages(self, passage: str) -> list[dict[str, str]]:
        """Return the conversation that requests one rephrase."""
        content = self.instruction.replace(PLACEHOLDER, passage.strip())
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def open_styles(names: tuple[str, ...]) -> list[Style]:
    """Open styles by their names, or from files with an instruction that contains ``{passage}``.

    Raises:
        MethodError: for a style that is unknown, given twice, named like the real text, or without a placeholder.
    """
    if len(set(names)) < len(names):
        raise MethodError(f"styles {', '.join(names)}: give some of {', '.join(KNOWN)}, each once")
    styles = [_open(name) for name in names]
    style_names = [style.name for style in styles]
    duplicate = next((each for each in style_names if each == REAL or style_names.count(each) > 1), None)
    if duplicate is not None:
        others = "the real text" if duplicate == REAL else "another style"
        raise MethodError(f"styles {', '.join(names)}: one has the name '{duplicate}' of {others}: rename its file")
    return styles


def _open(name: str) -> Style:
    if name in KNOWN:
        text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").strip()
        return Style(name, text, 2.0, 3.0, True) if name == "qa" else Style(name, text)
    if not name.endswith(".txt"):
        raise MethodError(f"unknown style '{name}'; use {', '.join(KNOWN)}, or a .txt file that contains {PLACEHOLDER}")
    text = read_text(name, "give a text file with the instruction").strip()
    if PLACEHOLDER not in text:
        raise MethodError(f"{name} does not contain the placeholder of the passage: add {PLACEHOLDER}")
    return Style(Path(name).stem, text)
