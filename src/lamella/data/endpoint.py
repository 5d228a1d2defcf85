"""Asynchronous client of an OpenAI-compatible endpoint, with retries, on top of the ``openai`` package.

The client retries a request with increasing pauses if the failure may be temporary: rate limits, a busy server, a
broken connection, or a response without an answer. Other failures, such as a rejected key, end the run.

The transport below the client adds limits: a response is read up to the size that an answer of ``max_tokens`` tokens
can have, within a timeout, without decompression, and as UTF-8 whatever it declares. The key comes from the environment
and is sent in the header of requests only; if an endpoint repeats it in a response, it is masked.
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

SHORT = 200  # maximum number of characters of a response in a message
SECRET = 8  # minimum length of a real key; servers without keys are given words such as "none" or "EMPTY"


@dataclass(frozen=True)
class Endpoint:
    """The address of an endpoint, and how requests are sent to it.

    Attributes:
        url: base URL of the API, such as ``http://localhost:8000/v1``.
        served: name of the served model; if None, the only one that the endpoint lists.
        key: the environment variable that holds the API key, if the endpoint needs one.
        concurrent: maximum number of concurrent requests.
        rate: maximum number of requests per minute; unlimited if None.
        timeout: maximum number of seconds for one response.
        tries: maximum number of attempts for one request; the pauses between them add up to about a minute.
    """

    url: str
    served: str | None = None
    key: str = "OPENAI_API_KEY"
    concurrent: int = 8
    rate: float | None = None
    timeout: float = 120.0
    tries: int = 10

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DownloadError(f"'{self.url}' is no endpoint: give a URL such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise DownloadError(
                f"the URL of the endpoint at {parts.hostname} holds credentials or a query: put the key into the "
                f"environment variable {self.key} and remove it from the URL"
            )
        if self.concurrent < 1 or self.tries < 1 or self.timeout <= 0 or (self.rate is not None and self.rate <= 0):
            raise DownloadError(
                f"concurrent {self.concurrent}, tries {self.tries}, timeout {self.timeout:g}, rate {self.rate}: "
                "give numbers above 0"
            )

    def model(self) -> str:
        """Return the name of the model that requests are sent to.

        Raises:
            DownloadError: if no name is given and the endpoint does not list exactly one model, or does not respond.
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
        """Send requests and yield their responses in the order in which they arrive.

        Args:
            questions: the requests.
            model: the name of the model.
            sampling: how tokens are sampled.

        Yields:
            The index of a request and its response.

        Raises:
            DownloadError: if a request is refused, or not answered within the timeout and all attempts.
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
        from lamella.data.transport import Transport  # needs httpx2, which is optional

        ours = self.endpoint
        transport = Transport(ours.concurrent, ours.rate, ours.timeout, keyed=bool(self.key), quoted=self.quoted)
        return self.openai.AsyncOpenAI(
            api_key=self.key or "none",  # the client requires a key; the transport removes this one
            base_url=self.base,
            max_retries=self.endpoint.tries - 1,
            http_client=self.httpx.AsyncClient(transport=transport, timeout=None),
        )

    async def listed(self) -> list[str]:
        async with self.session() as session:
            names = await self.found(session.models.with_raw_response.list(), "its models")
        return [self.cleaned(each) for each in names]

    async def answers(self, questions: Sequence[ChatRequest], model: str, found: asyncio.Queue[Any]) -> None:
        """Put all responses into the queue; the first failure is put there too, and ends the run."""
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
            "max_tokens": question.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": question.seed % 2**31,
        }

    async def found(self, request: Awaitable[Any], what: str) -> Any:
        """Return the parsed content of the response to a request."""
        try:
            return (await request).http_response.extensions[FOUND]
        except self.openai.APIConnectionError as error:
            why = self.safe(str(error.__cause__) or type(error.__cause__).__name__)
        except self.openai.APIStatusError as error:
            why = f"status {error.status_code}"
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                reason, fix = self.quoted(error.response.text), "check URL and model"
                if error.status_code in (401, 403):
                    fix = f"put its key into {self.endpoint.key}"
                raise DownloadError(f"{error.request.url} responds with {why} ({reason}): {fix}") from None
        raise DownloadError(
            f"{self.base} did not answer {what} in {self.endpoint.tries} tries ({why}): check that it runs, "
            "or allow a longer --timeout or fewer --concurrent requests; finished answers are kept, so run it again"
        )

    def safe(self, text: str) -> str:
        """Mask the API key in a text."""
        return text.replace(self.key, "***") if self.key else text

    def quoted(self, text: str) -> str:
        """Return the beginning of a response for a message; the key is masked before the text is cut."""
        return " ".join(self.safe(text).split())[:SHORT]

    def cleaned(self, text: str) -> str:
        """Return the text of an answer without the API key and without unpaired surrogates, which no file can hold."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.safe(whole) if len(self.key) >= SECRET else whole
