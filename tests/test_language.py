"""The words that CONTRIBUTING.md discourages occur neither in code and messages, nor in the documentation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted((ROOT / "src").rglob("*.py"))
PROSE = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "changes").glob("*.md")),
    *sorted((ROOT / "src").rglob("*.html")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
]

# Discouraged words in prose, as patterns, and what to write instead.
PHRASES = {
    r"streams?": "residual stream, or hidden states",
    r"pictures?|pictured": "image, figure or plot",
    r"linear maps?": "linear layer, projection or weight matrix",
    r"anew|afresh": "again",
    r"to the bit": "bit-exact, or bitwise equal",
    r"(?:by|of the|at) chance": "random, or at random",
    r"mends?|mended|mending": "fix, repair or heal",
    r"said|told": "metadata, findings or description",
    r"kept back|further text": "held-out, validation or test split",
    r"decides? while (?:it|the model) runs": "dynamic, or input-dependent",
    r"the house(?:'s)?": "Lamella, or the runner",
    r"he|his|him": "it, or they",
    r"times as fast": "speed-up",
    r"what (?:it|the model) reads with": "processor, tokenizer or loader",
    r"so many|so much": "a plain count",
}
# Words that are no part of a name in code.
WORDS = {
    "stream", "streams", "picture", "pictures", "said", "told", "mend", "mends", "mended", "anew", "heard",
    "hurried",
}  # fmt: skip

# What is quoted from other programs, file formats and papers, and words in their ordinary meaning.
QUOTED = re.compile(
    r"residual[\s-]+streams?|stream(?:s|ed|ing|er)\b(?= (?:of|from) (?:bytes|events|requests|documents))|stream=|"
    r"streaming|(?:byte|event|input|output|error|data|random|text) streams?|end of stream|end-of-stream|"
    r"Is it (?:said|told)|https?://\S+|`[^`\n]*`|\"[^\"\n]{0,200}\"(?=,? (?:it|she|he) said)",
    re.IGNORECASE,
)
# Words that are the right ones in a file.
FILES = {
    "src/lamella/data/sources.py": {"he", "his", "said"},  # a story, as an example of a text
    "src/lamella/methods/depth_efficiency": {
        "linear map",
        "linear maps",
    },  # between two residual streams, as in the paper
    "src/lamella/methods/hires_llava/entities.py": {"picture"},  # questions of a dataset, like those that follow
    "src/lamella/methods/kore/glyphs.py": {"picture", "said"},
    "src/lamella/methods/kore/augment.py": {"picture"},  # part of a random seed
    "src/lamella/methods/paser": {"he"},  # the first author
    "docs/methods/paser.md": {"he"},
    "src/lamella/reading.py": {"stream"},  # a class of pyarrow
    "src/lamella/cli/serving": {"stream"},  # of text, in transformers' names
    "src/lamella/zoo/worlds/language.py": {"picture"},
    "src/lamella/methods/irepair/pairs.py": {"said"},
    "src/lamella/methods/refacade": {"stream", "streams"},  # of a video file, and of a two-stream transformer
    "docs/methods/refacade.md": {"streams"},
    "src/lamella/methods/ssd/percentile.py": {"stream"},  # of values, which are read twice
    "src/lamella/plan/checkpoint.py": {"stream"},  # of bytes, as in the next two
    "src/lamella/plan/sidefile.py": {"stream"},
    "src/lamella/zoo/pull.py": {"stream"},
}


def allowed(where: str) -> set[str]:
    """The discouraged words that are right in a file."""
    return {word for file, words_of in FILES.items() if where.startswith(file) for word in words_of}


def found(text: str, where: str) -> Iterator[str]:
    """Yield a line for each discouraged phrase in a text."""
    right = allowed(where)
    plain = QUOTED.sub(lambda match: " " * len(match[0]), text)
    for pattern, instead in PHRASES.items():
        for match in re.finditer(rf"(?<![\w`/.-])(?:{pattern})(?![\w`])", plain, re.IGNORECASE):
            if match[0].lower() not in right:
                line = " ".join(text[max(match.start() - 30, 0) : match.end() + 30].split())
                yield f"{where}: '{match[0]}' in '{line}'; write {instead}"


def words(name: str) -> list[str]:
    """Split an identifier into its words."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", name)]


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT / "src" / "lamella")))
def test_code_and_messages_use_the_terms_of_the_field(file: Path) -> None:
    where, wrong = str(file.relative_to(ROOT)), []
    discouraged = WORDS - allowed(where)
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        line = f"{where} line {token.start[0]}"
        if token.type == tokenize.NAME:
            wrong += [
                f"{line}: the name {token.string} has '{word}'" for word in words(token.string) if word in discouraged
            ]
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            wrong += found(token.string, line)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", PROSE, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_documentation_uses_the_terms_of_the_field(file: Path) -> None:
    wrong = list(found(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))))
    assert not wrong, "\n".join(wrong)


def test_discouraged_words_are_found() -> None:
    for bad in (
        "the stream of a layer",
        "A picture",
        "it is drawn anew",
        "equal to the bit",
        "what is said",
        "he reads",
    ):
        assert list(found(bad, "text"))
    for fine in ("the residual stream", "streaming", "`told`", "the head", "a chance event", "image"):
        assert not list(found(fine, "text"))


PROTOCOL = {"Form"}  # the class by which a plan finds the settings of a method's `rewrite`


def test_class_names_are_unique() -> None:
    """A class name means one thing in the whole package."""
    files: dict[str, list[str]] = {}
    for file in PYTHON:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name not in PROTOCOL:
                files.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert not {name: found for name, found in files.items() if len(found) > 1}
