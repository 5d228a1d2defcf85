"""Questions with many correct answers: one random character of a set, or questions from a file.

The Constrained Random Character task asks for "a random vowel" and the like. Two versions with different wording and
different sets are built in: one split to choose on, and a held-out one.
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
from lamella.methods.slr.answers import ChoiceQuestion, EncodedQuestions
from lamella.reading import read_rows
from lamella.signature import Fixture
from lamella.zoo.opening import chat_text

HINT = 'write one object per line, such as {"prompt": "Pick a random vowel.", "answers": ["A", "E"]}'
GIVE = "give crc or a .jsonl file of questions"
FORMS = ("", " ")  # "7" and " 7" are different tokens with the same meaning

_ALPHABET = string.ascii_uppercase
_CONSONANTS = "".join(letter for letter in _ALPHABET if letter not in "AEIOU")
SETS: dict[Split, dict[str, dict[str, str]]] = {  # family, description, the set
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
        search: the questions to choose on.
        report: the held-out questions; None if there are none.
        tokenizer: the tokenizer that encoded them; None for token ids.
        metadata: the provenance of each split.
    """

    search: EncodedQuestions
    report: EncodedQuestions | None = None
    tokenizer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    default = "crc"
    metavar = "FILE"
    source_help = (
        "crc: one random character of a set, built in. Or a .jsonl file of your own, one question per line: "
        '{"prompt": "Pick a random vowel.", "answers": ["A", "E", "I", "O", "U"]}. Answers are single tokens; every '
        "other line is held out for the report"
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
        """Check that questions are built in, or that the file exists.

        Raises:
            CalibrationError: if the file is missing.
        """
        if str(name) != "crc" and not Path(name).expanduser().is_file():
            raise CalibrationError(f"{name} cannot be read (there is no such file): {GIVE}")

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, prefill: str = "") -> Questions:
        """Load both splits of some questions and encode them.

        Args:
            name: see :func:`load_questions`.
            context: the context of the model, with its tokenizer.
            prefill: the beginning of the answer, such as the closed reasoning block of a reasoning model.

        Raises:
            CalibrationError: for questions that cannot be read, or not be answered with one token.
        """
        splits = {"search": load_questions(name, "calibration"), "report": load_questions(name, "test")}
        encoded = {role: encode_questions(context.tokenizer, questions, prefill) for role, questions in splits.items()}
        metadata = {role: _describe(str(name), role, splits[role], encoded[role]) for role in splits}
        return cls(encoded["search"], encoded["report"], context.tokenizer, metadata)

    def describe(self) -> Any:
        """Return the metadata for provenance."""
        return dict(self.metadata) or {"questions": len(self.search)}


def _describe(name: str, role: str, questions: Sequence[ChoiceQuestion], encoded: EncodedQuestions) -> dict[str, Any]:
    text = json.dumps([[each.prompt, each.answers] for each in questions])
    return {
        "data": name,
        "split": "calibration" if role == "search" else "test",
        "questions": len(questions),
        "tokens": int(encoded.attention_mask.sum()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def crc(split: Split) -> list[ChoiceQuestion]:
    """Return the built-in Constrained Random Character task: 20 questions for letters and 20 for digits.

    Args:
        split: ``calibration`` to choose on, ``test`` to report on.
    """
    if split not in SPLITS:
        raise CalibrationError(f"unknown split '{split}'; the questions have the splits {' and '.join(SPLITS)}")
    return [
        ChoiceQuestion(template.format(what=what), tuple(answers), family)
        for family, sets in SETS[split].items()
        for template in _TEMPLATES[split]
        for what, answers in sets.items()
    ]


def load_questions(name_or_path: str | Path, split: Split) -> list[ChoiceQuestion]:
    """Load one split of the questions: ``crc``, or a ``.jsonl`` file whose lines alternate between the two splits.

    Args:
        name_or_path: ``crc``, or a file with one object per line, with ``prompt``, ``answers`` and optionally
            ``family``.
        split: ``calibration`` or ``test``.

    Raises:
        CalibrationError: for a file that is missing or damaged, with the line, or that has a single question.
    """
    if str(name_or_path) == "crc":
        return crc(split)
    found = read_questions(name_or_path)
    if len(found) < 2:
        raise CalibrationError(f"{name_or_path}: holds {len(found)} question; give 2 or more: half are held out")
    return found[SPLITS.index(split) :: 2]


def read_questions(path: str | Path) -> list[ChoiceQuestion]:
    """Read all questions of a file; see :func:`load_questions`."""
    rows = read_rows(path, HINT, GIVE)
    return [_question(row, f"{path} line {number}") for number, row in rows]


def _question(row: Any, where: str) -> ChoiceQuestion:
    try:
        answers = row["answers"]
        if not isinstance(row["prompt"], str) or not all(isinstance(each, str) for each in answers):
            raise TypeError
        return ChoiceQuestion(row["prompt"], tuple(answers), str(row.get("family", "")))
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise CalibrationError(f"{where}: {HINT}") from None


def encode_questions(tokenizer: Any, questions: Sequence[ChoiceQuestion], prefill: str = "") -> EncodedQuestions:
    """Encode questions, using the chat template if there is one.

    An answer counts in every form that is one token after its prompt: as it is, and with a space before it.

    Args:
        tokenizer: the post-trained model's tokenizer.
        questions: the questions.
        prefill: the beginning of the answer, such as the closed reasoning block of a reasoning model.

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
                    f"question '{question.prompt[:60]}': the answer '{answer}' is no single token after the prompt, "
                    "so one forward pass cannot measure its probability; use single characters"
                )
            sets.append(single)
        prompts.append(prompt)
        tokens.append(sets)
    return EncodedQuestions.of(questions, prompts, tokens)
