"""Requests that are answered together: they join the running batch between two steps, and leave it when they are over.

transformers' continuous batching has one temperature for all requests and takes no dynamic plans. Here every request
has its own sampling and random seed, so its answer depends on no other one. Dynamic plans decide for whole batches:
requests that arrive meanwhile wait for the next batch. A request with settings that the batch does not know, such as
stop strings, is answered by the model's own ``generate``, alone.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _GenerationCancelled, _StreamError

from lamella.data.decoding import Batch, Lookup, Prompt, Running, Sampling

SEED = "lamella_seed"  # attribute of a generation config: the seed that the request named
KNOWN = {  # settings of a generation config that the batch honours, or that change no token
    SEED,
    "_from_model_config",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "temperature",
    "top_p",
    "transformers_version",
    "use_cache",
    "top_k",  # has no meaning in the protocol
}


@dataclass(eq=False)
class Request:
    """A request in the batch.

    Attributes:
        row: what is generated.
        put: receives new tokens; raises an error if the client is gone.
        end: is called when the row is over.
        fail: is called with an error instead.
        sent: number of tokens that were passed on.
    """

    row: Running
    put: Callable[[list[int]], None]
    end: Callable[[], None]
    fail: Callable[[Exception], None]
    sent: int = 0


class Batching(GenerateManager):
    """Answers requests together, in one thread.

    Args:
        model: a decoder, or a view of one with any plan.
        rows: maximum number of requests in a batch.
        draft: whether prompt lookup proposes tokens.
        alone: whether every request is answered by the model's own ``generate``.
    """

    def __init__(self, model: Any, rows: int, draft: bool = False, alone: bool = False) -> None:
        self._rows, self._alone = rows, alone
        self._batch = Batch(model, Lookup() if draft else None)
        self._waiting: queue.Queue[Request | Callable[[], None]] = queue.Queue()
        self._running: list[Request] = []
        self._seeds = random.Random()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call between two steps; see transformers."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self._waiting.put(call)
        return future

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Run a call between two steps, for a coroutine; see transformers."""
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Any]:
        """Answer a request token by token; see transformers."""
        row = self._row(inputs, gen_config)
        if row is None:
            model = _Seeded(model, self._seed_of(gen_config))
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        loop, texts = asyncio.get_running_loop(), asyncio.Queue[Any]()
        streamer = DirectStreamer(getattr(processor, "tokenizer", processor)._tokenizer, loop, texts, response_parser)
        streamer.put(torch.empty(0, dtype=torch.long))  # the first call is taken for the prompt

        def fail(error: Exception) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, _StreamError(str(error)))

        self._waiting.put(Request(row, lambda ids: streamer.put(torch.tensor(ids)), streamer.end, fail))
        return texts, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Answer a request at once; see transformers."""
        row = self._row(inputs, gen_config)
        if row is None:
            model = _Seeded(model, self._seed_of(gen_config))
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def put(ids: list[int]) -> None:
            if done.cancelled():
                raise _GenerationCancelled

        def end(error: Exception | None = None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        def later(*given: Any) -> None:
            loop.call_soon_threadsafe(end, *given)

        self._waiting.put(Request(row, put, later, later))
        await done
        return processor.decode(row.ids, skip_special_tokens=True), len(row.prompt.ids), row.ids

    def _row(self, inputs: Any, config: Any) -> Running | None:
        """Return what a request asks for; None for settings that the batch does not know."""
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError("the prompt has no tokens")
        if self._alone or not set(config.to_diff_dict()) <= KNOWN:
            return None
        temperature = 1.0 if config.temperature is None else config.temperature
        sampling = Sampling(temperature if config.do_sample else 0.0, config.top_p or 1.0)
        ends = config.eos_token_id
        prompt = Prompt(inputs["input_ids"][0].tolist(), config.max_new_tokens, self._seed_of(config))
        return Running(prompt, sampling, {ends} if isinstance(ends, int) else set(ends or ()))

    def _seed_of(self, config: Any) -> int:
        """Return the seed that a request names, or a random one."""
        seed = getattr(config, SEED, None)
        return self._seeds.getrandbits(32) if seed is None else int(seed)

    def _run(self) -> None:
        while True:
            try:
                self._join()
                self._batch.step()
            except Exception as error:  # of the model: all requests of the batch end with it, and the next ones go on
                for request in self._running:
                    request.fail(error)
                self._batch.drop([request.row for request in self._running])
                self._running = []
            self._pass_on()

    def _join(self) -> None:
        """Add waiting requests to the batch; wait for one if it is empty."""
        while True:
            joining: list[Request] = []
            while self._batch.takes_more and len(self._batch.rows) + len(joining) < self._rows:
                try:
                    found = self._waiting.get(block=not self._batch.rows and not joining)
                except queue.Empty:
                    break
                if isinstance(found, Request):
                    joining.append(found)
                    continue
                found()
            if joining:
                try:
                    self._batch.join([request.row for request in joining])
                except Exception as error:  # such as a prompt that is too long; the others go on
                    for request in joining:
                        request.fail(error)
                    continue
                self._running += joining
                self._pass_on()
            if self._batch.rows:
                return

    def _pass_on(self) -> None:
        """Pass on new tokens; requests whose clients are gone leave the batch."""
        gone = []
        for request in self._running:
            new, request.sent = request.row.ids[request.sent :], len(request.row.ids)
            try:
                request.put(new)
            except Exception as error:  # of one request, such as tokens that are no text; the others go on
                gone.append(request)
                if not isinstance(error, _GenerationCancelled):
                    request.fail(error)
                continue
            if not request.row.left:
                request.end()
        self._batch.drop([request.row for request in gone])
        self._running = [request for request in self._running if request.row.left and request not in gone]


class _Seeded:
    """A model that answers one request by its own ``generate``, with the seed of that request."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model, self._seed = model, seed

    def generate(self, **given: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            return self._model.generate(**given)
