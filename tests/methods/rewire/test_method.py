"""rewire as a whole: reasoning is removed, sets match their description, and an interrupted run resumes."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("datatrove")

from lamella.data import (
    Blend,
    Completion,
    Document,
    Documents,
    InputContext,
    LocalWriter,
    Sampling,
    Writer,
    WritingRequest,
)
from lamella.errors import LamellaError
from lamella.files import Work
from lamella.methods.rewire import Guide, PoolRules, QualityFilter, Rewriting, Rewritten, parse_answer, rewire, score
from lamella.methods.rewire.guiding import ANY
from lamella.results import MixedCorpus
from lamella.runner import run

THOUGHT = "<thinking starts>\nI think about it.\n<thinking ends>\n"
START, END = "<improved response starts>", "<improved response ends>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"{THOUGHT}<improved response starts>\nBetter.\n<improved response ends>", ("Better.", None)),
        (f"{THOUGHT.upper()}< Improved  Response Starts >Better.[improved_response ends] And more.", ("Better.", None)),
        ("<improved response starts>Better.<improved response ends>", ("Better.", None)),
        (f"{THOUGHT}Better.", ("", "no response")),
        (f"{THOUGHT}<improved response starts>Bett", ("", "unclosed")),
        ("<thinking starts>I think <improved response starts>so<improved response ends>", ("", "thinking")),
        (f"{THOUGHT}<improved response starts>  <improved response ends>", ("", "empty")),
        (f"{THOUGHT}<improved response starts>A <thinking starts> b<improved response ends>", ("", "marker")),
        (
            "<thinking starts>I shall write <improved response starts>x<improved response ends>.<thinking ends>"
            "<improved response starts>y<improved response ends>",
            ("y", None),
        ),
        (f"<think>I write {START}a plan{END}.</think>{START}Better.{END}", ("Better.", None)),
        (f"a plan</think>{START}Better.{END}", ("Better.", None)),  # where the prompt has begun the thinking
        (f"<think>A {START}plan{END}", ("", "thinking")),
        (f"<think>So.</think><thinking starts>A {START}plan{END}{START}Better.{END}", ("", "thinking")),
        (f"{START}<thinking>A plan.</thinking>Better.{END}", ("", "no response")),
        (f"{START}<thinking>A plan. Better.{END}", ("", "marker")),
        ("", ("", "no response")),
    ],
)
def test_only_what_stands_between_the_markers_is_kept(answer: str, expected: tuple[str, str | None]) -> None:
    assert parse_answer(answer) == expected


def test_prompts_have_the_markers_and_a_place_for_the_document(tmp_path: Path) -> None:
    for name in ("guided", "short"):
        *_, message = Guide.open(name).messages("The draft {document}.")
        assert message["role"] == "user" and message["content"].endswith("The draft {document}.")
        assert len(ANY.findall(message["content"])) == 4
    own = tmp_path / "own.txt"
    own.write_text("Improve: {document}")
    with pytest.raises(LamellaError, match="request <improved response starts>"):
        Guide.open(str(own))
    with pytest.raises(LamellaError, match="no prompt 'other'; give one of guided, short"):
        Guide.open("other")


def test_the_prompt_for_small_models_shows_them_an_answer_that_can_be_parsed(tmp_path: Path) -> None:
    asked, answered, _ = Guide.open("short").messages("A draft.")
    assert (asked["role"], answered["role"]) == ("user", "assistant")
    text, reason = parse_answer(answered["content"])
    assert reason is None and text and not ANY.search(text)
    assert len(Guide.open("guided").messages("A draft.")) == 1
    own, instruction = tmp_path / "own.txt", f"{START} {END} {{document}}"
    own.write_text(f"{instruction}\n=====\na draft\n=====\n{START}A text.{END}\n")
    shown = Guide.open(str(own))
    assert [each["content"] for each in shown.messages("B")] == [
        f"{START} {END} a draft", f"{START}A text.{END}", f"{START} {END} B"
    ]  # fmt: skip
    own.write_text(instruction)
    assert Guide.open(str(own)).digest != shown.digest
    own.write_text(f"{instruction}\n=====\na draft\n=====\nA text.\n")
    with pytest.raises(LamellaError, match="an example is a draft and an answer"):
        Guide.open(str(own))


@pytest.mark.real
def test_answers_of_a_small_model_to_the_short_prompt_can_be_parsed() -> None:
    writer = LocalWriter("smollm2", batch=4)
    drafts = [
        "Compute geohash using the Munroe algorithm ,, give latitude and longitude !! and a date. cookies? accept",
        "the tide is low at noon tomorow, boats can not leave harbour befor three . share this page",
        "herons stand still so fish forget them lol. then strike. subscribe now",
        "bread of rye keeps long,, wheat bread not so long . next page",
    ]
    guide = Guide.open("short")
    requests = [WritingRequest(str(n), guide.messages(each), 160, 0) for n, each in enumerate(drafts)]
    answers = [each.text for batch in writer.write(requests, Sampling(temperature=0)) for _, each in batch]
    assert sum(parse_answer(each)[1] is None for each in answers) >= 2


class Scribe(Writer):
    """A writer for tests of the pipeline around it: it turns words round, and misbehaves for some documents."""

    name = "scribe"

    def __init__(self, stops: int | None = None) -> None:
        self.asked, self.stops = 0, stops
        self.tokenizer = lambda text, **_: {"input_ids": text.split()}

    def __deepcopy__(self, memo: Any) -> Scribe:
        return self

    def write(
        self, requests: Sequence[WritingRequest], sampling: Sampling, done: Collection[str] = ()
    ) -> Iterator[list[tuple[WritingRequest, Completion]]]:
        for request in requests:
            if request.key not in done:
                if self.asked == self.stops:
                    raise KeyboardInterrupt
                self.asked += 1
                draft = request.messages[-1]["content"].split("Draft:\n")[1]
                text = " ".join([*reversed(draft.split()), "because it explains more"])
                answer = f"{THOUGHT}<improved response starts>{text}<improved response ends>"
                if request.key.endswith("7"):
                    answer = f"{THOUGHT}{text}"
                yield [(request, Completion(answer, True, len(draft.split()), len(answer.split())))]

    def describe(self) -> dict[str, Any]:
        return {"scribe": 1}


def documents(count: int = 40) -> Documents:
    drawn = random.Random(0)
    words = ["buy", "click", "now", "free", "login", "page", "river", "stone", "bread", "house", "walks", "sees"]
    return Documents(Document(f"d{n}", " ".join(drawn.choices(words, k=20 + n % 7))) for n in range(count))


POSITIVES = Documents(Document(f"p{n}", f"It explains because number {n} is more than {n - 1}.") for n in range(20))
EASY: dict[str, Any] = {
    "rules": PoolRules(words_least=5, near_duplicates=False),
    "rewriting": Rewriting(embedder="words", together=8),
    "held_out": 0.0,
}


def rewired(**options: Any) -> MixedCorpus:
    easy = {name: each for name, each in EASY.items() if name != "held_out" or "blend" not in options}
    return rewire(documents(), Scribe(), POSITIVES, **easy | options)


def test_sets_are_the_best_tenths_and_their_overlap_is_that_of_the_rows() -> None:
    found = rewired()
    rows = found.items
    assert [row["id"] for row in rows] == [each.id for each in documents()]  # all of the pool is rewritten
    done = [row for row in rows if row["drop_reason"] is None]
    raw, syn = ([row for row in rows if row[name]] for name in ("in_raw", "in_syn"))
    assert len(raw) == math.ceil(0.1 * len(rows)) and len(syn) == math.ceil(0.1 * len(done)) and len(done) == 36
    assert min(row["raw_score"] for row in raw) >= max(row["raw_score"] for row in rows if not row["in_raw"])
    both = {row["id"] for row in raw} & {row["id"] for row in syn}
    assert found.findings["sets"]["overlap"] == len(both) / len(syn)
    assert found.findings["rewrites"]["failed"] == {"no response": 4} and found.findings["rewrites"]["parsed"] == 36


def test_no_thinking_and_no_marker_is_anywhere_in_what_is_written(tmp_path: Path) -> None:
    found = rewired(work=Work(tmp_path))
    text = json.dumps([*found.items, *found.train])
    assert not ANY.search(text) and "I think about it" not in text


def test_shares_of_tokens_and_of_documents_are_asked_for() -> None:
    found = rewired(judging=QualityFilter(by="tokens", keep_raw=0.3, keep_syn=0.3))
    rows = found.items
    total, kept = (sum(row["n_src_tok"] for row in rows if row["in_raw"] or every) for every in (True, False))
    largest = max(row["n_src_tok"] for row in rows)
    assert 0.3 * total <= kept < 0.3 * total + largest


def test_without_rewrites_in_the_mixture_the_best_raw_text_is_seen_as_it_is() -> None:
    found = rewired(synthetic=0.0)
    raw = [row["source_text"] for row in found.items if row["in_raw"]]
    assert [row["text"] for row in found.train] == raw


def test_the_mixture_keeps_its_shares_and_its_epochs() -> None:
    found = rewired(synthetic=0.4, epochs=2.0)
    told = found.findings["mixture"]["sources"]
    total = sum(each["tokens"] for each in told.values())
    assert abs(told["synthetic"]["share"] - 0.4) <= 31 / total and all(each["epochs"] <= 2 for each in told.values())


def test_a_floor_keeps_invented_texts_out_of_the_set() -> None:
    loose, strict = rewired(), rewired(rewriting=Rewriting(embedder="words", together=8, floor=0.9))
    assert all(row["sim"] >= 0.9 for row in strict.items if row["in_syn"])
    assert loose.findings["rewrites"]["similarity"] == strict.findings["rewrites"]["similarity"]


def test_runs_of_one_seed_are_equal_and_documents_that_are_too_long_are_reported() -> None:
    first, again = (rewired() for _ in range(2))
    assert first.findings["corpus"] == again.findings["corpus"] and first.train == again.train
    short = rewired(rewriting=Rewriting(embedder="words", together=8, longest=22))
    failed = short.findings["rewrites"]["failed"]
    assert failed["too long"] == sum(row["n_src_tok"] > 22 for row in short.items)


def test_a_document_for_which_the_rewriter_has_no_room_is_too_long_and_ends_nothing(instructed: Path) -> None:
    writer = LocalWriter(str(instructed), batch=4)
    pool = Documents([*documents(4), Document("long", "river stone bread " * 300)])
    options = EASY | {"rewriting": Rewriting("short", answer=2, embedder="words")}
    found = rewire(pool, writer, POSITIVES, **options)
    (long,) = [row for row in found.items if row["id"] == "long"]
    assert 1024 < long["n_src_tok"] <= 4096 and long["drop_reason"] == "too long"
    assert found.findings["rewrites"]["failed"]["too long"] == 1 and found.findings["rewrites"]["requested"] == 4


def test_other_shares_of_what_was_rewritten_before_are_chosen_without_writing(tmp_path: Path) -> None:
    first, second = Scribe(), Scribe()
    rewire(documents(), first, POSITIVES, work=Work(tmp_path), **EASY)
    options = EASY | {"rewriting": Rewriting(embedder="words", together=8, floor=0.1)}
    other = rewire(documents(), second, POSITIVES, work=Work(tmp_path), judging=QualityFilter(keep_syn=0.5), **options)
    assert first.asked == 40 and second.asked == 0
    assert sum(row["in_syn"] for row in other.items) == 18 and other.findings["cost"]["seconds"] > 0


def test_a_selection_among_written_rewrites_is_what_the_run_would_have_chosen(tmp_path: Path) -> None:
    blend = Blend(held_out=0.2, synthetic=0.4)
    first = rewired(blend=Blend(held_out=0.2), seed=3)
    first.write(tmp_path)
    judging = QualityFilter(keep_raw=0.2, keep_syn=0.5)
    wanted = rewired(blend=blend, judging=judging, seed=3)
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps({"text": each.text}) + "\n" for each in POSITIVES))
    options = {"positives": str(good), "keep_raw": 0.2, "keep_syn": 0.5, "synthetic": 0.4, "seed": 3}
    got = run("rewire", str(tmp_path), command="select", out=tmp_path / "again", **options).result
    assert isinstance(got, MixedCorpus) and got.items == wanted.items != first.items
    assert got.train == wanted.train and got.test == wanted.test
    assert (tmp_path / "again" / "train.jsonl").is_file()


def test_a_selection_needs_the_rows_of_rewire(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(LamellaError, match="row 1 has no 'source_text'"):
        Rewritten.open(tmp_path, InputContext())
    with pytest.raises(LamellaError, match="holds no data"):
        Rewritten.open(tmp_path / "missing", InputContext())


def test_the_time_of_a_stopped_run_has_that_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = map(float, range(10_000))  # a second from one look at the clock to the next
    clock = SimpleNamespace(perf_counter=lambda: next(looks))
    monkeypatch.setattr(sys.modules["lamella.data.rollout"], "time", clock)
    with pytest.raises(KeyboardInterrupt):
        rewire(documents(), Scribe(stops=20), POSITIVES, work=Work(tmp_path), **EASY)
    found = rewire(documents(), Scribe(), POSITIVES, work=Work(tmp_path), **EASY)
    assert found.findings["cost"]["seconds"] == 40  # one for each document, which is an answer by itself


def test_good_texts_have_a_column_of_their_own_and_no_limit(tmp_path: Path) -> None:
    pool, good = tmp_path / "pool.jsonl", tmp_path / "good.jsonl"
    pool.write_text("".join(json.dumps({"id": each.id, "text": each.text}) + "\n" for each in documents()))
    good.write_text("".join(json.dumps({"content": each.text}) + "\n" for each in POSITIVES))
    given = {"positives": str(good), "positives_column": "content"}
    found = run("rewire", str(pool), command="score", limit=6, **given)
    whole = score(Documents(documents()[:6]), POSITIVES)
    assert list(found.result.rows()) == list(whole.rows()) and len(whole.items) == 6  # type: ignore[attr-defined]


def test_a_model_whose_answers_cannot_be_read_leaves_raw_text_alone(instructed: Path) -> None:
    writer = LocalWriter(str(instructed), batch=4)
    found = rewire(
        documents(8), writer, POSITIVES, **EASY | {"rewriting": Rewriting("short", answer=6, embedder="words")}
    )
    assert found.findings["rewrites"]["parsed"] == 0 and {row["source"] for row in found.train} == {"raw"}
    assert any("raw text only." in note for note in found.notes)


def test_scores_alone_are_a_filter() -> None:
    pool = Documents([*documents(10), *POSITIVES[:5]])
    found = score(pool, POSITIVES)
    rows = list(found.rows())
    best = sorted(rows, key=lambda row: -row["score"])[:5]
    assert {row["id"] for row in best} == {each.id for each in POSITIVES[:5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": PoolRules(words_least=1000)}, "0 of 40 documents are in the pool"),
        ({"rewriting": Rewriting(prompt="other")}, "no prompt 'other'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LamellaError, match=message) as error:
        rewired(**options)
    assert "\n" not in str(error.value)
