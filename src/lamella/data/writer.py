"""Models that generate text: a decoder on this machine, optionally under a plan, or a remote endpoint."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from lamella.data.context import InputContext
from lamella.data.decoding import Lookup, ModelProposals, Prompt, Proposals, Sampling, batches, decode, takes_proposals
from lamella.data.endpoint import Endpoint
from lamella.data.llama_cpp import GgufModel, tokenizer_in
from lamella.data.protocol import ChatRequest
from lamella.errors import ArchitectureError, CalibrationError, CheckpointError, MethodError
from lamella.extras import require
from lamella.plan import Plan
from lamella.plan.fingerprint import revision
from lamella.plan.quantize import LLAMA_CPP
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.zoo import NamedDraft, open_stack, open_tokenizer, preference
from lamella.zoo.draft import OFF

SERVED = ("http://", "https://")
SUFFIX = ".gguf"
CONTEXT = 4096  # tokens of a conversation with its answer, in a GGUF file


class WritingRequest(NamedTuple):
    """A request to generate text.

    Attributes:
        key: identifier, unique among all requests of a run.
        messages: a conversation, up to where the answer begins.
        max_tokens: the maximum number of tokens of the answer.
        seed: random seed of the answer.
    """

    key: str
    messages: list[dict[str, str]]
    max_tokens: int
    seed: int


class Completion(NamedTuple):
    """Generated text.

    Attributes:
        text: the answer.
        finished: whether the answer ended by itself, not by its limit.
        read: number of tokens of the conversation.
        tokens: number of tokens of the answer.
    """

    text: str
    finished: bool
    read: int
    tokens: int


class Writer(ABC):
    """A model that answers requests, wherever it runs.

    Attributes:
        name: the name of the model.
        tokenizer: the tokenizer that counts the tokens of prompts and answers.
        context_length: the maximum number of tokens of a conversation with its answer; None if it is not known.
    """

    metavar = "MODEL"
    source_help = "a zoo name (smollm2), a folder, a hub id, a GGUF file, or the URL of an OpenAI-compatible endpoint"
    name: str
    tokenizer: Any
    context_length: int | None = None

    @classmethod
    def open(
        cls,
        name: str | Path,
        context: InputContext,
        *,
        plan: Path | None = None,
        batch: int = 16,
        draft: str = OFF,
        served: str | None = None,
        tokenizer: str | None = None,
        concurrent: int = 8,
        rate: float | None = None,
        timeout: float = 120.0,
        key: str = "OPENAI_API_KEY",
    ) -> Writer:
        """Open a decoder or an endpoint.

        Args:
            name: what :func:`lamella.open` takes, a GGUF file, which llama.cpp runs (extra llama-cpp), or a URL such as
                ``http://localhost:8000/v1``.
            context: the context of the run; not used.
            plan: a plan that the decoder runs under.
            batch: number of rows that the decoder generates together.
            draft: the decoder verifies several proposed tokens at once, as long as this is faster: lookup copies them
                from the text, a smaller model with the same tokenizer generates them. The texts are the same.
            served: name of the model of the endpoint; if omitted, the only one that it lists.
            tokenizer: a model whose tokenizer counts tokens, since an endpoint does not provide one.
            concurrent: maximum number of concurrent requests to the endpoint.
            rate: maximum number of requests to the endpoint per minute.
            timeout: maximum number of seconds for one response.
            key: the environment variable that holds the API key, if the endpoint needs one.

        Raises:
            MethodError: for a GGUF file or an endpoint with a plan or a draft, or an endpoint without a tokenizer.
            LamellaError: if the model cannot be opened.
        """
        is_served, is_file = str(name).startswith(SERVED), str(name).endswith(SUFFIX)
        if not is_served and not is_file:
            return LocalWriter(str(name), plan=plan, batch=batch, draft=draft)
        if plan is not None or draft != OFF:
            what, where = "plan" if plan is not None else "draft", "llama.cpp" if is_file else "an endpoint"
            raise MethodError(f"{where} cannot run under a {what}: leave the {what} out, or give a local model")
        if is_file:
            return FileWriter(Path(name), batch=batch)
        if tokenizer is None:
            raise MethodError(f"{name} provides no tokenizer: name a model with the same tokenizer, with --tokenizer")
        endpoint = Endpoint(str(name), served, key, concurrent, rate, timeout)
        return RemoteWriter(endpoint, tokenizer)

    @abstractmethod
    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests, some at a time, in any order.

        Args:
            requests: all requests of a run, including finished ones, since they may determine the batches.
            sampling: how tokens are sampled.
            done: keys of requests that are finished.

        Yields:
            Requests with their completions.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the description of the model, for provenance."""

    def has_room(self, request: WritingRequest) -> bool:
        """Return whether the prompt leaves room for an answer in the context length; unknown for an endpoint."""
        return self.context_length is None or len(prompt_ids(self.tokenizer, request.messages)) < self.context_length

    def prompt(self, request: WritingRequest) -> Prompt:
        """Return the tokens of a request, with its answer limited to the context length.

        Args:
            request: the request.

        Raises:
            CalibrationError: if it leaves no room for an answer.
        """
        ids, longest = prompt_ids(self.tokenizer, request.messages), self.context_length
        left = request.max_tokens if longest is None else min(request.max_tokens, longest - len(ids))
        if not ids or left < 1:
            raise CalibrationError(
                f"{request.key} has {len(ids)} tokens and asks for {request.max_tokens} more, but {self.name} "
                f"has a context length of {longest}: give shorter documents or passages"
            )
        return Prompt(ids, left, request.seed)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class LocalWriter(Writer):
    """A decoder that is opened in this process, and again in each process that it is sent to.

    Args:
        model: what :func:`lamella.open` takes; a name is cheaper to send to another process than a model in memory.
        plan: the plan that it runs under, or its file.
        batch: number of rows that are generated together.
        tokenizer: the tokenizer of a model in memory.
        draft: what proposes tokens: ``lookup``, the name of a smaller model, or ``off``.

    Raises:
        ArchitectureError: if the model does not generate text, or its tokenizer has no chat template.
        MethodError: for a draft with other tokens, or if one of the two models does not attend to all earlier tokens,
            or has a dynamic plan.
    """

    def __init__(
        self,
        model: Any,
        *,
        plan: Plan | Path | None = None,
        batch: int = 16,
        tokenizer: Any = None,
        draft: str = OFF,
    ) -> None:
        if batch < 1:
            raise MethodError(f"batch {batch}: give at least 1")
        self.model, self.plan_of, self.batch, self._tokenizer = model, plan, batch, tokenizer
        self.opened = preference()  # another process does not know these settings
        self.threads = torch.get_num_threads()  # floating-point sums depend on the number of threads
        self.draft = draft
        self.sent = False  # whether it was sent to another process, which runs many tasks in turn
        if not self.stack.architecture.causal:
            raise ArchitectureError(f"{self.stack.name} does not generate text: give a decoder")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ArchitectureError(
                f"the tokenizer of {self.stack.name} has no chat template: give "
                "an instruction-tuned model, or one whose folder has chat_template.jinja"
            )
        drafts = [] if draft == OFF else [self.view, *filter(None, [self.drafting])]
        if not all(map(takes_proposals, drafts)):
            raise MethodError(
                "draft: the writer needs models that attend to all earlier tokens in every layer, without a dynamic "
                "plan: leave draft out"
            )

    def __deepcopy__(self, memo: Any) -> LocalWriter:
        return self  # it is immutable

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process: without the weights, if it can open them."""
        opened = ("drafting", "view", *(("stack", "tokenizer") if isinstance(self.model, str) else ()))
        return {name: each for name, each in self.__dict__.items() if name not in opened} | {"sent": True}

    @cached_property
    def stack(self) -> Stack:
        """The decoder."""
        how = (self.opened.dtype, self.opened.device)
        return _of_process(self.model, *how) if self.sent else _opened(self.model, *how)

    @cached_property
    def plan(self) -> Plan | None:
        """The plan that the decoder runs under."""
        return Plan.read(self.plan_of) if isinstance(self.plan_of, str | Path) else self.plan_of

    @cached_property
    def view(self) -> Any:
        """The decoder under its plan."""
        if self.plan is None:
            return self.stack.model
        if self.plan.renames_tokens:
            raise MethodError(f"{self.name}: the plan renames tokens: write the smaller model first (lamella apply)")
        return apply(self.stack, self.plan)

    @cached_property
    def drafting(self) -> Any:
        """The model that proposes tokens; None without a draft, or for prompt lookup."""
        found = NamedDraft(self.draft).draft_of(self.view, self.tokenizer)
        return None if found is None else found.model

    def _proposals(self) -> Proposals | None:
        """Return what proposes tokens."""
        if self.draft == OFF:
            return None
        return Lookup() if self.drafting is None else ModelProposals(self.drafting)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the decoder."""
        return self._tokenizer or open_tokenizer(self.stack.path or self.model)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the model."""
        return self.stack.name

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests batch by batch; a batch with unfinished requests is repeated as a whole.

        Args:
            requests: the requests.
            sampling: sampling settings.
            done: keys of requests that are already answered; a batch is skipped only if all of its requests are.

        Raises:
            CalibrationError: if a request leaves no room for an answer.
        """
        torch.set_num_threads(self.threads)
        ends, draft = self._ends(), self._proposals()
        prompts = [self.prompt(each) for each in requests]
        for numbers in batches(prompts, self.batch):
            if all(requests[number].key in done for number in numbers):
                continue
            rows = decode(self.view, [prompts[number] for number in numbers], sampling, ends, draft)
            texts = [self.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]
            yield [
                (requests[number], Completion(text, row.finished, len(prompts[number].ids), len(row.ids)))
                for number, row, text in zip(numbers, rows, texts, strict=True)
            ]

    @property
    def context_length(self) -> int | None:  # type: ignore[override]
        """The maximum number of tokens of a conversation with its answer; None if there is no limit."""
        return getattr(self.stack.config, "max_position_embeddings", None)

    def _ends(self) -> set[int]:
        tokens: Any = self.stack.model.generation_config.eos_token_id
        own = {tokens} if isinstance(tokens, int) else set(tokens or ())
        return own | ({self.tokenizer.eos_token_id} - {None})

    def describe(self) -> dict[str, Any]:
        """Return the description of the model, for provenance."""
        description: dict[str, Any] = {"model": self.stack.describe(), "batch": self.batch}
        if self.stack.files_digest is None:
            description["weights"] = revision(self.stack.model)
        return description | ({} if self.plan is None else {"plan": self.plan.digest})


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the tokens of a conversation, up to where the answer begins.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the conversation.
    """

    def rendered(shown: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
        return text

    try:
        text = rendered(messages)
    except TemplateError:  # some templates have no system role: the system prompt is put before the question
        system, question, *more = messages
        text = rendered([{"role": question["role"], "content": f"{system['content']}\n\n{question['content']}"}, *more])
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opened(model: Any, dtype: Any, device: str | None) -> Stack:
    return open_stack(model, dtype=dtype, device=device)


_of_process = lru_cache(maxsize=1)(_opened)


class FileWriter(Writer):
    """A GGUF file that llama.cpp runs in this process, with several requests at a time.

    Rows of one batch share passes, and rounding depends on the batch: an answer can differ between runs.

    Args:
        file: the file, with a chat template in its metadata.
        batch: number of requests at a time.
        context: maximum number of tokens of a conversation with its answer.

    Raises:
        CheckpointError: if there is no such file, or it cannot be opened.
        ArchitectureError: for a file without a chat template.
        LamellaError: if the extra llama-cpp is not installed.
    """

    def __init__(self, file: Path, *, batch: int = 16, context: int = CONTEXT) -> None:
        require("xllamacpp", *LLAMA_CPP)
        if not file.is_file():
            raise CheckpointError(f"there is no file {file}")
        self.file, self.batch, self.context, self.name = file, batch, context, file.stem
        self.context_length = context
        self.tokenizer = tokenizer_in(file)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ArchitectureError(f"{file.name} has no chat template: give a file of an instruction-tuned model")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens the file again."""
        return {name: each for name, each in self.__dict__.items() if name != "model"}

    @cached_property
    def model(self) -> GgufModel:
        """The opened file."""
        return GgufModel(self.file, self.batch, self.context)

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests, in the order in which answers are finished.

        Args:
            requests: the requests.
            sampling: how tokens are sampled.
            done: keys of requests that are already answered, which are skipped.

        Raises:
            CalibrationError: if a request leaves no room for an answer.
        """

        def answer(request: WritingRequest) -> Completion:
            prompt = self.prompt(request)
            found = self.model.complete(prompt, sampling)
            return Completion(found.text, found.finished, len(prompt.ids), found.tokens)

        with ThreadPoolExecutor(self.batch) as pool:
            waiting = {pool.submit(answer, each): each for each in requests if each.key not in done}
            try:
                for each in as_completed(waiting):
                    yield [(waiting[each], each.result())]
            finally:
                pool.shutdown(cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        """Return the description of the model, for provenance."""
        with self.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.file.name, "sha256": digest, "batch": self.batch, "program": "llama.cpp"}


class RemoteWriter(Writer):
    """A model behind an endpoint.

    Args:
        endpoint: the address of the endpoint, and how requests are sent to it.
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
        """Answer requests one by one, in the order in which responses arrive.

        Args:
            requests: the requests.
            sampling: sampling settings.
            done: keys of requests that are already answered, which are skipped.
        """
        left = [each for each in requests if each.key not in done]
        questions = [ChatRequest(each.messages, each.max_tokens, each.seed) for each in left]
        for number, answer in self.endpoint.ask(questions, self.name, sampling):
            request = left[number]
            read = answer.prompt
            if read is None:
                read = sum(self.count(each["content"]) for each in request.messages)
            tokens = self.count(answer.text) if answer.tokens is None else answer.tokens
            yield [(request, Completion(answer.text, answer.finished, read, tokens))]

    def describe(self) -> dict[str, Any]:
        """Return the description of the model, for provenance."""
        return {"endpoint": self.endpoint.url, "model": self.name, "tokenizer": self.counted_by}
