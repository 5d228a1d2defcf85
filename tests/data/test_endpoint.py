"""An endpoint: a real server on this machine, with a real model behind it, that fails as servers do."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import Served, response, serving, speaking

from lamella.data import Endpoint, InputContext, LocalWriter, RemoteWriter, Sampling, Writer, WritingRequest, rollout
from lamella.data.protocol import ChatRequest
from lamella.errors import DownloadError, LamellaError, MethodError

pytest.importorskip("openai")  # before memory is counted
GREEDY = Sampling(temperature=0)
NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def served(instructed: Path) -> Iterator[Served]:
    with serving(instructed) as server:
        yield server


def asked(count: int = 6, most: int = 8) -> list[WritingRequest]:
    return [
        WritingRequest(
            f"r{n}", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {n}."}], most, n
        )
        for n in range(count)
    ]


def writer(served: Served, folder: Path, **how: Any) -> RemoteWriter:
    return RemoteWriter(replace(Endpoint(served.url), **how), folder)


def test_an_endpoint_says_what_the_same_model_says_here(served: Served, instructed: Path) -> None:
    here, there = (
        rollout(each, asked(), GREEDY) for each in (LocalWriter(str(instructed)), writer(served, instructed))
    )
    assert here == there and len(there) == 6
    assert {body["model"] for body in served.asked} == {"nano"} and {body["max_tokens"] for body in served.asked} == {8}


@pytest.mark.parametrize(
    "fail",
    [
        (429, {"Retry-After": "0"}, b"slow down"),
        (500, {}, b"oh"),
        (503, {}, b""),
        (200, JSON, b"<html>this is no JSON</html>"),
        (200, JSON, b"[]"),
        (200, JSON, json.dumps({"choices": []}).encode()),
        (200, JSON, json.dumps({"choices": [{"message": {"content": 7}}]}).encode()),
        0.0,
    ],
    ids=["429", "500", "503", "no JSON", "no object", "no choice", "no text", "hangs up"],
)
def test_what_may_pass_is_asked_again(served: Served, instructed: Path, fail: Any) -> None:
    served.fails = [fail, fail]
    found = rollout(writer(served, instructed), asked(), GREEDY)
    assert found == rollout(LocalWriter(str(instructed)), asked(), GREEDY) and len(served.asked) == 8


def test_a_pause_that_the_server_asks_for_is_kept(served: Served, instructed: Path) -> None:
    served.fails = [(429, {"Retry-After": "1"}, b"")]
    rollout(writer(served, instructed), asked(1), GREEDY)
    assert served.times[1] - served.times[0] >= 1


def test_silence_ends_after_the_timeout_and_the_request_is_made_again(served: Served, instructed: Path) -> None:
    served.fails = [2.0]
    assert len(rollout(writer(served, instructed, timeout=0.5), asked(1), GREEDY)) == 1 and len(served.asked) == 2


def test_a_server_that_keeps_failing_ends_the_run_in_one_line(served: Served, instructed: Path) -> None:
    served.fails = [(500, {}, b"oh")] * 50
    with pytest.raises(
        DownloadError, match=r"did not answer request \d in 3 tries \(status 500\).*run it again"
    ) as error:
        rollout(writer(served, instructed, tries=3), asked(), GREEDY)
    assert "\n" not in str(error.value)


def test_nobody_there_is_said_in_one_line(instructed: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(DownloadError, match="did not answer its models in 2 tries"):
        RemoteWriter(Endpoint(url, tries=2), instructed)


def test_a_key_comes_from_the_environment_and_is_nowhere_else(
    served: Served, instructed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-very-secret-indeed"
    monkeypatch.setenv("MY_KEY", secret)
    theirs = writer(served, instructed, key="MY_KEY")
    rollout(theirs, asked(2), GREEDY, tmp_path / "journal.jsonl")
    assert set(served.keys) == {f"Bearer {secret}"}
    served.fails = [(401, JSON, f'{{"error": "the key {secret} is wrong"}}'.encode())]
    with pytest.raises(DownloadError, match=r"status 401.*put its key into MY_KEY") as error:
        rollout(theirs, asked(1), GREEDY)
    told = [
        str(error.value),
        repr(theirs.endpoint),
        json.dumps(theirs.describe()),
        (tmp_path / "journal.jsonl").read_text(),
    ]
    assert not [text for text in [*told, *capfd.readouterr()] if secret in text]
    monkeypatch.delenv("MY_KEY")
    rollout(theirs, asked(1), GREEDY)
    assert served.keys[-1] is None


SECRET = "sk-very-secret-indeed"
REPEATED = f"The key is {SECRET}, and {SECRET} again."


def said(content: Any, **more: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, **more}]}).encode()


def test_a_key_that_an_answer_repeats_is_masked(
    served: Served, instructed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    escaped = said(REPEATED).replace(b"sk-", rb"sk\u002d")
    served.fails = [(200, JSON, said(REPEATED)), (200, JSON, escaped)]
    theirs = writer(served, instructed, key="MY_KEY", concurrent=1)
    found = rollout(theirs, asked(2), GREEDY, tmp_path / "journal.jsonl")
    assert {each.text for each in found.values()} == {"The key is ***, and *** again."}
    assert SECRET not in (tmp_path / "journal.jsonl").read_text()


def test_a_key_that_a_list_of_models_repeats_is_masked(instructed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    body = json.dumps({"data": [{"id": f"model-{SECRET}\ud800"}]}).encode()
    with speaking(lambda: [response(body)]) as url:
        found = RemoteWriter(Endpoint(url, key="MY_KEY"), instructed)
    assert found.name == "model-***\ufffd" and SECRET not in json.dumps(found.describe())


def test_a_key_at_the_end_of_a_quoted_message_is_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    for status in ("403 Forbidden", "200 OK"):
        with (
            speaking(lambda status=status: [response(b"x" * 190 + SECRET.encode(), status)]) as url,
            pytest.raises(DownloadError) as error,
        ):
            Endpoint(url, key="MY_KEY", tries=1).model()
        assert SECRET[:4] not in str(error.value)


def test_a_word_that_stands_for_no_key_is_not_masked(
    served: Served, instructed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "EMPTY")
    served.fails = [(200, JSON, said("AN EMPTY ROOM"))]
    (found,) = rollout(writer(served, instructed, key="MY_KEY"), asked(1), GREEDY).values()
    assert found.text == "AN EMPTY ROOM"


@pytest.mark.parametrize("charset", ["hex", "idna", "undefined", "rot13", "punycode", "utf-16", "nonsense", "\xff"])
def test_an_answer_is_utf_8_whatever_its_header_declares(served: Served, instructed: Path, charset: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": "Grüße"}}]}, ensure_ascii=False).encode()
    served.fails = [(200, {"Content-Type": f"application/json; charset={charset}"}, body)]
    (found,) = rollout(writer(served, instructed, tries=1), asked(1), GREEDY).values()
    assert found.text == "Grüße"


def test_half_a_surrogate_pair_is_replaced(served: Served, instructed: Path, tmp_path: Path) -> None:
    served.fails = [(200, JSON, rb'{"choices": [{"message": {"content": "a\ud800b \ud83d\ude00"}}]}')]
    (found,) = rollout(writer(served, instructed, tries=1), asked(1), GREEDY, tmp_path / "journal.jsonl").values()
    assert found.text == "a\ufffdb \U0001f600"


def endless() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"100000\r\n" + b" " * 2**20 + b"\r\n"


def long() -> Iterator[bytes]:
    yield response(said("x" * 2**26))


def expanding() -> Iterator[bytes]:
    yield response(gzip.compress(said("x" * 2**26)), Content_Encoding="gzip")


def failing() -> Iterator[bytes]:
    yield response(b"x" * 2**26, "404 Not Found")


@pytest.mark.parametrize("body", [endless, long, expanding, failing])
def test_a_response_is_read_up_to_what_its_tokens_can_mean(body: Any) -> None:
    parts = [] if body is endless else list(body())  # made before memory is counted
    with speaking(lambda: parts or body()) as url:
        tracemalloc.start()
        with pytest.raises(DownloadError, match=r"more than \d|no JSON|status 404") as error:
            list(Endpoint(url, tries=1).ask([ChatRequest([{"role": "user", "content": "Hi"}], 8, 0)], "nano", GREEDY))
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
    assert len(str(error.value)) < 1000


def test_an_answer_of_the_longest_tokens_is_read_whole(served: Served, instructed: Path) -> None:
    served.fails = [(200, JSON, said("\u00e9" * 128 * 8, logprobs=None))]
    (found,) = rollout(writer(served, instructed, tries=1), asked(1, most=8), GREEDY).values()
    assert found.text == "\u00e9" * 128 * 8


def test_no_more_requests_at_once_and_a_minute_than_allowed(instructed: Path) -> None:
    with serving(instructed, delay=0.1) as served:
        rollout(writer(served, instructed, concurrent=3), asked(9, most=2), GREEDY)
        assert 1 < served.most <= 3
        served.times.clear()
        began = time.monotonic()
        rollout(writer(served, instructed, rate=600), asked(6, most=2), GREEDY)
        assert len(served.times) == 6 and max(served.times) - began >= 5 * 0.1  # five pauses between six requests


def test_a_journal_asks_only_for_what_is_missing(served: Served, instructed: Path, tmp_path: Path) -> None:
    journal, theirs = tmp_path / "journal.jsonl", writer(served, instructed, tries=1, concurrent=1)
    served.fails = [None, None, (500, {}, b"")]
    with pytest.raises(DownloadError):
        rollout(theirs, asked(), GREEDY, journal)
    assert len(journal.read_text().splitlines()) == 3  # a header and two answers
    rollout(theirs, asked(), GREEDY, journal)
    assert len(served.asked) == 3 + 4
    before = len(served.asked)
    rollout(theirs, asked(), GREEDY, journal)
    assert len(served.asked) == before


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        (
            "http://user:pass@127.0.0.1/v1",
            {"tokenizer": "x"},
            "put the key into the environment variable OPENAI_API_KEY",
        ),
        ("http://127.0.0.1/v1", {}, "--tokenizer"),
        ("http://127.0.0.1/v1", {"plan": Path("plan.json"), "tokenizer": "x"}, "leave the plan out"),
        ("http:///v1", {"tokenizer": "x"}, "is no endpoint"),
        ("http://127.0.0.1/v1", {"tokenizer": "x", "concurrent": 0}, "above 0"),
    ],
)
def test_what_cannot_be_an_endpoint_is_refused_in_one_line(name: str, how: dict[str, Any], said: str) -> None:
    with pytest.raises(LamellaError, match=said) as error:
        Writer.open(name, InputContext(), **how)
    assert "\n" not in str(error.value) and "pass@" not in str(error.value)


def test_the_tokenizer_that_counts_is_part_of_what_is_told(served: Served, instructed: Path) -> None:
    one, other = (RemoteWriter(Endpoint(served.url), folder) for folder in (instructed, NANO_LLAMA))
    assert one.describe() == {"endpoint": served.url, "model": "nano", "tokenizer": str(instructed)}
    assert other.describe() != one.describe()
    assert RemoteWriter(Endpoint(served.url), one.tokenizer).describe() == one.describe()


def test_several_models_must_be_told_apart(served: Served, instructed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RemoteWriter(Endpoint(served.url), instructed).name == "nano"
    with pytest.raises(MethodError, match="--tokenizer"):
        Writer.open(served.url, InputContext())
    assert Writer.open(served.url, InputContext(), served="other", tokenizer=str(instructed)).name == "other"


@pytest.mark.slow
def test_transformers_own_server_is_asked_too(instructed: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [
        program if program.exists() else shutil.which("transformers"),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*map(str, command), "--device", "cpu"], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        theirs = RemoteWriter(Endpoint(f"http://127.0.0.1:{port}/v1", served=str(instructed), tries=2), instructed)
        found = rollout(theirs, asked(2), GREEDY)
        assert len(found) == 2 and all(each.tokens >= 0 for each in found.values())
    finally:
        server.terminate()
        server.wait(30)
