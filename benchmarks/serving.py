"""The server under load: concurrent users ask SmolLM2 for two minutes, some of them give up.

Every user asks one question after the other, greedily, and streams the answer; one in eight requests is cancelled after
a few tokens. Reported are the answers per minute, the time to the first token, whether every complete answer is that of
the model alone, and the memory of the server after the first and the last quarter. The same number of answers by the
model's `generate`, one after the other, is the comparison.

    python benchmarks/serving.py            # five minutes on two idle cores
    python benchmarks/serving.py --quick    # a few seconds, a nano model
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch

import lamella
from lamella.results import Record
from lamella.zoo import open_tokenizer

NANO = Path(__file__).parents[1] / "tests" / "models" / "nano-llama"
USERS, TOKENS = 16, 24
QUESTIONS = [
    f"Name {number} things that are {colour}:" for number in (1, 2, 3, 4) for colour in ("red", "blue", "green", "old")
]
CANCELLED = 8  # one in so many requests is cancelled


@dataclass
class Load:
    """What the users saw.

    Attributes:
        answers: question and answer of each complete request.
        first: seconds to the first token of each request.
        cancelled: number of cancelled requests.
        errors: errors of requests.
    """

    answers: list[tuple[str, str]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    cancelled: int = 0
    errors: list[str] = field(default_factory=list)


def use(client: openai.OpenAI, model: str, seed: int, end: float, load: Load) -> None:
    """Ask one question after the other until the time is over."""
    drawn = random.Random(seed)
    while time.monotonic() < end:
        question, gives_up = drawn.choice(QUESTIONS), drawn.random() < 1 / CANCELLED
        begin, texts = time.monotonic(), []
        try:
            stream = client.completions.create(
                model=model, prompt=question, max_tokens=TOKENS, temperature=0, stream=True
            )
            for part in stream:
                if part.choices:
                    texts.append(part.choices[0].text or "")
                if len(texts) == 1:
                    load.first.append(time.monotonic() - begin)
                if gives_up and len(texts) == 3:
                    stream.close()
                    break
        except openai.APIError as error:
            load.errors.append(repr(error))
            continue
        if gives_up:
            load.cancelled += 1
        else:
            load.answers.append((question, "".join(texts)))


def memory(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of a process in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@torch.no_grad()
def alone(model: Any, tokenizer: Any) -> tuple[dict[str, str], float]:
    """Return the model's own answer to each question, and its mean seconds."""
    found, begin = {}, time.perf_counter()
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found[question] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found, (time.perf_counter() - begin) / len(QUESTIONS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, a nano model")
    quick = parser.parse_args().quick
    model, seconds = (str(NANO), 6.0) if quick else ("smollm2", 120.0)
    expected, each = alone(lamella.open(model).model, open_tokenizer(model))
    command = [sys.executable, "-m", "lamella.cli", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        printed = ""
        while "/v1" not in printed:
            printed += (line := process.stderr.readline())
            assert line, printed
        threading.Thread(target=process.stderr.read, daemon=True).start()
        address = "http://127.0.0.1:" + printed.split("127.0.0.1:")[1].split("/")[0] + "/v1"
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)
        load, end = Load(), time.monotonic() + seconds
        users = [threading.Thread(target=use, args=(client, model, seed, end, load)) for seed in range(USERS)]
        for user in users:
            user.start()
        time.sleep(seconds / 4)
        before = memory(process)
        for user in users:
            user.join()
        after = memory(process)
    finally:
        process.terminate()
        process.wait(30)
    wrong = sum(answer != expected[question] for question, answer in load.answers)
    per_minute = len(load.answers) / seconds * 60
    record = Record("serving", f"{USERS} users, {TOKENS} tokens for each answer", 0)
    record.table(
        f"{model} for {seconds:g} seconds",
        ["", "value"],
        [
            ["complete answers", len(load.answers)],
            ["cancelled requests", load.cancelled],
            ["answers per minute", per_minute],
            ["answers per minute by generate, one after the other", 60 / each],
            ["median seconds to the first token", statistics.median(load.first)],
            ["memory after a quarter of the time, MB", before],
            ["memory at the end, MB", after],
        ],
    )
    record.check("answers that are not those of the model alone", "none", wrong, wrong == 0)
    record.check("errors", "none", "; ".join(load.errors[:3]) or "none", not load.errors)
    record.check(
        "memory at the end relative to that after a quarter", "at most 1.1", after / before, after <= 1.1 * before
    )
    faster = per_minute * each / 60
    record.check("answers relative to one after the other", "more", f"{faster:.2f}", faster > 1)
    return record.finish(Path(__file__).parent / "results" / f"serving{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
