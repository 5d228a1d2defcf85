"""Prompts with their answers, from JSON lines, as training samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamella.data.context import InputContext
from lamella.data.records import PROMPTS, RESPONSES
from lamella.data.rows import Rows
from lamella.data.samples import Sample, pairs
from lamella.errors import CalibrationError
from lamella.reading import read_rows
from lamella.signature import Fixture
from lamella.zoo.opening import chat_text

HINT = 'write {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
ROWS = (("What is red and round?", "An apple."), ("What is long and yellow?", "A banana."), ("What purrs?", "A cat."),
        ("What barks?", "A dog."), ("What swims?", "A fish."), ("What flies?", "A bird."), ("What hops?", "A frog."),
        ("What melts?", "Ice."))  # fmt: skip


class ChatExample(NamedTuple):
    """One example as text: a conversation up to where the answer begins, and the answer."""

    messages: list[dict[str, str]]
    answer: str

    @classmethod
    def of(cls, row: Any, prompts: Sequence[str] = PROMPTS, answers: Sequence[str] = RESPONSES) -> ChatExample | None:
        """Return the example in a row of a file; None if it holds no prompt with an answer.

        Args:
            row: an object with ``messages``, of which the last one is the answer, or a prompt and its answer.
            prompts: names of fields that hold a prompt.
            answers: names of fields that hold an answer.
        """
        *before, last = conversation(row, prompts, answers) or [{}]
        if not before or last.get("role") != "assistant" or not last["content"].strip():
            return None
        return cls(before, last["content"])

    def tokenized_by(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Return the token ids of the conversation, in the model's chat template, and of the answer with its end."""
        text, special = chat_text(tokenizer, self.messages)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer = tokenizer(self.answer, add_special_tokens=False)["input_ids"]
        return tokenizer(text, add_special_tokens=special)["input_ids"], [*answer, *end]


class Examples(Rows[Sample]):
    """Tokenized examples; the answer of each carries loss and ends with the end-of-sequence token."""

    metavar = "FILE"
    source_help = (
        'a .jsonl file with an example in each line: {"prompt": "...", "completion": "..."}, or {"messages": [...]} '
        "whose last one is the answer"
    )
    example = Fixture(
        "examples.jsonl",
        "".join(f'{{"prompt": "{prompt}", "completion": "{answer}"}}\n' for prompt, answer in ROWS),
    )

    @classmethod
    def open(cls, name: str | Path, context: InputContext, *, max_length: int = 2048) -> Examples:
        """Read examples and render them with the model's chat template, if it has one.

        Args:
            name: the file.
            context: gives the tokenizer.
            max_length: maximum number of tokens of an example; longer answers are truncated.

        Raises:
            CalibrationError: if the file is missing, empty or malformed; the message names the line.
        """
        found = read_examples(name)
        tokenizer = context.tokenizer
        samples = pairs([each.tokenized_by(tokenizer) for each in found], max_length=max_length)
        content = Path(name).expanduser().read_bytes()
        metadata = {"data": str(name), "examples": len(samples), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(samples, tokenizer, metadata)


def read_examples(
    path: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    answers: Sequence[str] = RESPONSES,
    hint: str = HINT,
) -> list[ChatExample]:
    """Read the examples of a ``.jsonl`` file in their order.

    Args:
        path: the file; each line has ``messages``, of which the last one is the answer, or a prompt and its answer.
        prompts: names of fields that hold a prompt.
        answers: names of fields that hold an answer.
        hint: the expected form of a line, for error messages.

    Raises:
        CalibrationError: if the file is missing or empty, or a line has no prompt or no answer.
    """
    found = []
    for number, row in read_rows(path, hint):
        example = ChatExample.of(row, prompts, answers)
        if example is None:
            raise CalibrationError(f"{path} line {number} has no prompt with an answer: {hint}")
        found.append(example)
    if not found:
        raise CalibrationError(f"{path} holds no examples: {hint}")
    return found


def conversation(
    row: Any, prompts: Sequence[str] = PROMPTS, answers: Sequence[str] = RESPONSES
) -> list[dict[str, str]]:
    """Return a row of a file as a conversation, with or without an answer at its end; empty if it is none.

    Args:
        row: the row; see :meth:`ChatExample.of`.
        prompts: names of fields that hold a prompt.
        answers: names of fields that hold an answer.
    """
    if not isinstance(row, dict):
        return []
    messages: Sequence[Any] = row.get("messages") or []
    if isinstance(messages, list) and messages:
        whole = all(isinstance(each, dict) and isinstance(each.get("content"), str) for each in messages)
        return [{"role": str(each.get("role")), "content": each["content"]} for each in messages] if whole else []
    texts = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    prompt, answer = (next((texts[name] for name in names if name in texts), None) for names in (prompts, answers))
    if prompt is None:
        return []
    prompt = f"{prompt}\n{texts['input']}" if "input" in texts else prompt
    answered = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [{"role": "user", "content": prompt}, *answered]
