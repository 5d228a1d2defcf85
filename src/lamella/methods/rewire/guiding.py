"""Steps 3 and 4: the prompt of the rewriter, and the parsing of its answer without the reasoning."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import MethodError
from lamella.reading import read_text

PROMPTS = Path(__file__).with_name("prompts")
KNOWN = ("guided", "short")
PLACEHOLDER = "{document}"
PARTS = re.compile(r"^=====$", re.MULTILINE)  # between the instruction and the parts of an example


def _marker(*kinds: str) -> re.Pattern[str]:
    """Match a marker of some kinds as models write it: case and spaces vary, the bracket does not."""
    return re.compile(rf"[<\[]\s*(?:{'|'.join(kinds)})\s*[>\]]", re.IGNORECASE)


BEGIN, END, RESPONSE = r"[\s_-]*(?:starts?|begins?)", r"[\s_-]*ends?", r"/?\s*improved[\s_-]*response"
STARTS, ENDS = _marker(RESPONSE + BEGIN), _marker(RESPONSE + END)
THINKING = _marker(rf"/?\s*thinking{BEGIN}", "think(?:ing)?")  # including the markers of reasoning models
THOUGHT = _marker(rf"/?\s*thinking{END}", r"/\s*think(?:ing)?")
ANY = re.compile("|".join(each.pattern for each in (STARTS, ENDS, THINKING, THOUGHT)), re.IGNORECASE)
FAILURES = ("no response", "unclosed", "thinking", "marker", "empty")


@dataclass(frozen=True)
class Guide:
    """The prompt of the rewriter.

    Attributes:
        name: name of a built-in prompt, or of the file.
        instruction: the text, with a placeholder for the document.
        example: a draft and its answer, which precede the document as an earlier turn; None without.
    """

    name: str
    instruction: str
    example: tuple[str, str] | None = None

    @classmethod
    def open(cls, name: str) -> Guide:
        """Open a prompt.

        Args:
            name: ``guided`` has all parts of the paper's; ``short``, for small models, shows them an example, without
                which they ignore the markers; or a .txt file with the instruction, to which a draft and its answer may
                be added as an example, each after a line of five equals signs.

        Raises:
            MethodError: for an unknown prompt, or one without the placeholder or the markers.
        """
        if name not in KNOWN and not name.endswith(".txt"):
            raise MethodError(
                f"no prompt '{name}'; give one of {', '.join(KNOWN)}, or a .txt file with {PLACEHOLDER} in it"
            )
        if name in KNOWN:
            text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")
        else:
            text = read_text(name, "give a text file with the instruction")
        instruction, *example = (part.strip() for part in PARTS.split(text))
        if PLACEHOLDER not in instruction or not STARTS.search(instruction) or not ENDS.search(instruction):
            raise MethodError(
                f"{name}: write {PLACEHOLDER} at the position of the document, and request <improved response starts> "
                "and <improved response ends> around the text"
            )
        if example and (len(example) != 2 or parse_answer(example[1])[1]):
            raise MethodError(
                f"{name}: an example is a draft and an answer with <improved response starts> and <improved response "
                "ends>, each after a line of ====="
            )
        return cls(Path(name).stem, instruction, (example[0], example[1]) if example else None)

    @property
    def digest(self) -> str:
        """A digest of the prompt."""
        parts = [self.instruction, *(self.example or ())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def messages(self, document: str) -> list[dict[str, str]]:
        """Return the conversation up to the answer: a user message as in the paper, after the example if there is one.

        There is no system prompt.
        """

        def asked(text: str) -> dict[str, str]:
            return {"role": "user", "content": self.instruction.replace(PLACEHOLDER, text.strip())}

        if self.example is None:
            return [asked(document)]
        draft, answer = self.example
        return [asked(draft), {"role": "assistant", "content": answer}, asked(document)]


def parse_answer(answer: str) -> tuple[str, str | None]:
    """Extract the improved response from an answer, or the reason why there is none.

    Only text after the end of the reasoning counts, since a plan may quote the markers.

    Returns:
        (text, None), or ("", one of :data:`FAILURES`).
    """
    ends_of_thinking = list(THOUGHT.finditer(answer))
    remainder = answer[ends_of_thinking[-1].end() :] if ends_of_thinking else answer
    start = STARTS.search(remainder)
    if THINKING.search(remainder[: start.start()] if start else remainder):  # started, but not ended
        return "", "thinking"
    if start is None:
        return "", "no response"
    end = ENDS.search(remainder, start.end())
    if end is None:
        return "", "unclosed"
    text = remainder[start.end() : end.start()].strip()
    if ANY.search(text):
        return "", "marker"
    return (text, None) if text else ("", "empty")
