"""Untrusted responses of a server: each is an answer, or a one-line error, and never contains the key."""

from __future__ import annotations

import gzip
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import response, speaking
from strategies import answered, damaged, dumped, mutated, share, strings

from lamella.data import Endpoint, Sampling
from lamella.data.protocol import ChatRequest, ChatResponse
from lamella.errors import LamellaError

KEY = "sk-very-secret-indeed"
ANSWER: dict[str, Any] = {
    "id": "x",
    "choices": [{"message": {"role": "assistant", "content": f"Yes, {KEY}."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
MODELS: dict[str, Any] = {"object": "list", "data": [{"id": f"nano {KEY}"}]}
CHARSETS = ["utf-8", "hex", "idna", "undefined", "rot13", "utf-16", "unicode_escape", "zip", "x" * 300]
QUESTION = ChatRequest([{"role": "user", "content": "Hi"}], 4, 0)


class Server:
    """The next response of the server, and its address."""

    response: bytes = b""
    url: str = ""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    platform.platform()  # known from then on: openai's client sends it, and Python runs `uname` for it
    found = Server()
    with speaking(lambda: [found.response]) as found.url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_KEY", KEY)
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("endpoint") / "folder"
    made.mkdir()
    return made


@st.composite
def responses(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """Draw almost valid HTTP responses: status, headers, length or JSON are changed."""
    text = draw(st.one_of(mutated(document).map(dumped), mutated(document).map(json.dumps), strings))
    body = text.encode("utf-8", "surrogatepass")
    body = draw(st.one_of(st.just(body), st.just(body), damaged(body)))
    headers: dict[str, str] = {"Content_Type": f"application/json; charset={draw(st.sampled_from(CHARSETS))}"}
    if draw(st.integers(0, 4)) == 0:
        body, headers["Content_Encoding"] = (
            gzip.compress(body),
            draw(st.sampled_from(["gzip", "deflate", "br", "zstd"])),
        )
    if draw(st.integers(0, 4)) == 0:
        headers["Retry_After"] = draw(st.sampled_from(["nan", "inf", "-1", "1e400", "Wed, 21 Oct", "0"]))
    status = draw(
        st.sampled_from(["200 OK"] * 6 + ["204 None", "302 Found", "401 No", "404 No", "429 Slow", "999 Odd"])
    )
    whole = response(body, status, **headers)
    return draw(st.one_of(st.just(whole), st.just(whole), damaged(whole, within=120)))


def is_clean(text: str) -> bool:
    return text.encode().decode() == text and KEY not in text


@given(response=responses(ANSWER))
def test_any_response_is_an_answer_or_one_line(server: Server, folder: Path, response: bytes):
    server.response = response
    endpoint = Endpoint(server.url, key="MY_KEY", tries=1, timeout=5.0)
    with answered(folder, gigabytes=1, allowed="socket.connect"):
        try:
            ((number, answer),) = endpoint.ask([QUESTION], "nano", Sampling())
        except LamellaError as error:
            assert is_clean(str(error))
            raise
        assert number == 0 and isinstance(answer, ChatResponse) and is_clean(answer.text)
        assert all(each is None or 0 <= each < 2**31 for each in (answer.prompt, answer.tokens))


@share(2)
@given(response=responses(MODELS))
def test_any_list_of_models_is_a_name_or_one_line(server: Server, folder: Path, response: bytes):
    server.response = response
    with answered(folder, gigabytes=1, allowed="socket.connect"):
        try:
            assert is_clean(Endpoint(server.url, key="MY_KEY", tries=1, timeout=5.0).model())
        except LamellaError as error:
            assert is_clean(str(error))
            raise


def test_the_response_that_is_damaged_above_is_an_answer(server: Server):
    server.response = response(json.dumps(ANSWER).encode())
    endpoint = Endpoint(server.url, key="MY_KEY", tries=1)
    assert list(endpoint.ask([QUESTION], "nano", Sampling())) == [(0, ChatResponse("Yes, ***.", True, 3, 2))]
