"""The process in which llama.cpp decodes, started by :mod:`lamella.commands.compress.llama_cpp`.

It reads lines of JSON from its standard input and answers each with one. The first opens files: ``files`` by name,
``threads`` and ``context``, the longest text in tokens. Each further one, ``prompt`` (token ids) and ``tokens`` (how
many to decode), is answered with the seconds of the prefill and of one decoding step of every file.

The threads of an open model wait for requests and would keep the process alive, so it ends with ``os._exit``; it does
so at the end of its input, and is ended when the process that started it is killed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import xllamacpp

from lamella.processes import end_with_parent


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp itself prints is no answer
    opened = json.loads(sys.stdin.readline())
    servers = {name: _opened(file, opened["threads"], opened["context"]) for name, file in opened["files"].items()}
    print(json.dumps(list(servers)), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = {name: _timed(server, request["prompt"], request["tokens"]) for name, server in servers.items()}
        print(json.dumps(seconds), file=answers, flush=True)


def _opened(file: str, threads: int, context: int) -> Any:
    """Return a model that is ready to decode one text at a time."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = file, context, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def _timed(server: Any, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill, and of one decoding step after it."""
    request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    found = server.handle_completions(request)["timings"]
    return found["prompt_ms"] / 1e3, found["predicted_ms"] / 1e3 / found["predicted_n"]


if __name__ == "__main__":
    end_with_parent()
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
