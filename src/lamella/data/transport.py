"""The transport below the client of an endpoint: how fast requests are sent, and what is read of responses.

Imported only where httpx2 is installed, which comes with openai.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx

from lamella.data.protocol import FOUND, ChatResponse

TOKEN = 1024  # bytes of a token in JSON, at most: 128 spaces are one in some vocabularies, and each may be escaped
REST = 2**18  # bytes of a response beside its answer, at most
LISTED = 2**23  # bytes of a list of models, at most
MOST_TOKENS = 2**31  # that an endpoint can have counted
LONGEST_PAUSE = 120.0  # seconds that a server can ask to wait; for more, the client would give up


class Transport(httpx.AsyncHTTPTransport):
    """Sends requests at a limited rate, and reads responses up to a size, within a time, as UTF-8.

    Of a successful response the answer, or the list of models, is found here, so that the client makes the request
    again where there is none; it is put into the response's extensions.

    Args:
        concurrent: connections at once.
        rate: requests a minute, at most; None: as many as come.
        patience: seconds that one answer may take.
        keyed: whether requests are sent with the key.
        quoted: the beginning of a text, without the key, for messages.
    """

    def __init__(
        self, concurrent: int, rate: float | None, patience: float, *, keyed: bool, quoted: Callable[[str], str]
    ) -> None:
        super().__init__(limits=httpx.Limits(max_connections=concurrent))
        self.rate, self.patience, self.keyed, self.quoted = rate, patience, keyed, quoted
        self.free = 0.0  # when the next request may be made

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self.turn()
        if not self.keyed:
            del request.headers["Authorization"]
        request.headers["Accept-Encoding"] = "identity"  # a compressed response could expand a thousandfold
        asked = json.loads(request.content) if request.content else None
        most = REST + TOKEN * asked["max_tokens"] if asked else LISTED
        try:
            async with asyncio.timeout(self.patience):
                response = await super().handle_async_request(request)
                content = await _limited(response, most)
        except TimeoutError:
            raise httpx.ReadTimeout(f"no answer in {self.patience:g} seconds") from None
        text = content[:most].decode("utf-8", "replace")  # JSON is UTF-8, whatever the header declares
        if not response.is_success:
            pause = _pause(response.headers.get("Retry-After", ""))
            return httpx.Response(response.status_code, headers={"Retry-After": pause}, text=text, request=request)
        if len(content) > most:
            raise httpx.ReadError(f"a response of more than {most:,} bytes")
        try:
            found = _answer(json.loads(text)) if asked else _models(json.loads(text))
        except (ValueError, RecursionError):
            raise httpx.ReadError(f"no JSON: {self.quoted(text)}") from None
        return httpx.Response(200, extensions={FOUND: found}, request=request)

    async def turn(self) -> None:
        """Wait until the rate allows one more request."""
        if self.rate is None:
            return
        now = time.monotonic()
        at = max(now, self.free)
        self.free = at + 60 / self.rate
        await asyncio.sleep(at - now)


async def _limited(response: httpx.Response, most: int) -> bytes:
    """What a response brings, as it was sent: no more than one chunk beyond ``most`` bytes."""
    content = bytearray()
    try:
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > most:
                break
    finally:
        await response.aclose()
    return bytes(content)


def _models(said: Any) -> list[str]:
    try:
        return [str(each["id"]) for each in said["data"]]
    except (KeyError, TypeError):
        raise httpx.ReadError("no list of models") from None


def _answer(said: Any) -> ChatResponse:
    """An answer out of what the protocol says."""
    try:
        choice = said["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
    except (KeyError, TypeError, IndexError, AttributeError):
        raise httpx.ReadError("an answer without choices") from None
    if not isinstance(text, str | None):
        raise httpx.ReadError("an answer whose content is no text")
    usage = said.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, tokens = (each if isinstance(each, int) and 0 <= each < MOST_TOKENS else None for each in counts)
    return ChatResponse(text or "", reason != "length", prompt, tokens)


def _pause(said: str) -> str:
    """The seconds of a Retry-After header as the client reads them; its other form, a date, is passed over."""
    try:
        seconds = float(said)
    except ValueError:
        return ""
    return f"{min(seconds, LONGEST_PAUSE):g}" if seconds > 0 else ""
