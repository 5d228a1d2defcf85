"""Requests to an OpenAI-compatible endpoint and its responses, as the client and the transport exchange them."""

from __future__ import annotations

from typing import NamedTuple

FOUND = "found"  # the response extension that holds the parsed content


class ChatRequest(NamedTuple):
    """One request.

    Attributes:
        messages: a conversation, up to where the answer begins.
        max_tokens: the maximum number of tokens of the answer.
        seed: random seed, for endpoints that support it.
    """

    messages: list[dict[str, str]]
    max_tokens: int
    seed: int


class ChatResponse(NamedTuple):
    """One response.

    Attributes:
        text: the answer.
        finished: whether the answer ended by itself, not by its limit.
        prompt: tokens of the prompt as counted by the endpoint; None if it does not report them.
        tokens: tokens of the answer as counted by the endpoint; None if it does not report them.
    """

    text: str
    finished: bool
    prompt: int | None
    tokens: int | None
