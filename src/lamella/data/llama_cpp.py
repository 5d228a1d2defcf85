"""A writer that runs a GGUF file in llama.cpp, in this process, with several requests at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lamella.data.decoding import Prompt, Sampling
from lamella.data.writer import Completion, Writer, WritingRequest, prompt_ids
from lamella.errors import ArchitectureError, CheckpointError
from lamella.extras import require
from lamella.plan.quantize import LLAMA_CPP

CONTEXT = 4096  # tokens of a conversation with its answer


class FileWriter(Writer):
    """A GGUF file that answers requests.

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
        self.file, self.batch, self.context_length, self.name = file, batch, context, file.stem
        self.threads = torch.get_num_threads()
        if not getattr(self.tokenizer, "chat_template", None):
            raise ArchitectureError(f"{file.name} has no chat template: give a file of an instruction-tuned model")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens the file again."""
        return {name: each for name, each in self.__dict__.items() if name not in ("_server", "tokenizer")}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the file."""
        try:
            return AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name, trust_remote_code=False)
        except Exception as error:  # a damaged file can cause errors of any type
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.file}: its tokenizer cannot be opened ({reason})") from error

    @cached_property
    def _server(self) -> Any:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity = os.fspath(self.file), -1
        params.n_ctx, params.n_parallel = self.context_length * self.batch, self.batch
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        try:
            return xllamacpp.Server(params)
        except Exception as error:
            raise CheckpointError(f"{self.file}: llama.cpp cannot open it: {error}") from error

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        """Answer requests, in the order in which answers are finished.

        Args:
            requests: the requests.
            sampling: how tokens are sampled.
            done: keys of requests that are already answered, which are skipped.
        """
        with ThreadPoolExecutor(self.batch) as pool:
            waiting = {pool.submit(self._answer, each, sampling): each for each in requests if each.key not in done}
            try:
                for answer in as_completed(waiting):
                    yield [(waiting[answer], answer.result())]
            finally:
                pool.shutdown(cancel_futures=True)

    def complete(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """Continue a prompt.

        Args:
            prompt: its tokens, the maximum number of new ones, and the random seed.
            sampling: how tokens are sampled.
        """
        asked = {
            "prompt": list(prompt.ids),
            "max_tokens": min(prompt.max_tokens, self.context_length - len(prompt.ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": prompt.seed,
        }
        found = self._server.handle_completions(asked)
        (choice,), used = found["choices"], found["usage"]
        return Completion(choice["text"], choice["finish_reason"] == "stop", len(prompt.ids), used["completion_tokens"])

    def _answer(self, request: WritingRequest, sampling: Sampling) -> Completion:
        ids = prompt_ids(self.tokenizer, request.messages)
        return self.complete(Prompt(ids, request.max_tokens, request.seed), sampling)

    def fits(self, request: WritingRequest) -> bool:
        """Return whether the prompt leaves room for an answer."""
        return len(prompt_ids(self.tokenizer, request.messages)) < self.context_length

    def describe(self) -> dict[str, Any]:
        """Return the description of the model, for provenance."""
        with self.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.file.name, "sha256": digest, "batch": self.batch, "program": "llama.cpp"}
