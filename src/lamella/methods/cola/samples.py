"""The samples of CoLa: prompts with known answers, and what a model answers to them along any path of layers."""

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
HINT = (
    'write {"prompt": "...", "answer": "...", "options": ["...", "..."]}, with options only for a choice; '
    "'id' and 'wrong' may be there too"
)


@dataclass(frozen=True)
class Problem:
    """A prompt with its answer.

    Attributes:
        id: names the sample in results and journals.
        prompt: the text before the answer.
        answer: what is right.
        options: for a choice, everything that can be answered, the right answer among it. The first token of each must
            differ, since the choice is read from the next token; write a leading space where the prompt has none.
        wrong: for an open answer, wrong ones for the control; for a choice they are the other options.
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
        return [target for target in self.options or self.wrong if not same(target, self.answer)]


class Problems(Rows[Problem]):
    """The samples of a study, with the tokenizer that their model reads them with."""

    metavar = "FILE"
    source_help = (
        'JSONL, one sample a line: {"prompt": "...\\nAnswer:", "answer": " B", "options": [" A", " B"]}. Without '
        "options the answer is written and compared; 'wrong' may list wrong answers for the control"
    )
    example = Fixture(
        "questions.jsonl",
        '{"prompt": "Is ice cold? A yes, B no.\\nAnswer:", "answer": " A", "options": [" A", " B"]}\n'
        '{"prompt": "Two and two are", "answer": " four", "wrong": [" five"]}\n',
    )

    @classmethod
    def open(cls, name: str | File, context: InputContext) -> Problems:
        """Samples from a file; see :func:`read_samples`."""
        found = read_samples(name)
        content = File(name).expanduser().read_bytes()
        said = {"data": str(name), "samples": len(found), "sha256": hashlib.sha256(content).hexdigest()}
        return cls(found, context.tokenizer, said)


def read_samples(file: str | File) -> list[Problem]:
    """Samples from a JSONL file: one object a line, with the fields of :class:`Problem`; ``id`` may be left out.

    Raises:
        CalibrationError: one line that names the file, the line and the mend.
    """
    samples = []
    for number, row in read_rows(file, HINT):
        where = f"{file} line {number}"
        try:
            fields: dict[str, Any] = {"id": number} | row
            lists = {name: tuple(map(str, fields.pop(name, ()))) for name in ("options", "wrong")}
            fields = {name: str(value) for name, value in fields.items()} | lists
            samples.append(Problem(**fields))
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from None
        except TypeError:
            raise CalibrationError(f"{where}: {HINT}") from None
    return check_samples(samples, str(file))


def check_samples(samples: Iterable[Problem], where: str) -> list[Problem]:
    """The samples as a list.

    Raises:
        CalibrationError: where there are none, or two have one name.
    """
    samples = list(samples)
    if not samples:
        raise CalibrationError(f"{where}: no samples; give at least one prompt with its answer")
    name, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise CalibrationError(f"{where}: {count} samples are called '{name}'; give each its own id")
    return samples


def plain(answer: str) -> str:
    """What of an answer is compared: its first line, without case, outer spaces and a final full stop."""
    return next(iter(answer.strip().splitlines()), "").strip().rstrip(".").casefold()


def same(given: str, target: str) -> bool:
    """The grader: whether an answer is that one."""
    return plain(given) == plain(target) != ""


class PathReader:
    """What a model answers to one sample along any path.

    A choice is read from the next-token distribution over the options, one forward per path; an open answer is written
    greedily up to the end of its first line. Paths share what they have in common, see :class:`PrefixTree`.

    Args:
        stack: the opened model.
        tokenizer: that belongs to it.
        sample: the prompt.
        tokens: the most new tokens of an open answer.
        chat: whether the prompt goes through the tokenizer's chat template.
        known: answers that need not be computed again.
        note: called with each new answer.

    Attributes:
        tree: the hidden states of all paths.
        asked: layers that would have been run if every call ran its path on its own.
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
        self.asked = 0
        self._alone: dict[Path, int] = {}
        self.tree = PrefixTree(stack, prompt_tokens(tokenizer, sample.prompt, chat, stack.device))
        self.options = [tokenizer.encode(option, add_special_tokens=False)[:1] for option in sample.options]
        if len({*map(tuple, self.options)}) < len(self.options):
            raise CalibrationError(
                f"sample '{sample.id}': two options begin with the same token, so the next token cannot tell them "
                "apart; name them A, B, C ... in the prompt"
            )

    def __call__(self, path: Path) -> str:
        """The answer along this path; empty where the output is not finite."""
        if path not in self.answers:
            before = self.tree.asked
            self.answers[path] = self._choose(path) if self.options else self._write(path)
            self._alone[path] = self.tree.asked - before
            self.note(path, self.answers[path])
        self.asked += self._alone.get(path, 0)
        return self.answers[path]

    def _choose(self, path: Path) -> str:
        logits = self.tree.logits(path)[[token for (token,) in self.options]]
        return self.sample.options[int(logits.argmax())] if torch.isfinite(logits).all() else ""

    def _write(self, path: Path) -> str:
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        end = self.tokenizer.eos_token_id
        written = self.tree.greedy(path, self.most, lambda token: token == end or "\n" in decode([token]))
        return str(decode(written)).split("\n")[0]


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool, device: torch.device) -> torch.Tensor:
    """The tokens of a prompt [1, time]."""
    if chat:
        return chat_inputs(tokenizer, [{"role": "user", "content": prompt}], device)["input_ids"]
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids.to(device)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
