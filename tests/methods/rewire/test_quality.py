"""The quality classifier, who is the best tenth, and the pool."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from statistics import correlation, mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.data import Document, Documents, seed_of
from lamella.errors import CalibrationError, LamellaError
from lamella.measure import spearman
from lamella.methods.rewire import (
    PoolRules,
    QualityFilter,
    TrainedFastText,
    broken_rule,
    cross_fitted,
    fit_quality,
    near_duplicates,
    pool_of,
    score,
    select_best,
    top,
)
from lamella.methods.rewire.accounts import diversity
from lamella.workers import Workers

PROSE = (
    "Water boils when the pressure of its vapour equals that of the air, which is why it takes longer in a valley than "
    "on a mountain. Cooks who know this change the time and not the flame, since a stronger flame only boils the water "
    "away."
)


def texts(words: str, count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(words.split(), k=30)) for _ in range(count)]


GOOD, BAD = (
    "because therefore explains first then answer means example",
    "buy click now free login page offer subscribe",
)


@pytest.mark.parametrize("kind", ["hashed", "fasttext"])
def test_good_texts_are_distinguished_from_others(kind: str) -> None:
    if kind == "fasttext":
        pytest.importorskip("fasttext")
    quality = fit_quality(texts(GOOD, 60, 0), texts(BAD, 60, 1), kind)  # type: ignore[arg-type]
    good, bad = quality(texts(GOOD, 20, 2)), quality(texts(BAD, 20, 3))
    assert good.min() > bad.max() and bad.min() >= 0 and good.max() <= 1


HQ = "__label__hq"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the labels of DCLM's, which distinguishes capitals."""
    fasttext = pytest.importorskip("fasttext")
    folder = tmp_path_factory.mktemp("published")
    rows = [f"__label__hq {text}" for text in texts(GOOD, 60, 0)] + [
        f"__label__cc {text}" for text in texts(BAD, 60, 1)
    ]
    rows += [f"__label__cc {text.upper()}" for text in texts(GOOD, 60, 2)]
    (folder / "lines.txt").write_text("\n".join(rows) + "\n")
    model = fasttext.train_supervised(
        input=str(folder / "lines.txt"),
        lr=0.1,
        epoch=25,
        dim=8,
        wordNgrams=2,
        minCount=1,
        bucket=10_000,
        thread=10,  # with n of them, fastText sets only n tenths of its vectors
        verbose=0,
    )
    model.save_model(str(folder / "model.bin"))
    return folder / "model.bin"


def test_a_trained_classifier_scores_texts_as_fasttext_itself_does(published: Path) -> None:
    fasttext = pytest.importorskip("fasttext")
    rows = [*texts(GOOD, 5, 3), *texts(BAD, 5, 4)]
    rows += [rows[0].upper(), f"  {rows[1].replace(' ', chr(10), 3)} \n", " ".join([rows[2]] * 60)]
    found = TrainedFastText(published, HQ)(rows)
    inner = fasttext.load_model(str(published)).f
    for text, ours in zip(rows, found, strict=True):
        ((p, label),) = inner.predict(" ".join(text.strip().splitlines()) + "\n", 1, 0.0, "strict")
        assert ours == pytest.approx(p if label == HQ else 1 - p, abs=1e-4)
    assert found[:5].min() > 0.5 > found[5:10].max() and found[10] < 0.5 < found[11]
    assert ((found >= 0) & (found <= 1)).all() and TrainedFastText(published, HQ)([]).shape == (0,)


def test_a_trained_classifier_chooses_the_raw_documents(published: Path) -> None:
    good, bad = texts(GOOD, 2, 5), texts(BAD, 18, 6)
    documents = Documents(Document(f"d{n}", text) for n, text in enumerate([*bad, *good]))
    scores = [row["score"] for row in score(documents, trained=str(published)).items]
    assert min(scores[-2:]) > max(scores[:-2])
    rows = [
        {
            "id": each.id,
            "source_text": each.text,
            "text": each.text,
            "n_src_tok": 1,
            "n_out_tok": 1,
            "drop_reason": None,
        }
        for each in documents
    ]
    rows = select_best(rows, texts(BAD, 20, 7), QualityFilter(trained=str(published)), None, 0)
    assert [row["id"] for row in rows if row["in_raw"]] == ["d18", "d19"]
    assert not {"d18", "d19"} & {
        row["id"] for row in rows if row["in_syn"]
    }  # the second one is trained on the positives


def test_a_trained_classifier_that_cannot_be_used_is_refused_in_one_line(published: Path, tmp_path: Path) -> None:
    (tmp_path / "no.bin").write_bytes(b"no model" * 100)
    for file, label, message in (
        (tmp_path / "none.bin", HQ, "there is no file"),
        (tmp_path / "no.bin", HQ, "no fastText model"),
        (published, "__label__good", "has no label __label__good: choose one of __label__cc, __label__hq"),
    ):
        with pytest.raises(CalibrationError, match=message) as error:
            TrainedFastText(file, label)
        assert "\n" not in str(error.value)


