"""Steps 3 and 4: what the rewriter is asked, and how its answer is read, so that no thinking is ever trained on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import MethodError
from lamella.reading import read_text

PROMPTS = Path(__file__).with_name("prompts")
KNOWN = ("guided", "short")
PLACE = "{document}"


def _marker(*kinds: str) -> re.Pattern[str]:
    """A marker as models write it, of one of some kinds: case and spaces vary, the bracket does not."""
    return re.compile(rf"[<\[]\s*(?:{'|'.join(kinds)})\s*[>\]]", re.IGNORECASE)


BEGIN, END, RESPONSE = r"[\s_-]*(?:starts?|begins?)", r"[\s_-]*ends?", r"/?\s*improved[\s_-]*response"
STARTS, ENDS = _marker(RESPONSE + BEGIN), _marker(RESPONSE + END)
THINKING = _marker(rf"/?\s*thinking{BEGIN}", "think(?:ing)?")  # also as models that reason unasked mark it
THOUGHT = _marker(rf"/?\s*thinking{END}", r"/\s*think(?:ing)?")
ANY = re.compile("|".join(each.pattern for each in (STARTS, ENDS, THINKING, THOUGHT)), re.IGNORECASE)
FAILURES = ("no response", "unclosed", "thinking", "marker", "empty")


@dataclass(frozen=True)
class Guide:
    """What the rewriter is asked.

    Attributes:
        name: of a known prompt, or of the file.
        instruction: with a place for the document.
    """

    name: str
    instruction: str

    @classmethod
    def open(cls, name: str) -> Guide:
        """A prompt by its name: ``guided`` has all parts of the paper's, ``short`` is for small models; or a .txt file.

        Raises:
            MethodError: for a prompt that is unknown, or has no place for the document or no markers.
        """
        if name in KNOWN:
            return cls(name, (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").strip())
        if not name.endswith(".txt"):
            raise MethodError(
                f"no prompt '{name}'; there are {', '.join(KNOWN)}, or name a .txt file with {PLACE} in it"
            )
        text = read_text(name, "give a text file that says what is wanted").strip()
        if PLACE not in text or not STARTS.search(text) or not ENDS.search(text):
            raise MethodError(
                f"{name}: write {PLACE} where the document goes, and ask for <improved response starts> and <improved "
                "response ends> around the text"
            )
        return cls(Path(name).stem, text)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.instruction.encode()).hexdigest()[:12]

    def messages(self, document: str) -> list[dict[str, str]]:
        """One message of the user and no system, as the paper has it."""
        return [{"role": "user", "content": self.instruction.replace(PLACE, document.strip())}]


def parsed(answer: str) -> tuple[str, str | None]:
    """The improved response in an answer, or why there is none.

    Only what stands behind the end of the thinking counts: a plan may quote the markers.

    Returns:
        (text, None), or ("", one of :data:`FAILURES`).
    """
    thoughts = list(THOUGHT.finditer(answer))
    behind = answer[thoughts[-1].end() :] if thoughts else answer
    start = STARTS.search(behind)
    if THINKING.search(behind[: start.start()] if start else behind):  # begun, and not ended
        return "", "thinking"
    if start is None:
        return "", "no response"
    end = ENDS.search(behind, start.end())
    if end is None:
        return "", "unclosed"
    text = behind[start.end() : end.start()].strip()
    if ANY.search(text):
        return "", "marker"
    return (text, None) if text else ("", "empty")
