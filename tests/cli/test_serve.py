"""The server, asked by the openai client: answers are those of the model alone, whoever else asks at the same time."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

import lamella
from lamella.cli.serving.batching import Batching, Request
from lamella.cli.serving.command import build
from lamella.data.decoding import Prompt, Running, Sampling
from lamella.errors import MethodError
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.zoo import nano, open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
PROMPTS = ("The", "A function that returns the value of", "Return", "class", "If the file does not exist, then", "Use")
PHASED = PhasedPath(prefill=[0, 1, 2, 3, 4, 5], decode=[0, 1, 4, 5])


@contextmanager
def served(
    plan: Path | None = None,
    draft: str | None = None,
    rows: int = 16,
    token: str | None = None,
    host: str = "127.0.0.1",
) -> Iterator[Any]:
    """Serve the nano model from a thread, and yield a client."""
    app = build(str(NANO_LLAMA), None if plan is None else str(plan), draft, rows, token, (host,))
    config = uvicorn.Config(app, host=host, port=0, log_level="error", timeout_graceful_shutdown=1)
    server, bound = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key=token or "none", max_retries=0, timeout=60)
    try:
        while not server.started:
            time.sleep(0.01)
        yield client
    finally:
        client.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def asked(client: Any, prompt: str, **settings: Any) -> str:
    given = {"max_tokens": 24, "temperature": 0} | settings
    found = client.completions.create(model=str(NANO_LLAMA), prompt=prompt, **given)
    return str(found.choices[0].text)


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, tuple[Path | None, Any]]:
    """Plans by name: their files, and what the model generates with them."""
    stack = lamella.open(NANO_LLAMA)
    reference = ModelReference.of(stack)
    found: dict[str, tuple[Path | None, Any]] = {"whole": (None, stack.model)}
    for name, plan in {
        "cut": Plan(model=reference, drop=["layers.0.attn", "layers.3"]),
        "phased": Plan(model=reference, path={"text": PHASED}),
    }.items():
        plan.write(tmp_path / f"{name}.json")
        found[name] = tmp_path / f"{name}.json", lamella.apply(stack, plan)
    return found


def alone(view: Any, prompt: str, tokens: int = 24) -> str:
    tokenizer = open_tokenizer(NANO_LLAMA)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = view.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("name", ["whole", "cut", "phased"])
@pytest.mark.parametrize("draft", [None, "lookup", str(NANO_LLAMA)], ids=["plain", "lookup", "model"])
def test_everyone_gets_the_answer_of_the_model_alone(plans: Any, name: str, draft: str | None) -> None:
    file, view = plans[name]
    expected = {prompt: alone(view, prompt) for prompt in PROMPTS}
    with served(file, draft, rows=4) as client, ThreadPoolExecutor(8) as users:
        answers = list(users.map(lambda prompt: asked(client, prompt), PROMPTS * 2))
    assert answers == [expected[prompt] for prompt in PROMPTS * 2]


def test_a_seed_decides_an_answer_beside_others_of_other_temperatures() -> None:
    with served(rows=8) as client, ThreadPoolExecutor(8) as users:
        settings = [{"temperature": (0.7, 1.3, 0)[n % 3], "top_p": 0.9, "seed": n} for n in range(6)]
        single = [asked(client, prompt, **each) for prompt, each in zip(PROMPTS, settings, strict=True)]
        together = list(users.map(lambda pair: asked(client, pair[0], **pair[1]), zip(PROMPTS, settings, strict=True)))
        stopped = [asked(client, "The", temperature=1.0, seed=5, stop=["zzz"]) for _ in range(2)]
        unseeded = {asked(client, PROMPTS[0], temperature=1.0) for _ in range(4)}
    assert together == single and len(unseeded) > 1 and stopped[0] == stopped[1]


def test_streams_stop_strings_and_conversations_say_what_one_answer_says(plans: Any) -> None:
    expected = alone(plans["whole"][1], PROMPTS[1])
    with served() as client:
        streamed = client.completions.create(
            model=str(NANO_LLAMA), prompt=PROMPTS[1], max_tokens=24, temperature=0, stream=True
        )
        assert "".join(each.choices[0].text or "" for each in streamed) == expected
        messages = [{"role": "user", "content": PROMPTS[1]}]
        stop = expected[5:7]
        given: dict[str, Any] = {"model": str(NANO_LLAMA), "max_tokens": 24, "temperature": 0}
        said = client.chat.completions.create(messages=messages, **given).choices[0].message.content
        assert said == expected  # without a chat template, a conversation is its text
        cut = client.chat.completions.create(messages=messages, stop=[stop], **given).choices[0].message.content
        assert cut.startswith(expected[: expected.index(stop) + len(stop)]) and len(cut) < len(expected)
        response = client.responses.create(
            input=PROMPTS[1], model=str(NANO_LLAMA), max_output_tokens=24, temperature=0, stream=False
        )
        assert response.output_text == expected
        assert [each.id for each in client.models.list()] == [str(NANO_LLAMA)]


def test_a_cancelled_request_frees_its_place() -> None:
    with served(rows=1) as client:
        stream = client.completions.create(
            model=str(NANO_LLAMA), prompt="The", max_tokens=100_000, temperature=0, stream=True
        )
        next(iter(stream))
        stream.close()
        assert asked(client, "Return")  # the only place


def test_a_request_whose_tokens_cannot_be_passed_on_ends_alone() -> None:
    batching = Batching(lamella.open(NANO_LLAMA).model, rows=4)
    ended: queue.Queue[str] = queue.Queue()

    def refuse(ids: list[int]) -> None:
        raise ValueError("no text")

    def request(put: Any) -> Request:
        row = Running(Prompt([5, 6, 7], 12, 0), Sampling(temperature=0), ())
        return Request(row, put, lambda: ended.put("end"), lambda error: ended.put(str(error)))

    for each in (request(refuse), request(lambda ids: None)):
        batching._waiting.put(each)
    assert {ended.get(timeout=20) for _ in range(2)} == {"no text", "end"}
    batching._waiting.put(request(lambda ids: None))
    assert ended.get(timeout=20) == "end"


def test_requests_that_make_no_sense_are_refused_and_the_others_go_on() -> None:
    with served() as client:
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="somebody/else", prompt="a")
        assert "pinned to" in error.value.response.text
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=str(NANO_LLAMA), messages=[{"role": "user", "content": [{"type": 1}]}])
        for path in ("/../reset", "/../load_model"):
            with pytest.raises(openai.NotFoundError):
                client.post(path, body={"model": "smollm2"}, cast_to=object)
        assert asked(client, "The")


def test_a_token_is_asked_for_where_there_is_one_and_needed_for_other_addresses(lamella: Any) -> None:
    with served(token="secret") as client:
        assert asked(client, "The")
        with pytest.raises(openai.AuthenticationError) as error:
            asked(client.with_options(api_key="guess"), "The")
        assert "send the token" in error.value.response.text
    outcome = lamella("serve", NANO_LLAMA, "--host", "0.0.0.0")
    assert outcome.code == 2 and "set LAMELLA_TOKEN" in " ".join(outcome.err.split())


def test_a_page_under_another_name_is_refused() -> None:
    with served() as client:
        with pytest.raises(openai.BadRequestError) as error:
            asked(client.with_options(default_headers={"Host": "example.com"}), "The")
        assert "Invalid host" in error.value.response.text


def test_it_is_served_on_the_other_loopback_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with served(host="::1") as client:
        assert asked(client, "The")


def test_a_failure_of_the_model_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with served() as client:
        monkeypatch.setattr("lamella.cli.serving.batching.Batch.join", fail)
        with pytest.raises(openai.InternalServerError) as error:
            asked(client, "The")
        assert "out of memory" in error.value.response.text


@pytest.mark.parametrize("name", ["t5", "llava", "llada"])
def test_what_does_not_continue_text_is_refused(name: str, tmp_path: Path) -> None:
    nano(name).save_pretrained(tmp_path)
    open_tokenizer(NANO_LLAMA).save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="does not continue text by itself"):
        build(str(tmp_path), None, None, 1, None, None)


@pytest.mark.slow
def test_a_killed_server_leaves_nothing() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lamella.cli", "serve", str(NANO_LLAMA), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        text = ""
        while "/v1" not in text:
            text += (line := process.stderr.readline())
            assert line, text
        port = int(text.split("127.0.0.1:")[1].split("/")[0])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=str(NANO_LLAMA), prompt="The", max_tokens=100_000, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally:
        process.kill()
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", port)) != 0
