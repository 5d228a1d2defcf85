"""An endpoint that speaks the OpenAI protocol, asked by several coroutines at once through the client of ``openai``.

The client makes a request again, after longer and longer pauses, where a failure may be temporary: too many requests, a
busy server, a broken connection, a response that is no answer. Another failure, such as a refused key, ends the run.

What the client does not do is done below it, in the transport: a response is read up to the size that an answer of
``max_tokens`` tokens can have, within a time, without being decompressed, and as UTF-8 whatever it declares. The key
comes from the environment and is sent in the header of requests alone: where an endpoint repeats it, it is masked.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lamella.data.decoding import Sampling
from lamella.data.protocol import FOUND, ChatRequest, ChatResponse
from lamella.errors import DownloadError
from lamella.extras import require

SHORT = 200  # characters of what a server says, in a message
SECRET = 8  # characters of a key that is one; servers without keys are given words such as "none" or "EMPTY"


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how.

    Attributes:
        url: of the API, such as ``http://localhost:8000/v1``.
        served: the model to ask; left out, the only one that the endpoint lists.
        key: the environment variable that holds the key, if there is one.
        concurrent: requests under way at once.
        rate: requests a minute, at most; None: as many as come.
        patience: seconds that one answer may take.
        tries: how often one request is made; the pauses in between take about a minute in all.
    """

    url: str
    served: str | None = None
    key: str = "OPENAI_API_KEY"
    concurrent: int = 8
    rate: float | None = None
    patience: float = 120.0
    tries: int = 10

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DownloadError(f"'{self.url}' is no endpoint: give a URL such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise DownloadError(
                f"the URL of the endpoint at {parts.hostname} holds more than a place: put its key into the "
                f"environment variable {self.key}, and leave it out of the URL"
            )
        if self.concurrent < 1 or self.tries < 1 or self.patience <= 0 or (self.rate is not None and self.rate <= 0):
            raise DownloadError(
                f"concurrent {self.concurrent}, tries {self.tries}, patience {self.patience:g}, rate {self.rate}: "
                "give numbers above 0"
            )

    def model(self) -> str:
        """The model that is asked.

        Raises:
            DownloadError: when none is named and the endpoint does not list exactly one, or does not answer.
        """
        if self.served is not None:
            return self.served
        listed = asyncio.run(_Client(self, Sampling()).listed())
        if len(listed) != 1:
            raise DownloadError(
                f"{self.url} serves {len(listed)} models ({', '.join(listed[:5])}): name one with --served"
            )
        return listed[0]

    def ask(
        self, questions: Sequence[ChatRequest], model: str, sampling: Sampling
    ) -> Iterator[tuple[int, ChatResponse]]:
        """Answers with the number of their question, as they come.

        Raises:
            DownloadError: when a request is refused, or is not answered for as long as patience lasts.
        """
        loop = asyncio.new_event_loop()
        found: asyncio.Queue[tuple[int, ChatResponse] | BaseException] = asyncio.Queue()
        work = loop.create_task(_Client(self, sampling).answers(questions, model, found))
        try:
            for _ in questions:
                answer = loop.run_until_complete(found.get())
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            work.cancel()
            loop.run_until_complete(asyncio.gather(work, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


class _Client:
    """One run of requests."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling) -> None:
        self.openai, self.httpx = (require(name, "rewrite", "an endpoint") for name in ("openai", "httpx2"))
        self.endpoint, self.sampling = endpoint, sampling
        self.base = endpoint.url.rstrip("/")
        self.key = os.environ.get(endpoint.key, "")

    def session(self) -> Any:
        from lamella.data.transport import Transport  # of httpx2, which may be missing

        ours = self.endpoint
        transport = Transport(ours.concurrent, ours.rate, ours.patience, keyed=bool(self.key), quoted=self.quoted)
        return self.openai.AsyncOpenAI(
            api_key=self.key or "none",  # which the transport leaves out; the client will have one
            base_url=self.base,
            max_retries=self.endpoint.tries - 1,
            http_client=self.httpx.AsyncClient(transport=transport, timeout=None),
        )

    async def listed(self) -> list[str]:
        async with self.session() as session:
            told = await self.found(session.models.with_raw_response.list(), "its models")
        return [self.cleaned(each) for each in told]

    async def answers(self, questions: Sequence[ChatRequest], model: str, found: asyncio.Queue[Any]) -> None:
        """Put all answers into the queue; the first failure goes there too, and ends the run."""
        left = iter(enumerate(questions))

        async def work(session: Any) -> None:
            for number, question in left:
                request = session.chat.completions.with_raw_response.create(**self.body(question, model))
                answer = await self.found(request, f"request {number + 1}")
                await found.put((number, answer._replace(text=self.cleaned(answer.text))))

        try:
            async with self.session() as session, asyncio.TaskGroup() as group:
                for _ in range(min(self.endpoint.concurrent, len(questions))):
                    group.create_task(work(session))
        except* Exception as errors:
            await found.put(errors.exceptions[0])

    def body(self, question: ChatRequest, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": question.messages,
            "max_tokens": question.most,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": question.seed % 2**31,
        }

    async def found(self, request: Awaitable[Any], what: str) -> Any:
        """What was found in the response to a request, which the client makes again while its failure may pass."""
        try:
            return (await request).http_response.extensions[FOUND]
        except self.openai.APIConnectionError as error:
            why = self.safe(str(error.__cause__) or type(error.__cause__).__name__)
        except self.openai.APIStatusError as error:
            why = f"status {error.status_code}"
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                said, fix = self.quoted(error.response.text), "check URL and model"
                if error.status_code in (401, 403):
                    fix = f"put its key into {self.endpoint.key}"
                raise DownloadError(f"{error.request.url} answers with {why} ({said}): {fix}") from None
        raise DownloadError(
            f"{self.base} did not answer {what} in {self.endpoint.tries} tries ({why}): see whether it runs, or give "
            "it more --patience or fewer --concurrent requests; what was written is kept, so run the same command again"
        )

    def safe(self, text: str) -> str:
        """A text without the key, in case a server repeats it."""
        return text.replace(self.key, "***") if self.key else text

    def quoted(self, text: str) -> str:
        """The beginning of what an endpoint says, for a message; a key is masked before it could be cut."""
        return " ".join(self.safe(text).split())[:SHORT]

    def cleaned(self, text: str) -> str:
        """What an endpoint answers, without the key and without halves of surrogate pairs, which no file can hold."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.safe(whole) if len(self.key) >= SECRET else whole
