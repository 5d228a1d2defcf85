"""Questions that many answers are right for: one random character of a set, and what there is to name of a kind.

The Constrained Random Character task asks for "a random vowel" and the like. It is built in twice, in other words and
with other sets: one split to choose on, one to report on.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamella.data.context import InputContext
from lamella.data.sources import SPLITS, Split
from lamella.errors import CalibrationError
from lamella.methods.slr.answers import Asked, Question
from lamella.reading import read_rows
from lamella.signature import Fixture
from lamella.zoo.opening import chat_text

HINT = 'write one object a line, such as {"prompt": "Pick a random vowel.", "answers": ["A", "E"]}'
GIVE = "give crc or a .jsonl file of questions"
FORMS = ("", " ")  # "7" and " 7" are different tokens that say the same

_ALPHABET = string.ascii_uppercase
_CONSONANTS = "".join(letter for letter in _ALPHABET if letter not in "AEIOU")
SETS: dict[Split, dict[str, dict[str, str]]] = {  # family, what is asked for, the set
    "calibration": {
        "letters": {
            "capital vowel": "AEIOU",
            "capital consonant": _CONSONANTS,
            "capital letter": _ALPHABET,
            "capital letter from A to E": "ABCDE",
            "capital letter from F to M": "FGHIJKLM",
            "capital letter from N to Z": "NOPQRSTUVWXYZ",
            "capital letter before H": "ABCDEFG",
            "capital letter after S": "TUVWXYZ",
            "letter of the word PLANET": "PLANET",
            "letter of the word BRIDGE": "BRIDGE",
        },
        "digits": {
            "digit": "0123456789",
            "even digit": "02468",
            "odd digit": "13579",
            "digit above 4": "56789",
            "digit below 6": "012345",
            "digit from 2 to 7": "234567",
            "digit from 3 to 8": "345678",
            "prime digit": "2357",
            "digit out of 1, 4 and 9": "149",
            "digit of the number 1729": "1729",
        },
    },
    "test": {
        "letters": {
            "capital letter from C to J": "CDEFGHIJ",
            "capital letter from K to R": "KLMNOPQR",
            "capital letter from P to W": "PQRSTUVW",
            "capital letter before L": "ABCDEFGHIJK",
            "capital letter after P": "QRSTUVWXYZ",
            "capital letter out of A, B, C and D": "ABCD",
            "capital letter out of X, Y and Z": "XYZ",
            "letter of the word SILVER": "SILVER",
            "letter of the word MONKEY": "MONKEY",
            "letter of the word GARDEN": "GARDEN",
        },
        "digits": {
            "digit above 2": "3456789",
            "digit below 4": "0123",
            "digit from 1 to 5": "12345",
            "digit from 4 to 9": "456789",
            "digit from 5 to 8": "5678",
            "even digit above 1": "2468",
            "odd digit below 8": "1357",
            "digit out of 3, 6 and 9": "369",
            "digit of the number 3584": "3584",
            "digit of the number 60721": "60721",
        },
    },
}
_TEMPLATES: dict[Split, tuple[str, str]] = {
    "calibration": (
        "Pick a random {what}. Answer with that one character only.",
        "Give me one {what}, chosen at random. Reply with nothing but the character.",
    ),
    "test": (
        "I need a random {what}. Say just the character.",
        "At random, which {what} do you choose? Write the single character alone.",
    ),
}


@dataclass(frozen=True)
class Questions:
    """Questions with one-token answers, in two splits.

    Attributes:
        search: to choose on.
        report: to report on; None where all are to choose on.
        tokenizer: that they were read with; None for token ids.
        said: what provenance says of each split.
    """

    search: Asked
    report: Asked | None = None
    tokenizer: Any = None
    said: Mapping[str, Any] = field(default_factory=dict)

    default = "crc"
    metavar = "FILE"
    source_help = (
        "crc: one random character of a set, built in. Or a .jsonl file of your own, one question a line: "
        '{"prompt": "Pick a random vowel.", "answers": ["A", "E", "I", "O", "U"]}. Answers are single tokens; every '
        "other line is kept to report on"
    )
    example = Fixture(
        "questions.jsonl",
        '{"prompt": "Pick a random vowel.", "answers": ["A", "E", "I", "O", "U"]}\n'
        '{"prompt": "Name an even digit.", "answers": ["0", "2", "4", "6", "8"]}\n'
        '{"prompt": "Pick a letter before E.", "answers": ["A", "B", "C", "D"]}\n'
        '{"prompt": "Name an odd digit.", "answers": ["1", "3", "5", "7", "9"]}\n',
    )

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that questions are built in, or that there is such a file.

        Raises:
            CalibrationError: one line that says what is missing.
        """
        if str(name) != "crc" and not Path(name).expanduser().is_file():
            raise CalibrationError(f"{name} cannot be read (there is no such file): {GIVE}")

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, prefill: str = "") -> Questions:
        """Both splits of some questions, as a model reads them.

        Args:
            name: see :func:`load_questions`.
            prefill: what the answer begins with, such as the closed reasoning of a model that thinks.

        Raises:
            CalibrationError: for questions that cannot be read, or answered with one token.
        """
        splits = {"search": load_questions(name, "calibration"), "report": load_questions(name, "test")}
        asked = {role: ask(context.tokenizer, questions, prefill) for role, questions in splits.items()}
        said = {role: _described(str(name), role, splits[role], asked[role]) for role in splits}
        return cls(asked["search"], asked["report"], context.tokenizer, said)

    def describe(self) -> Any:
        """What provenance says of them."""
        return dict(self.said) or {"questions": len(self.search)}


