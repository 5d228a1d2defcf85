"""A GGUF file that llama.cpp runs in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from lamella.data.decoding import Prompt, Sampling
from lamella.errors import CheckpointError
from lamella.extras import require
from lamella.plan.quantize import LLAMA_CPP


class Continuation(NamedTuple):
    """A generated text.

    Attributes:
        text: the text.
        finished: whether it ended by itself, not by its limit.
        tokens: its number of tokens.
    """

    text: str
    finished: bool
    tokens: int


class GgufModel:
    """A model in a GGUF file, which continues several prompts at a time.

    Args:
        file: the file.
        rows: number of prompts at a time.
        context: maximum number of tokens of a prompt with its continuation.

    Raises:
        CheckpointError: if the file cannot be opened.
        LamellaError: if the extra llama-cpp is not installed.
    """

    def __init__(self, file: Path, rows: int, context: int) -> None:
        xllamacpp = require("xllamacpp", *LLAMA_CPP)
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity = os.fspath(file), -1
        params.n_ctx, params.n_parallel = context * rows, rows
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:
            raise CheckpointError(f"{file}: llama.cpp cannot open it: {error}") from error

    def complete(self, prompt: Prompt, sampling: Sampling) -> Continuation:
        """Continue a prompt; threads may call this together.

        Args:
            prompt: the prompt.
            sampling: how tokens are sampled.
        """
        asked = {"prompt": list(prompt.ids), "max_tokens": prompt.max_tokens, "seed": prompt.seed}
        found = self._server.handle_completions(asked | {"temperature": sampling.temperature, "top_p": sampling.top_p})
        (choice,) = found["choices"]
        return Continuation(choice["text"], choice["finish_reason"] == "stop", found["usage"]["completion_tokens"])


def tokenizer_in(file: Path) -> Any:
    """Return the tokenizer in a GGUF file.

    Args:
        file: the file.

    Raises:
        CheckpointError: if it has none, or is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # a damaged file can cause errors of any type
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: its tokenizer cannot be opened ({reason})") from error