def test_without_fasttext_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fasttext", None)
    documents = Documents([Document("a", "one")])
    with pytest.raises(LamellaError, match=r"needs fasttext-numpy2: pip install 'lamella\[fasttext\]'"):
        score(documents, trained=str(tmp_path / "model.bin"))
    with pytest.raises(CalibrationError, match="give positives, or trained, a fastText model"):
        score(documents)


def test_a_text_in_other_lines_and_letters_has_the_same_score() -> None:
    quality = fit_quality(texts(GOOD, 30, 0), texts(BAD, 30, 1))
    (text,) = texts(GOOD, 1, 5)
    one, other = quality([text, text.replace(" ", "\n", 7).upper()])
    assert one == other and quality([]).shape == (0,)


def test_no_document_is_scored_by_a_classifier_that_has_learnt_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fitted(good: list[str], others: list[str], kind: str, seed: int) -> object:
        return lambda asked: seen.append((set(others), set(asked))) or np.zeros(len(asked))

    monkeypatch.setattr("lamella.methods.rewire.quality.fit_quality", fitted)
    ids = [f"d{n}" for n in range(40)]
    cross_fitted(["good"], ids, [f"text {n}" for n in range(40)], 1000, "hashed", 0)
    assert len(seen) == 2 and all(not learnt & asked for learnt, asked in seen)
    assert set.union(*(asked for _, asked in seen)) == {f"text {n}" for n in range(40)}


@given(
    scores=st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=1, max_size=60),
    share=st.sampled_from([0.1, 0.2, 0.25, 1.0]),
)
def test_the_best_tenth_has_as_many_documents_as_it_must(scores: list[float], share: float) -> None:
    ids = [str(n) for n in range(len(scores))]
    taken = top(scores, ids, [1] * len(ids), share * len(ids))
    assert len(taken) == -(-round(share * len(ids) * 1e6) // 10**6)
    left = set(range(len(ids))) - set(taken)
    assert not left or min(scores[n] for n in taken) >= max(scores[n] for n in left)
    order = random.Random(0).sample(range(len(ids)), len(ids))  # of the documents; ties are broken by their ids
    again = top([scores[n] for n in order], [ids[n] for n in order], [1] * len(ids), share * len(ids))
    assert {order[n] for n in again} == set(taken)


def test_shares_of_tokens_are_reached_by_the_last_text_and_not_before() -> None:
    assert top([0.9, 0.8, 0.7, 0.6], list("abcd"), [10, 30, 30, 30], 25) == [0, 1]
    assert top([0.9, 0.8, 0.7, 0.6], list("abcd"), [10, 30, 30, 30], 10) == [0]


def test_classes_without_texts_are_refused() -> None:
    with pytest.raises(CalibrationError, match="0 good and 1 other"):
        fit_quality([], ["a"])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        ("too short", "words"),
        ("ab cd " * 40, "length of words"),
        (f"{PROSE} {'# ' * 8}", "symbols"),
        (f"{PROSE} {'12345 ' * 40}", "letters"),
        ("\n".join(f"- {line}" for line in PROSE.split(",")), "bullets"),
        ("\n".join(f"{line} ..." for line in PROSE.split(",")), "ellipses"),
        ("\n".join([PROSE] * 3), "repeated lines"),
    ],
)
def test_documents_are_refused_for_the_rule_that_they_break(text: str, rule: str | None) -> None:
    assert broken_rule(text, PoolRules(words_least=30)) == rule


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_near_duplicates_go_and_others_stay(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefgh", k=5)) for _ in range(500)]
    originals = [" ".join(drawn.choices(words, k=120)) for _ in range(12)]
    nearly = [f"{text} and another end" for text in originals[:5]]
    found = near_duplicates([*originals, *nearly, "short"], tmp_path / "minhash")
    pairs = [{n, 12 + n} for n in range(5)]
    assert all(len(pair & found) == 1 for pair in pairs) and len(found) == 5
    monkeypatch.setattr("lamella.methods.rewire.minhash.TOGETHER", 5)
    assert near_duplicates([*originals, *nearly, "short"], tmp_path / "minhash", Workers(processes)) == found


def test_the_pool_accounts_for_what_it_leaves_out(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    documents = [Document(str(n), text) for n, text in enumerate([PROSE, "short", f"{PROSE} Indeed.", "x " * 100])]
    pool, gone = pool_of(documents, PoolRules(words_least=30), tmp_path / "minhash", Workers())
    assert len(pool) == 1 and gone == {"words": 1, "length of words": 1, "near-duplicates": 1}


def test_the_rank_correlation_is_that_of_mean_ranks() -> None:
    drawn = random.Random(3)
    ones, others = ([drawn.randrange(8) for _ in range(50)] for _ in range(2))
    ranks = [
        [mean(place for place, each in enumerate(sorted(side)) if each == value) for value in side]
        for side in (ones, others)
    ]
    assert spearman(ones, others) == pytest.approx(correlation(*ranks))
    assert spearman([1, 1], [1, 2]) is None and spearman([1], [1]) is None


def test_diversity_counts_pairs_among_as_many_words() -> None:
    assert diversity({"a": ["x y x y x y"], "b": ["a b c"]}) == {"words": 3, "a": 2, "b": 2}


def test_halves_of_a_pool_follow_names() -> None:
    assert seed_of("half", 0, "a") == seed_of("half", 0, "a") != seed_of("half", 1, "a")
