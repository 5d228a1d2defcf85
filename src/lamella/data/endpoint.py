"""An endpoint that speaks the OpenAI protocol, asked by several hands at once, patiently.

What may pass (too many requests, a server that is busy, a line that breaks, an answer that makes no sense) is asked
again, each time after a longer pause; what will not pass (a key that is refused, a model that is not there) ends the
run. The key comes from the environment, goes into the header of the request, and stands nowhere else: where an endpoint
repeats it, it is masked. A response is read up to the size that an answer of ``max_tokens`` tokens can have.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lamella.data.decoding import Sampling
from lamella.errors import DownloadError
from lamella.extras import require

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # what a server says that may answer later
SHORT = 200  # characters of what a server says, in a message
TOKEN = 1024  # bytes of a token in JSON, at most: 128 spaces are one in some vocabularies, and each may be escaped
REST = 2**18  # bytes of a response beside its answer, at most
LISTED = 2**23  # bytes of a list of models, at most
SECRET = 8  # characters of a key that is one; servers without keys are given words such as "none" or "EMPTY"
MOST_TOKENS = 2**31  # that an endpoint can have counted


class Question(NamedTuple):
    """One request.

    Attributes:
        messages: a conversation, up to where the answer begins.
        most: tokens of the answer, at most.
        seed: of what is drawn, where the endpoint heeds it.
    """

    messages: list[dict[str, str]]
    most: int
    seed: int


class Answer(NamedTuple):
    """What came back.

    Attributes:
        text: the answer.
        finished: whether it ended by itself, not by its limit.
        prompt, tokens: how many tokens the endpoint counted; None where it does not say.
    """

    text: str
    finished: bool
    prompt: int | None
    tokens: int | None


class _Request(NamedTuple):
    """One HTTP request, and the largest number of bytes that its response may have."""

    verb: str
    path: str
    body: Any
    most: int


class Passing(Exception):
    """A failure that may pass.

    Attributes:
        pause: seconds that the server asks to wait.
    """

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


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
        tries: how often one request is made.
        pause: seconds before it is made again; twice as many each time.
    """

    url: str
    served: str | None = None
    key: str = "OPENAI_API_KEY"
    concurrent: int = 8
    rate: float | None = None
    patience: float = 120.0
    tries: int = 6
    pause: float = 1.0

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
                f"concurrent={self.concurrent}, tries={self.tries}, patience={self.patience:g}, rate={self.rate}: "
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

    def ask(self, questions: Sequence[Question], model: str, sampling: Sampling) -> Iterator[tuple[int, Answer]]:
        """Answers with the number of their question, as they come.

        Raises:
            DownloadError: when a request is refused, or is not answered for as long as patience lasts.
        """
        loop = asyncio.new_event_loop()
        found: asyncio.Queue[tuple[int, Answer] | BaseException] = asyncio.Queue()
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
        self.http = require("aiohttp", "rewrite", "an endpoint")
        self.endpoint, self.sampling = endpoint, sampling
        self.base = endpoint.url.rstrip("/")
        self.key = os.environ.get(endpoint.key, "")
        self.free = 0.0  # when the next request may be made

    def session(self) -> Any:
        headers = {"Accept-Encoding": "identity"}  # a compressed response could expand a thousandfold
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = self.http.ClientTimeout(total=self.endpoint.patience)
        return self.http.ClientSession(headers=headers, timeout=timeout, auto_decompress=False)

    async def listed(self) -> list[str]:
        async with self.session() as session:
            request = _Request("GET", "/models", None, LISTED)
            told = await self.patiently(session, request, _models, "its models", random.Random(0))
        return [self.cleaned(each) for each in told]

    async def answers(self, questions: Sequence[Question], model: str, found: asyncio.Queue[Any]) -> None:
        """Put all answers into the queue; the first failure goes there too, and ends the run."""
        left = iter(enumerate(questions))

        async def hand(session: Any) -> None:
            for number, question in left:
                most = REST + TOKEN * question.most
                request = _Request("POST", "/chat/completions", self.body(question, model), most)
                drawn = random.Random(question.seed)
                answer = await self.patiently(session, request, _answer, f"request {number + 1}", drawn)
                await found.put((number, answer._replace(text=self.cleaned(answer.text))))

        try:
            async with self.session() as session, asyncio.TaskGroup() as hands:
                for _ in range(min(self.endpoint.concurrent, len(questions))):
                    hands.create_task(hand(session))
        except* DownloadError as errors:
            await found.put(errors.exceptions[0])
        except* Exception as errors:
            await found.put(errors.exceptions[0])

    def body(self, question: Question, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": question.messages,
            "max_tokens": question.most,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": question.seed % 2**31,
        }

    async def patiently(self, session: Any, request: _Request, read: Any, where: str, drawn: random.Random) -> Any:
        """What a request brings, which is made again while it may pass."""
        for number in range(self.endpoint.tries):
            await self.turn()
            try:
                return read(await self.once(session, request))
            except (Passing, self.http.ClientError, TimeoutError, OSError) as error:
                why = self.safe(str(error) or type(error).__name__)
                wait = max(self.endpoint.pause * 2**number * (0.5 + drawn.random()), getattr(error, "pause", 0.0))
            if number + 1 < self.endpoint.tries:
                await asyncio.sleep(wait)
        raise DownloadError(
            f"{self.base} did not answer {where} in {self.endpoint.tries} tries ({why}): see whether it runs, or give "
            "it more --patience or fewer --concurrent requests; what was written is kept, so run the same command again"
        )

    async def turn(self) -> None:
        """Wait until the rate allows one more request."""
        if self.endpoint.rate is None:
            return
        now = time.monotonic()
        at = max(now, self.free)
        self.free = at + 60 / self.endpoint.rate
        await asyncio.sleep(at - now)

    async def once(self, session: Any, request: _Request) -> Any:
        url = self.base + request.path
        async with session.request(request.verb, url, json=request.body, allow_redirects=False) as response:
            content = await _limited(response.content, request.most)
            text = content[: request.most].decode("utf-8", "replace")  # JSON is UTF-8, whatever the header declares
            if response.status in PASSING:
                raise Passing(f"status {response.status}", _pause(response.headers.get("Retry-After", "")))
            if response.status != 200:
                said = self.quoted(text)
                mend = (
                    f"put its key into {self.endpoint.key}" if response.status in (401, 403) else "check URL and model"
                )
                raise DownloadError(f"{url} answers with status {response.status} ({said}): {mend}")
        if len(content) > request.most:
            raise Passing(f"a response of more than {request.most:,} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Passing(f"no JSON: {self.quoted(text)}") from None

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


async def _limited(stream: Any, most: int) -> bytes:
    """What a stream brings: no more than one chunk beyond ``most`` bytes."""
    content = bytearray()
    while len(content) <= most and (chunk := await stream.readany()):
        content += chunk
    return bytes(content)


def _models(said: Any) -> list[str]:
    try:
        return [str(each["id"]) for each in said["data"]]
    except (KeyError, TypeError):
        raise Passing("no list of models") from None


def _answer(said: Any) -> Answer:
    """An answer out of what the protocol says; nonsense may pass."""
    try:
        choice = said["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (KeyError, TypeError, IndexError, AttributeError):
        raise Passing("an answer without choices") from None
    if not isinstance(text, str | None):
        raise Passing("an answer whose content is no text")
    usage = said.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, tokens = (each if isinstance(each, int) and 0 <= each < MOST_TOKENS else None for each in counts)
    return Answer(text or "", reason != "length", prompt, tokens)


def _pause(said: str) -> float:
    """The seconds of a Retry-After header; its other form, a date, is passed over."""
    try:
        return min(max(float(said), 0.0), 600.0)
    except ValueError:
        return 0.0
