"""A server on this machine that speaks the OpenAI protocol: a real model behind transformers' own ``generate``.

It can be told to fail first, in the ways in which servers do.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Served:
    """One server.

    Attributes:
        url: of its API.
        fails: what it says to the next requests for an answer, before it answers: (status, headers, body), or seconds
            of silence.
        asked: the bodies of all requests for an answer.
        keys: what stood in their headers.
        times: when they came.
        most: how many were under way at once.
    """

    url: str = ""
    fails: list[Any] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most: int = 0
    now: int = 0
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def serving(folder: Path, delay: float = 0.0) -> Iterator[Served]:
    """Serve the model of a folder.

    Args:
        delay: seconds that each answer takes longer.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.say(200, {}, json.dumps({"data": [{"id": "nano"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.asked.append(body)
                served.keys.append(self.headers.get("Authorization"))
                served.times.append(time.monotonic())
                served.now += 1
                served.most = max(served.most, served.now)
                fail = served.fails.pop(0) if served.fails else None
            try:
                if isinstance(fail, float):
                    time.sleep(fail)
                    self.close_connection = True
                elif fail is not None:
                    self.say(*fail)
                else:
                    time.sleep(delay)
                    self.say(200, {}, json.dumps(answer(model, tokenizer, body)).encode())
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with served.lock:
                    served.now -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def speaking(response: Callable[[], Iterable[bytes]]) -> Iterator[str]:
    """Answer every request with these bytes, whatever they are, and hang up.

    Yields:
        The URL of the API.
    """
    stopped = threading.Event()

    def speak(connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(10)
                received = b""
                while b"\r\n\r\n" not in received:
                    received += connection.recv(2**16)
                for part in response():
                    if stopped.is_set():
                        return
                    connection.sendall(part)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**16):  # until the other side has read all of it
                    pass
            except OSError:
                pass

    def listen() -> None:
        while not stopped.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=speak, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        finally:
            stopped.set()
            server.shutdown(socket.SHUT_RDWR)


def response(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP response."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


@torch.no_grad()
def answer(model: Any, tokenizer: Any, body: dict[str, Any]) -> dict[str, Any]:
    """What the model says to one request, greedily."""
    text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)[0, ids.shape[1] :]
    finished = int(out[-1]) == tokenizer.eos_token_id
    said = tokenizer.decode(out, skip_special_tokens=True)
    return {
        "choices": [
            {"message": {"role": "assistant", "content": said}, "finish_reason": "stop" if finished else "length"}
        ],
        "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": len(out) - finished},
    }
