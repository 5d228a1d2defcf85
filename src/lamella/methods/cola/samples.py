"""The samples of CoLa: prompts with known answers, and the model's answers along any path of layers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch

from lamella.data import InputContext, Rows
from lamella.errors import CalibrationError
from lamella.methods.cola.prefix_tree import PrefixTree
from lamella.reading import read_rows
from lamella.signature import Fixture
from lamella.stack import Stack
from lamella.zoo import chat_inputs

Path = tuple[int, ...]
EXPECTED_FORMAT = (
    'write {"prompt": "...", "answer": "...", "options": ["...", "..."]}, with options only for a choice; '
    "'id' and 'wrong' may be there too"
)


@dataclass(frozen=True)
class Problem:
    """A prompt with its answer.

    Attributes:
        id: identifies the sample in results and journals.
        prompt: the text before the answer.
        answer: the right answer.
        options: for multiple choice, all options including the right answer. Their first tokens must differ, since the
            choice is read from the next token; write a leading space if the prompt does not end with one.
        wrong: for an open answer, wrong answers for the control; for multiple choice these are the other options.
    """

    id: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.id and self.prompt and plain(self.answer)):
            raise CalibrationError(f"sample '{self.id}': id, prompt and answer must not be empty")
        if self.options and not any(same(option, self.answer) for option in self.options):
            raise CalibrationError(f"sample '{self.id}': the answer '{self.answer}' is none of its options")

    @property
    def wrong_targets(self) -> list[str]:
        """The wrong answers for the control."""
        return [target for target in self.options or self.wrong if not same(target, self.answer)]


class Problems(Rows[Problem]):
    """The samples of a study, with the model's tokenizer."""

    metavar = "FILE"
    source_help = (
        'JSONL, one sample per line: {"prompt": "...\\nAnswer:", "answer": " B", "options": [" A", " B"]}. Without '
        "options the answer is generated and compared; 'wrong' can list wrong answers for the control"
    )
    example = Fixture(
        "questions.jsonl",
        '{"prompt": "Is ice cold? A yes, B no.\\nAnswer:", "answer": " A", "options": [" A", " B"]}\n'
        '{"prompt": "Two and two are", "answer": " four", "wrong": [" five"]}\n',
    )

    @classmethod
    def open(cls, name: str | File, context: InputContext) -> Problems:
        """Read samples from a file, see :func:`read_samples`.

        Args:
            name: the file.
            context: provides the tokenizer.
        """
        found = read_samples(name)
        content = File(name).expanduser().read_bytes()
        metadata = {"data": str(name), "samples": len(found), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(found, context.tokenizer, metadata)


def read_samples(file: str | File) -> list[Problem]:
    """Read samples from a JSONL file: one object per line, with the fields of :class:`Problem`; ``id`` is optional.

    Args:
        file: the JSONL file.

    Raises:
        CalibrationError: with the file, the line and the expected format.
    """
    samples = []
    for number, row in read_rows(file, EXPECTED_FORMAT):
        where = f"{file} line {number}"
        try:
            fields: dict[str, Any] = {"id": number} | row
            lists = {name: tuple(map(str, fields.pop(name, ()))) for name in ("options", "wrong")}
            fields = {name: str(value) for name, value in fields.items()} | lists
            samples.append(Problem(**fields))
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from None
        except TypeError:
            raise CalibrationError(f"{where}: {EXPECTED_FORMAT}") from None
    return check_samples(samples, str(file))


def check_samples(samples: Iterable[Problem], where: str) -> list[Problem]:
    """Return the samples as a list.

    Args:
        samples: the samples.
        where: their source, for messages.

    Raises:
        CalibrationError: if there are none, or two have the same id.
    """
    samples = list(samples)
    if not samples:
        raise CalibrationError(f"{where}: no samples; give at least one prompt with its answer")
    name, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise CalibrationError(f"{where}: {count} samples have the id '{name}'; give each its own id")
    return samples


def plain(answer: str) -> str:
    """Normalise an answer for comparison: its first line, without case, outer spaces and a final full stop."""
    return next(iter(answer.strip().splitlines()), "").strip().rstrip(".").casefold()


def same(answer: str, target: str) -> bool:
    """Return whether an answer equals the target after normalisation.

    Args:
        answer: the answer.
        target: the expected answer.
    """
    return plain(answer) == plain(target) != ""


class PathAnswerer:
    """Answer one sample with the model along any path.

    The answer to a multiple-choice question is read from the next-token distribution over the options, one forward pass
    per path; an open answer is generated greedily up to the end of its first line. Paths share common prefixes, see
    :class:`PrefixTree`.

    Args:
        stack: the opened model.
        tokenizer: its tokenizer.
        sample: the sample.
        tokens: maximum number of new tokens of an open answer.
        chat: whether to format the prompt with the chat template.
        known: cached answers by path.
        note: callback for each new answer.

    Attributes:
        tree: the hidden states of all paths.
        unshared: number of layers that would have been executed if every call ran its path separately.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: Any,
        sample: Problem,
        tokens: int = 10,
        chat: bool = False,
        known: dict[Path, str] | None = None,
        note: Callable[[Path, str], None] = lambda path, answer: None,
    ) -> None:
        self.sample, self.tokenizer, self.most, self.note = sample, tokenizer, tokens, note
        self.answers = dict(known or {})
        self.unshared = 0
        self._alone: dict[Path, int] = {}
        self.tree = PrefixTree(stack, prompt_tokens(tokenizer, sample.prompt, chat, stack.device))
        self.options = [tokenizer.encode(option, add_special_tokens=False)[:1] for option in sample.options]
        if len({*map(tuple, self.options)}) < len(self.options):
            raise CalibrationError(
                f"sample '{sample.id}': two options begin with the same token, so the next token cannot tell them "
                "apart; name them A, B, C ... in the prompt"
            )

    def __call__(self, path: Path) -> str:
        """Return the answer along this path; empty if the logits are not finite."""
        if path not in self.answers:
            before = self.tree.unshared
            self.answers[path] = self._choose(path) if self.options else self._write(path)
            self._alone[path] = self.tree.unshared - before
            self.note(path, self.answers[path])
        self.unshared += self._alone.get(path, 0)
        return self.answers[path]

    def _choose(self, path: Path) -> str:
        logits = self.tree.logits(path)[[token for (token,) in self.options]]
        return self.sample.options[int(logits.argmax())] if torch.isfinite(logits).all() else ""

    def _write(self, path: Path) -> str:
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        end = self.tokenizer.eos_token_id
        generated = self.tree.greedy(path, self.most, lambda token: token == end or "\n" in decode([token]))
        return str(decode(generated)).split("\n")[0]


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool, device: torch.device) -> torch.Tensor:
    """Tokenise a prompt [1, time].

    Args:
        tokenizer: the tokenizer.
        prompt: the prompt.
        chat: whether to format it with the chat template.
        device: device of the result.
    """
    if chat:
        return chat_inputs(tokenizer, [{"role": "user", "content": prompt}], device)["input_ids"]
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids.to(device)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
