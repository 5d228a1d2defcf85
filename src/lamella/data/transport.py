"""The HTTP transport below the client of an endpoint: limits the rate of requests and the size of responses.

Imported only if httpx2 is installed, which comes with openai.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx

from lamella.data.protocol import FOUND, ChatResponse

TOKEN = 1024  # maximum bytes of a token in JSON: some vocabularies have tokens of 128 spaces, and each may be escaped
REST = 2**18  # maximum bytes of a response in addition to its answer
LISTED = 2**23  # maximum bytes of a list of models
MOST_TOKENS = 2**31  # larger counts of tokens are ignored
LONGEST_PAUSE = 120.0  # seconds; the client gives up if a server asks for a longer pause


class Transport(httpx.AsyncHTTPTransport):
    """Sends requests at a limited rate, and reads responses up to a maximum size, within a timeout, as UTF-8.

    The content of a successful response, an answer or a list of models, is parsed here, so that the client retries the
    request if there is none; it is stored in the extensions of the response.

    Args:
        concurrent: maximum number of connections.
        rate: maximum number of requests per minute; unlimited if None.
        timeout: maximum number of seconds for one response.
        keyed: whether requests are sent with the API key.
        quoted: shortens a text for messages and masks the key.
    """

    def __init__(
        self, concurrent: int, rate: float | None, timeout: float, *, keyed: bool, quoted: Callable[[str], str]
    ) -> None:
        super().__init__(limits=httpx.Limits(max_connections=concurrent))
        self.rate, self.timeout, self.keyed, self.quoted = rate, timeout, keyed, quoted
        self.free = 0.0  # when the next request may be made

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its response, with the parsed content in its extensions."""
        await self.turn()
        if not self.keyed:
            del request.headers["Authorization"]
        request.headers["Accept-Encoding"] = "identity"  # a compressed response could expand a thousandfold
        body = json.loads(request.content) if request.content else None
        most = REST + TOKEN * body["max_tokens"] if body else LISTED
        try:
            async with asyncio.timeout(self.timeout):
                response = await super().handle_async_request(request)
                content = await _limited(response, most)
        except TimeoutError:
            raise httpx.ReadTimeout(f"no answer in {self.timeout:g} seconds") from None
        text = content[:most].decode("utf-8", "replace")  # JSON is UTF-8, whatever the header declares
        if not response.is_success:
            pause = _pause(response.headers.get("Retry-After", ""))
            return httpx.Response(response.status_code, headers={"Retry-After": pause}, text=text, request=request)
        if len(content) > most:
            raise httpx.ReadError(f"a response of more than {most:,} bytes")
        try:
            found = _answer(json.loads(text)) if body else _models(json.loads(text))
        except (ValueError, RecursionError):
            raise httpx.ReadError(f"no JSON: {self.quoted(text)}") from None
        return httpx.Response(200, extensions={FOUND: found}, request=request)

    async def turn(self) -> None:
        """Wait until the rate limit allows one more request."""
        if self.rate is None:
            return
        now = time.monotonic()
        at = max(now, self.free)
        self.free = at + 60 / self.rate
        await asyncio.sleep(at - now)


async def _limited(response: httpx.Response, most: int) -> bytes:
    """Read the raw body of a response, at most one chunk beyond ``most`` bytes."""
    content = bytearray()
    try:
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > most:
                break
    finally:
        await response.aclose()
    return bytes(content)


def _models(content: Any) -> list[str]:
    try:
        return [str(each["id"]) for each in content["data"]]
    except (KeyError, TypeError):
        raise httpx.ReadError("no list of models") from None


def _answer(content: Any) -> ChatResponse:
    """Parse a chat completion."""
    try:
        choice = content["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (KeyError, TypeError, IndexError, AttributeError):
        raise httpx.ReadError("an answer without choices") from None
    if not isinstance(text, str | None):
        raise httpx.ReadError("an answer whose content is no text")
    usage = content.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, tokens = (each if isinstance(each, int) and 0 <= each < MOST_TOKENS else None for each in counts)
    return ChatResponse(text or "", reason != "length", prompt, tokens)


def _pause(header: str) -> str:
    """Return the seconds of a Retry-After header in the form that the client reads; a date is ignored."""
    try:
        seconds = float(header)
    except ValueError:
        return ""
    return f"{min(seconds, LONGEST_PAUSE):g}" if seconds > 0 else ""
