"""Requests to an endpoint and their answers, as its client and the transport below the client exchange them."""

from __future__ import annotations

from typing import NamedTuple

FOUND = "found"  # the extension of a response that holds what was found in it


class ChatRequest(NamedTuple):
    """One request.

    Attributes:
        messages: a conversation, up to where the answer begins.
        most: tokens of the answer, at most.
        seed: of what is drawn, where the endpoint heeds it.
    """

    messages: list[dict[str, str]]
    most: int
    seed: int


class ChatResponse(NamedTuple):
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
