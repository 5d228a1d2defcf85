"""Text scores, compared with rouge-score, sacrebleu and manual counts."""

from __future__ import annotations

import sys

import pytest

from lamella.errors import CalibrationError, LamellaError
from lamella.evaluate import TextScores, rouge, sentence_bleu

WRITTEN = ["the heart is large", "no acute process", "no acute process"]
WANTED = ["the heart is large .", "a small left effusion", "no acute process"]


def test_scores_are_those_of_the_libraries() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found = TextScores.of(WRITTEN, WANTED)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        each = [100 * scorer.score(theirs, ours)[kind].fmeasure for ours, theirs in zip(WRITTEN, WANTED, strict=True)]
        assert getattr(found, kind) == pytest.approx(sum(each) / 3)
    assert found.bleu == pytest.approx(sacrebleu.corpus_bleu(WRITTEN, [WANTED]).score)
    assert (found.length, found.distinct, found.texts) == (pytest.approx(10 / 3), 2, 3)


def test_precisions_are_shares_of_n_grams_and_no_bleu() -> None:
    found = TextScores.of(WRITTEN, WANTED)
    assert found.bleu1_precision == pytest.approx(100 * 7 / 10)  # 4 + 0 + 3 of 4 + 3 + 3 words
    assert found.bleu2_precision == pytest.approx(100 * 5 / 7)
    assert found.bleu3_precision == pytest.approx(100 * 3 / 4)
    constant = TextScores.of(["process"] * 3, ["no acute process of any kind in the chest"] * 3)
    assert constant.bleu1_precision == 100 and constant.bleu < 5  # the penalty for being brief


def test_what_is_the_same_scores_100() -> None:
    found = TextScores.of(["the heart is large today"], ["the heart is large today"])
    assert found.rouge1 == found.rougeL == pytest.approx(100) and found.bleu == pytest.approx(100)
    assert rouge("rouge1", stems=False)("hearts", "heart") == {"rouge1": 0}
    assert rouge("rouge1")("hearts", "heart") == {"rouge1": pytest.approx(100)}
    assert sentence_bleu()("a large heart", "a large heart") == pytest.approx(100)


@pytest.mark.parametrize(("written", "wanted"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_texts_without_a_reference_each_are_refused(written: list[str], wanted: list[str]) -> None:
    with pytest.raises(CalibrationError, match="give one for each"):
        TextScores.of(written, wanted)


@pytest.mark.parametrize(("module", "package"), [("rouge_score", "rouge-score"), ("sacrebleu", "sacrebleu")])
def test_a_missing_package_is_named_with_its_extra(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LamellaError, match=rf"needs {package}: pip install 'lamella\[text-metrics\]'"):
        TextScores.of(WRITTEN, WANTED)
