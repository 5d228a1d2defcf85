"""wrap as a whole: every passage in every style once, an account that adds up, and files that others read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from lamella.data import (
    Completion,
    Document,
    Documents,
    Endpoint,
    LocalWriter,
    RemoteWriter,
    Sampling,
    Writer,
    WritingRequest,
)
from lamella.errors import LamellaError
from lamella.methods.wrap import Evaluations, Filters, PassageSettings, passages, wrap
from lamella.results import MixedCorpus
from lamella.runner import run
from lamella.workers import Workers

TEXTS = [
    f"Document {n} is about herons. They wait in shallow water. When {n} fish pass, they strike and seldom miss.\n\n"
    f"Its second part is about the number {n * 7}. It has nothing to do with herons, and it is soon over."
    for n in range(9)
]
DOCUMENTS = Documents([Document(f"d{n}", text) for n, text in enumerate(TEXTS)])
SMALL: dict[str, Any] = {
    "cutting": PassageSettings(longest=40, shortest=3, together=2),
    "filters": Filters(embedder="words", similarity=-1, ratio_least=0.01),
    "held_out": 0.2, "styles": ("medium", "qa"),
}  # fmt: skip


class Echo(Writer):
    """A writer for tests of the pipeline around it: it says the passage backwards."""

    name = "echo"

    def __init__(self) -> None:
        self.tokenizer = lambda text, **_: {"input_ids": text.split()}

    def __deepcopy__(self, memo: Any) -> Echo:
        return self

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        for request in requests:
            words = request.messages[-1]["content"].split("Text:\n")[1].split()
            yield [(request, Completion(" ".join(reversed(words)), True, len(words), len(words)))]

    def describe(self) -> dict[str, Any]:
        return {"echo": 1}


def wrapped(writer: Any, **options: Any) -> MixedCorpus:
    return wrap(DOCUMENTS, writer, **SMALL | options)


@pytest.fixture
def writer(instructed: Path) -> LocalWriter:
    return LocalWriter(str(instructed), batch=4)


def test_every_passage_that_is_not_held_out_is_generated_once_in_each_style(writer: LocalWriter) -> None:
    found = wrapped(writer)
    tested = {row["id"] for row in found.test}
    assert len(tested) == 2 and not tested & {row["id"] for row in [*found.items, *found.train]}
    keys = Counter((row["id"], row["chunk_idx"], row["style"]) for row in found.items)
    expected = {
        (each.id, place, style)
        for each in DOCUMENTS
        if each.id not in tested
        for place, _ in enumerate(passages(each.text, writer.count, 40))
        for style in ("medium", "qa")
    }
    assert set(keys) == expected and set(keys.values()) == {1}
    for row in found.items:
        assert row["source_text"] in dict(DOCUMENTS)[row["id"]] and row["n_src_tok"] <= 40


@pytest.mark.slow
def test_kept_and_dropped_is_what_was_generated(writer: LocalWriter) -> None:
    found = wrapped(writer)
    for name, style in found.findings["styles"].items():
        rows = [row for row in found.items if row["style"] == name]
        assert style["kept"] + sum(style["dropped"].values()) == style["generated"] == len(rows)
        assert style["dropped"] == dict(Counter(row["drop_reason"] for row in rows if not row["kept"]))
    assert all(row["kept"] == (row["drop_reason"] is None) for row in found.items)
    cost = found.findings["cost"]
    assert cost["tokens written"] == sum(row["n_written"] for row in found.items)


def test_the_mixture_has_kept_text_alone_in_shares_of_tokens(writer: LocalWriter) -> None:
    found = wrapped(writer)
    kept = {row["text"] for row in found.items if row["kept"]}
    for row in found.train:
        assert row["text"] in (kept if row["source"] != "real" else TEXTS)
    seen = Counter()
    for row in found.train:
        seen[row["source"]] += writer.count(row["text"])
    assert {name: each["tokens"] for name, each in found.findings["mixture"]["sources"].items()} == dict(seen)


@pytest.mark.exhaustive
def test_greedy_runs_and_runs_of_one_seed_are_equal_and_other_seeds_are_not(writer: LocalWriter) -> None:
    greedy = {wrapped(writer, temperature=0.0).findings["corpus"] for _ in range(2)}
    assert len(greedy) == 1
    drawn = [wrapped(writer, seed=seed).findings["corpus"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_several_processes_end_with_the_same_corpus(writer: LocalWriter) -> None:
    assert wrapped(writer, workers=Workers(3)).findings["corpus"] == wrapped(writer).findings["corpus"]


@pytest.mark.slow
def test_an_endpoint_ends_with_the_corpus_of_the_same_model_here(writer: LocalWriter, instructed: Path) -> None:
    with serving(instructed) as served:
        theirs = wrapped(RemoteWriter(Endpoint(served.url, concurrent=4), instructed), temperature=0.0)
    ours = wrapped(writer, temperature=0.0)

    def told(result: MixedCorpus) -> list[Any]:
        return [{name: each for name, each in row.items() if name != "rephraser"} for row in result.items]

    assert told(theirs) == told(ours)
    assert theirs.findings["cost"]["generation flops"] is None


@pytest.mark.slow
def test_what_evaluation_sets_have_is_neither_rephrased_nor_trained_on(writer: LocalWriter, tmp_path: Path) -> None:
    judged = tmp_path / "test.txt"
    part = "Its second part is about the number 21. It has nothing to do with herons, and it is soon over."
    judged.write_text(part)
    found = wrapped(writer, evaluations=(str(judged),), held_out=0.0)
    told = json.dumps([*found.items, *found.train])
    assert part not in told and "Document 3 is about herons." in told
    assert found.findings["passages"]["of evaluations"] >= 1
    words = Evaluations([part], 13)
    assert not [
        row for row in found.train if words.overlaps(row["text"].lower().replace(".", "").replace(",", "").split())
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "rows.jsonl",
            '{"text": "Which river is the longest one of all?"}\n{"text": "How long do herons wait for fish?"}',
        ),
        ("lines.txt", "Which river is the longest one of all?\nHow long do herons wait for fish?\nWhy?\n"),
        ("parts.txt", "Which river is the longest\none of all?\n\nHow long do herons\nwait for fish?\n\nWhy?\n"),
    ],
)
def test_short_questions_of_evaluation_sets_are_found_one_by_one(tmp_path: Path, name: str, content: str) -> None:
    judged = tmp_path / name
    judged.write_text(content)
    given = Documents(
        [Document("a", "Somebody asked: How long do herons wait for fish? Nobody knew it."), Document("b", TEXTS[0])]
    )
    options = SMALL | {"held_out": 0.0, "styles": ("medium",)}
    found = wrap(given, Echo(), evaluations=(str(judged),), **options)
    assert found.findings["passages"]["of evaluations"] == 1
    assert "herons wait for fish" not in json.dumps([*found.items, *found.train]) and "number 0" in json.dumps(
        list(found.train)
    )
    assert any("1 texts of the evaluation sets have fewer" in note for note in found.notes) == ("Why?" in content)


def test_both_halves_of_a_document_are_the_measure_of_closeness() -> None:
    alike, unlike = "Herons wait. Herons wait. ", "Herons wait. Nothing moves."
    for text, least, most in ((alike, 0.99, 1.0), (unlike, 0.0, 0.5)):
        found = wrap(Documents([Document("a", text)]), Echo(), **SMALL | {"held_out": 0.0, "styles": ("medium",)})
        assert least <= found.findings["similarity"]["halves"] <= most + 1e-9


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_run_resumes_and_generates_each_once(instructed: Path, tmp_path: Path) -> None:
    given = tmp_path / "documents.jsonl"
    given.write_text("".join(json.dumps({"id": each.id, "text": 2 * each.text}) + "\n" for each in DOCUMENTS))
    command = [
        *(sys.executable, "-m", "lamella", "run", "wrap", str(given), "--rephraser", str(instructed)),
        *("--longest", "60", "--together", "3", "--batch", "2", "--embedder", "words", "--shortest", "3"),
    ]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, "-o", str(whole)], check=True, capture_output=True)
    running = subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list((tmp_path / ".out.work").rglob("written-00001.jsonl")):
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.work").rglob("rows/*.json.gz")}
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True, env=os.environ)
    assert (out / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes() and kept
    keys = Counter((row["id"], row["chunk_idx"], row["style"]) for row in MixedCorpus.read(out))
    assert set(keys.values()) == {1}


def test_datasets_reads_what_is_written_with_its_provenance(writer: LocalWriter, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    given = tmp_path / "documents.jsonl"
    given.write_text("".join(json.dumps({"id": each.id, "text": each.text}) + "\n" for each in DOCUMENTS))
    out = tmp_path / "out"
    run("wrap", str(given), writer, out=out, parquet=True, longest=40, shortest=3, embedder="words")
    cache = str(tmp_path / "cache")
    lines = datasets.load_dataset("json", data_files=str(out / "data.jsonl"), split="train", cache_dir=cache)
    table = datasets.load_dataset("parquet", data_files=str(out / "data.parquet"), split="train", cache_dir=cache)
    assert lines.to_list() == table.to_list() == MixedCorpus.read(out)
    wanted = "id chunk_idx style source_text text n_src_tok n_out_tok sim rephraser prompt_hash seed kept drop_reason"
    assert set(wanted.split()) <= set(lines.column_names)
    assert json.loads((out / "mixture.json").read_text())["by"] == "tokens"


def test_what_wrap_writes_heals(writer: LocalWriter, tmp_path: Path, plan: Path, instructed: Path) -> None:
    given = tmp_path / "documents.jsonl"
    given.write_text("".join(json.dumps({"id": each.id, "text": each.text}) + "\n" for each in DOCUMENTS))
    out = tmp_path / "out"
    run("wrap", str(given), writer, out=out, longest=40, shortest=3, embedder="words", held_out=0.3)
    healing = {"train": str(out), "sequences": 8, "length": 16, "steps": 2, "lr": 1e-4}
    healed = run("heal", instructed, plan=plan, out=tmp_path / "healed", **healing)
    assert healed.evidence.data["training"]["data"] == str(out)
    assert (tmp_path / "healed" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": ("fancy",)}, "unknown style 'fancy'"),
        ({"cutting": PassageSettings(longest=5, shortest=9)}, "longest must be at least shortest"),
        ({"tokens": 10**7}, "above 4: ask for"),
        ({"evaluations": ("nowhere.txt",)}, "no file nowhere.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(writer: LocalWriter, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LamellaError, match=message) as error:
        wrapped(writer, **options)
    assert "\n" not in str(error.value)
