"""Rephrasing compared with a plain ``generate`` loop: the same model, prompts and batch size, greedily.

The loop takes passages in order, sixteen per batch; ``generate`` keeps a finished row to the end of its batch. Here,
prompts of similar length are batched, finished rows are removed, and keys and values are appended in place. Answers end
where the rephraser ends them, or at one and a half times the length of their passage. The same model is also run by
llama.cpp, with 8-bit weights in a GGUF file.

    python benchmarks/rewrite.py            # SmolLM2 on 64 passages of Python's documentation; about half an hour
    python benchmarks/rewrite.py --quick    # 16 passages
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from lamella.data import Documents, InputContext, LocalWriter, Sampling
from lamella.data.decoding import Prompt, Row, batches, decode
from lamella.data.llama_cpp import GgufModel
from lamella.data.writer import WritingRequest
from lamella.evaluate import Ratio
from lamella.methods.wrap import open_styles, passages
from lamella.plan.quantize import write_gguf
from lamella.results import Record
from lamella.zoo import open_config, resolve

RESULTS = Path(__file__).parent / "results"
BATCH, GREEDY = 16, Sampling(temperature=0)


def prompts_of(writer: LocalWriter, count: int) -> list[Prompt]:
    """Return requests for passages of various lengths, in the order of their documents."""
    (style,) = open_styles(("medium",))
    texts = [
        part for each in Documents.open("pydoc", InputContext()) for part in passages(each.text, writer.count, 300)
    ]
    texts = [text for text in texts if writer.count(text) >= 20]
    chosen = texts[:: max(1, len(texts) // count)][:count]
    requests = [
        WritingRequest(str(n), style.messages(text), int(1.5 * writer.count(text)) + 1, n)
        for n, text in enumerate(chosen)
    ]
    return [writer.prompt(each) for each in requests]


def together(writer: LocalWriter, prompts: Sequence[Prompt], ends: set[int]) -> list[Row]:
    """Generate all answers with a rollout."""
    found: dict[int, Row] = {}
    for numbers in batches(prompts, BATCH):
        rows = decode(writer.view, [prompts[n] for n in numbers], GREEDY, ends)
        found |= dict(zip(numbers, rows, strict=True))
    return [found[n] for n in range(len(prompts))]


@torch.no_grad()
def plainly(writer: LocalWriter, prompts: Sequence[Prompt], ends: set[int]) -> list[Row]:
    """Generate with ``generate``, batch by batch, each up to the maximum length of its longest answer."""
    found = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        width = max(len(each.ids) for each in part)
        ids = torch.tensor([[0] * (width - len(each.ids)) + list(each.ids) for each in part])
        mask = torch.tensor([[0] * (width - len(each.ids)) + [1] * len(each.ids) for each in part])
        most = max(each.max_tokens for each in part)
        out = writer.view.generate(
            ids, attention_mask=mask, max_new_tokens=most, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0
        )
        for row, each in zip(out[:, width:].tolist(), part, strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            found.append(Row(row[: min(end, each.max_tokens)], end < each.most))
    return found


def by_file(in_file: GgufModel, writer: LocalWriter, prompts: Sequence[Prompt], ends: set[int]) -> list[Row]:
    """Generate with llama.cpp; only the number of tokens of a row is known."""

    def answer(prompt: Prompt) -> Row:
        found = in_file.complete(prompt, GREEDY)
        return Row([0] * found.tokens, found.finished)

    with ThreadPoolExecutor(BATCH) as pool:
        return list(pool.map(answer, prompts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    writer = LocalWriter("smollm2")
    prompts, ends = prompts_of(writer, 16 if quick else 64), writer._ends()
    file = Path(tempfile.mkdtemp()) / "smollm2-q8_0.gguf"
    folder = resolve("smollm2")
    write_gguf(folder, open_config(folder), writer.tokenizer, file, "q8_0", name="smollm2")
    in_file = GgufModel(file, BATCH, 1024)
    ways: dict[str, Callable[..., list[Row]]] = {
        "generate": plainly,
        "here": together,
        "llama.cpp, 8 bits": partial(by_file, in_file),
    }
    rounds, seconds, rows = 1 if quick else 3, {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            rows[name] = way(writer, prompts, ends)
            seconds[name].append(time.perf_counter() - began)
    record = Record(
        "rewrite", f"SmolLM2-135M-Instruct, {len(prompts)} passages of Python's documentation, batches of {BATCH}", 0
    )
    record.table("Rephrasing", ["way", "seconds", "tokens kept per second"], [
        [name, min(times), sum(len(row.ids) for row in rows[name]) / min(times)] for name, times in seconds.items()
    ])  # fmt: skip
    steps = [len(row.ids) + row.finished for row in rows["generate"]]
    longest = [max(steps[start : start + BATCH]) for start in range(0, len(steps), BATCH)]
    record.table("The cost of finished rows in generate", ["steps of unfinished rows", "steps of all rows", "share"],
                 [[sum(steps), BATCH * sum(longest), sum(steps) / (BATCH * sum(longest))]])  # fmt: skip
    same = sum(a.ids == b.ids for a, b in zip(rows["generate"], rows["here"], strict=True)) / len(prompts)
    record.check(
        "identical answers",
        "at least 90 %: rounding depends on the batch",
        f"{same:.0%}",
        same >= 0.9,
    )
    ratio = Ratio.of([a / b for a, b in zip(seconds["generate"], seconds["here"], strict=True)])
    record.check("time of generate / time of rephrasing", "at least 2", f"{ratio.median:.2f}", ratio.median >= 2)
    by_token = [
        a / b * sum(len(row.ids) for row in rows["llama.cpp, 8 bits"]) / sum(len(row.ids) for row in rows["generate"])
        for a, b in zip(seconds["generate"], seconds["llama.cpp, 8 bits"], strict=True)
    ]
    ratio = Ratio.of(by_token)
    record.check("time of a token, generate / llama.cpp", "at least 2", f"{ratio.median:.2f}", ratio.median >= 2)
    return record.finish(RESULTS / ("rewrite-quick.json" if quick else "rewrite.json"))


if __name__ == "__main__":
    raise SystemExit(main())
