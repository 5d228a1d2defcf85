"""Who writes: a decoder on this machine, under a plan where that is wanted, or an endpoint that others run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from lamella.data.context import InputContext
from lamella.data.decoding import Prompt, Sampling, batches, decode
from lamella.data.endpoint import Endpoint
from lamella.data.protocol import ChatRequest
from lamella.errors import ArchitectureError, CalibrationError, MethodError
from lamella.plan import Plan
from lamella.plan.fingerprint import revision
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo import open_stack, open_tokenizer, preference

SERVED = ("http://", "https://")


class WritingRequest(NamedTuple):
    """What is to be written.

    Attributes:
        key: its name among all requests of a run.
        messages: a conversation, up to where the answer begins.
        most: tokens of the answer, at most.
        seed: of what is drawn.
    """

    key: str
    messages: list[dict[str, str]]
    most: int
    seed: int


class Completion(NamedTuple):
    """What was written.

    Attributes:
        text: the answer.
        finished: whether it ended by itself, not by its limit.
        read: tokens of the conversation.
        tokens: of the answer.
    """

    text: str
    finished: bool
    read: int
    tokens: int


class Writer(ABC):
    """A model that answers, wherever it runs.

    Attributes:
        name: as it was given.
        tokenizer: that counts what it reads and writes.
    """

    metavar = "MODEL"
    source_help = "a zoo name (smollm2), a checkpoint folder, a hub id, or the URL of an OpenAI-compatible endpoint"
    name: str
    tokenizer: Any

    @classmethod
    def open(
        cls,
        name: str | Path,
        context: InputContext,
        *,
        plan: Path | None = None,
        batch: int = 16,
        served: str | None = None,
        tokenizer: str | None = None,
        concurrent: int = 8,
        rate: float | None = None,
        patience: float = 120.0,
        key: str = "OPENAI_API_KEY",
    ) -> Writer:
        """A decoder or an endpoint.

        Args:
            name: what :func:`lamella.open` takes, or a URL such as ``http://localhost:8000/v1``.
            plan: a plan that the decoder runs under.
            batch: rows that the decoder writes together.
            served: the model of the endpoint; left out, the only one that it lists.
            tokenizer: a model whose tokenizer counts tokens, where an endpoint has none to show.
            concurrent: requests to the endpoint at once.
            rate: requests to it a minute, at most.
            patience: seconds that it may take for an answer.
            key: the environment variable that holds its key, if it wants one.

        Raises:
            MethodError: for an endpoint with a plan or without a tokenizer.
            LamellaError: for what cannot be opened.
        """
        if not str(name).startswith(SERVED):
            return LocalWriter(str(name), plan=plan, batch=batch)
        if plan is not None:
            raise MethodError("a plan runs in a decoder that is opened here, not behind an endpoint: leave it out")
        if tokenizer is None:
            raise MethodError(f"{name} shows no tokenizer: name a model that has it, with --tokenizer")
        endpoint = Endpoint(str(name), served, key, concurrent, rate, patience)
        return RemoteWriter(endpoint, tokenizer)

    @abstractmethod
    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests, some at a time, in any order.

        Args:
            requests: all requests of a run: what is done too, since it may decide what stands in a batch with what.
            sampling: how tokens are drawn.
            done: keys of requests that need no answer any more.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""

    def fits(self, request: WritingRequest) -> bool:
        """Whether there is room for an answer; of an endpoint that is not known before it is asked."""
        return True

    def count(self, text: str) -> int:
        """How many tokens a text has, without special ones."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class LocalWriter(Writer):
    """A decoder that is opened here, and again in each process that this is sent to.

    Args:
        model: what :func:`lamella.open` takes; sent to another process, a name is better than a model in memory.
        plan: what it runs under, or the file of it.
        batch: rows that are written together.
        tokenizer: of a model in memory.

    Raises:
        ArchitectureError: for a model that does not continue text, or whose tokenizer knows no conversations.
    """

    def __init__(self, model: Any, *, plan: Plan | Path | None = None, batch: int = 16, tokenizer: Any = None) -> None:
        if batch < 1:
            raise MethodError(f"batch {batch}: give at least 1")
        self.model, self.plan_of, self.batch, self.given = model, plan, batch, tokenizer
        self.opened = preference()  # which another process does not know
        self.threads = torch.get_num_threads()  # with others, sums end in other digits
        self.sent = False  # to another process, where many tasks come one after the other
        if not self.stack.architecture.causal:
            raise ArchitectureError(f"{self.stack.name} does not continue text, so it writes none: give a decoder")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ArchitectureError(
                f"the tokenizer of {self.stack.name} has no chat template, so it does not know what it is asked: give "
                "an instruction-tuned model, or one whose folder has chat_template.jinja"
            )

    def __deepcopy__(self, memo: Any) -> LocalWriter:
        return self  # nobody changes it

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: not the weights, where it can open them."""
        opened = ("stack", "view", "tokenizer") if isinstance(self.model, str) else ("view",)
        return {name: each for name, each in self.__dict__.items() if name not in opened} | {"sent": True}

    @cached_property
    def stack(self) -> Stack:
        """The decoder, whole."""
        how = (self.opened.dtype, self.opened.device)
        return _of_process(self.model, *how) if self.sent else _opened(self.model, *how)

    @cached_property
    def plan(self) -> Plan | None:
        """What it runs under."""
        return Plan.read(self.plan_of) if isinstance(self.plan_of, str | Path) else self.plan_of

    @cached_property
    def view(self) -> Any:
        """The decoder as it runs."""
        return self.stack.model if self.plan is None else apply(self.stack, self.plan)

    @cached_property
    def tokenizer(self) -> Any:
        """That of the decoder."""
        return self.given or open_tokenizer(self.stack.path or self.model)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.stack.name

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests batch by batch; a batch of which anything is missing is written whole, as it was before.

        Raises:
            CalibrationError: for a request that leaves no room for an answer.
        """
        torch.set_num_threads(self.threads)
        ends = self._ends()
        prompts = [self._prompt(each) for each in requests]
        for numbers in batches(prompts, self.batch):
            if all(requests[number].key in done for number in numbers):
                continue
            rows = decode(self.view, [prompts[number] for number in numbers], sampling, ends)
            texts = [self.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]
            yield [
                (requests[number], Completion(text, row.finished, len(prompts[number].ids), len(row.ids)))
                for number, row, text in zip(numbers, rows, texts, strict=True)
            ]

    @property
    def room(self) -> int | None:
        """Tokens of a conversation with its answer, at most; None where there is no limit."""
        return getattr(self.stack.config, "max_position_embeddings", None)

    def fits(self, request: WritingRequest) -> bool:
        return self.room is None or len(self._ids(request)) < self.room

    def _prompt(self, request: WritingRequest) -> Prompt:
        """A request as the decoder reads it, whose answer ends where there is no more room."""
        ids, room = self._ids(request), self.room
        left = request.most if room is None else min(request.most, room - len(ids))
        if not ids or left < 1:
            raise CalibrationError(
                f"{request.key} has {len(ids)} tokens and wants {request.most} more, but {self.stack.name} has room "
                f"for {room}: give shorter documents or passages"
            )
        return Prompt(ids, left, request.seed)

    def _ids(self, request: WritingRequest) -> list[int]:
        try:
            text = self._shown(request.messages)
        except TemplateError:  # some know no system, which then stands before the question
            system, question, *more = request.messages
            merged = {"role": question["role"], "content": f"{system['content']}\n\n{question['content']}"}
            text = self._shown([merged, *more])
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _shown(self, messages: list[dict[str, str]]) -> str:
        shown: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return shown

    def _ends(self) -> set[int]:
        said: Any = self.stack.model.generation_config.eos_token_id
        own = {said} if isinstance(said, int) else set(said or ())
        return own | ({self.tokenizer.eos_token_id} - {None})

    def describe(self) -> dict[str, Any]:
        said: dict[str, Any] = {"model": self.stack.describe(), "batch": self.batch}
        if self.stack.files_digest is None:
            said["weights"] = revision(self.stack.model)
        return said | ({} if self.plan is None else {"plan": self.plan.digest})


def _opened(model: Any, dtype: Any, device: str | None) -> Stack:
    return open_stack(model, dtype=dtype, device=device)


_of_process = lru_cache(maxsize=1)(_opened)


class RemoteWriter(Writer):
    """An endpoint.

    Args:
        endpoint: where, and how patiently.
        tokenizer: a model whose tokenizer counts tokens, or a tokenizer.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: Any) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model()
        self.tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.counted_by = str(tokenizer if isinstance(tokenizer, str | Path) else tokenizer.name_or_path)

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests one by one, as answers come."""
        left = [each for each in requests if each.key not in done]
        questions = [ChatRequest(each.messages, each.most, each.seed) for each in left]
        for number, answer in self.endpoint.ask(questions, self.name, sampling):
            request = left[number]
            read = answer.prompt
            if read is None:
                read = sum(self.count(each["content"]) for each in request.messages)
            tokens = self.count(answer.text) if answer.tokens is None else answer.tokens
            yield [(request, Completion(answer.text, answer.finished, read, tokens))]

    def describe(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint.url, "model": self.name, "tokenizer": self.counted_by}