def _described(name: str, role: str, questions: Sequence[Question], asked: Asked) -> dict[str, Any]:
    text = json.dumps([[each.prompt, each.answers] for each in questions])
    return {
        "data": name,
        "split": "calibration" if role == "search" else "test",
        "questions": len(questions),
        "tokens": int(asked.attention_mask.sum()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def crc(split: Split) -> list[Question]:
    """The built-in Constrained Random Character task: 20 questions for letters and 20 for digits.

    Args:
        split: ``calibration`` to choose on, ``test`` to report on.
    """
    if split not in SPLITS:
        raise CalibrationError(f"unknown split '{split}'; the questions have the splits {' and '.join(SPLITS)}")
    return [
        Question(template.format(what=what), tuple(answers), family)
        for family, sets in SETS[split].items()
        for template in _TEMPLATES[split]
        for what, answers in sets.items()
    ]


def load_questions(name_or_path: str | Path, split: Split) -> list[Question]:
    """One split of some questions: ``crc``, or a ``.jsonl`` file whose lines go to the two splits in turn.

    Args:
        name_or_path: a file has one object a line, with ``prompt``, ``answers`` and, where there are several kinds,
            ``family``.

    Raises:
        CalibrationError: for a file that is missing or damaged, with the line, or that has a single question.
    """
    if str(name_or_path) == "crc":
        return crc(split)
    found = read_questions(name_or_path)
    if len(found) < 2:
        raise CalibrationError(f"{name_or_path}: holds {len(found)} question; give 2 or more: half are to report on")
    return found[SPLITS.index(split) :: 2]


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file; see :func:`load_questions`."""
    rows = read_rows(path, HINT, GIVE)
    return [_question(row, f"{path} line {number}") for number, row in rows]


def _question(row: Any, where: str) -> Question:
    try:
        answers = row["answers"]
        if not isinstance(row["prompt"], str) or not all(isinstance(each, str) for each in answers):
            raise TypeError
        return Question(row["prompt"], tuple(answers), str(row.get("family", "")))
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise CalibrationError(f"{where}: {HINT}") from None


def ask(tokenizer: Any, questions: Sequence[Question], prefill: str = "") -> Asked:
    """Questions as a model reads them, through the chat template where there is one.

    An answer counts in every form that is one token behind its prompt: as it is, and with a space before it.

    Args:
        tokenizer: the post-trained model's.
        prefill: what stands at the beginning of the answer, such as the closed reasoning of a model that thinks first.

    Raises:
        CalibrationError: for an answer that is no single token in any form, or two that are the same token.
    """
    prompts, tokens = [], []
    for question in questions:
        text, special = chat_text(tokenizer, [{"role": "user", "content": question.prompt}])
        text += prefill
        prompt = tokenizer(text, add_special_tokens=special)["input_ids"]
        sets = []
        for answer in question.answers:
            whole = [tokenizer(text + form + answer, add_special_tokens=special)["input_ids"] for form in FORMS]
            single = [ids[-1] for ids in whole if ids[:-1] == prompt]
            if not single:
                raise CalibrationError(
                    f"question '{question.prompt[:60]}': the answer '{answer}' is no single token behind the prompt, "
                    "so one forward pass cannot say how likely it is; ask for single characters"
                )
            sets.append(single)
        prompts.append(prompt)
        tokens.append(sets)
    return Asked.of(questions, prompts, tokens)
