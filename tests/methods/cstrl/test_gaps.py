"""Which sentences are masked, where, and in which order they are to be written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamella.data import InputContext
from lamella.errors import CalibrationError, MethodError
from lamella.methods.cstrl import Gaps, Summaries, SummaryPair, SummarySplits, gap_sentences, mask_sentences, spans
from lamella.methods.cstrl.gaps import harmonic

NINE = "A one. B two. C three. D four. E five. F six. G seven. H eight. I nine."


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in spans(text)]


@pytest.mark.parametrize(
    ("text", "scores", "gaps", "wanted"),
    [
        ("One alone.", [1.0], "<extra_id_0>.", "One alone"),
        ("First here. Second there.", [0.1, 0.7], "First here. <extra_id_0>.", "Second there"),
        ("First. Second. Third.", [0.1, 0.2, 0.7], "First. Second. <extra_id_0>.", "Third"),
        (
            NINE,
            [0, 0, 0.5, 0, 0.1, 0, 0.9, 0, 0],
            "A one. B two. <extra_id_0>. D four. <extra_id_1>. F six. <extra_id_2>. H eight. I nine.",
            "G seven. C three. E five",  # in order of score
        ),
    ],
    ids=["n=1", "n=2", "n=3", "n=9"],
)
def test_the_best_sentences_of_a_report_are_masked(text: str, scores: list[float], gaps: str, wanted: str) -> None:
    count = Gaps().count(len(scores))
    assert count == {1: 1, 2: 1, 3: 1, 9: 3}[len(scores)]
    found = mask_sentences(text, scores, count)
    assert (found.text, found.target) == (gaps, wanted)


def test_a_sentence_that_is_said_twice_or_within_another_is_masked_where_it_was_chosen() -> None:
    text = "No effusion. No effusion is large. No effusion."
    assert mask_sentences(text, [0.1, 0.2, 0.9], 1).text == "No effusion. No effusion is large. <extra_id_0>."
    assert mask_sentences(text, [0.5, 0.2, 0.5], 1).text == "<extra_id_0>. No effusion is large. No effusion."


def test_sentences_end_with_a_mark_and_a_space_so_that_numbers_stay_whole() -> None:
    assert sentences("A nodule of 3.5 mm. Is it new?  Yes!\nNo more") == [
        "A nodule of 3.5 mm",
        "Is it new",
        "Yes",
        "No more",
    ]
    assert sentences("") == sentences(" . ") == []


def test_the_score_is_the_harmonic_mean_of_rouge_1_and_bleu() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    sentence, summary = "a large left effusion is seen", "large left effusion"
    r = 100 * RougeScorer(["rouge1"]).score(summary, sentence)["rouge1"].fmeasure
    b = sacrebleu.sentence_bleu(sentence, [summary]).score
    assert r == pytest.approx(200 / 3) and 0 < b < r  # 3 words in common of 6 and 3
    score = harmonic()
    assert score(sentence, summary) == pytest.approx(2 * r * b / (r + b))
    assert score(sentence, "nothing of it") == score(sentence, "") == 0


def test_overlap_finds_the_sentence_that_the_summary_repeats() -> None:
    pair = SummaryPair("The heart is normal. There is a large left effusion. No fracture.", "Large left effusion.")
    assert gap_sentences([pair]).gaps[0].target == "There is a large left effusion"
    rest = SummaryPair("The lungs are clear. A rib is broken. Clear are the lungs.", "Something else.")
    [by_itself] = gap_sentences([rest], gaps=Gaps(score="self")).gaps
    assert by_itself.target in ("The lungs are clear", "Clear are the lungs")
    assert gap_sentences([], [rest.source]).gaps == [by_itself]  # without a summary the source is all there is


def test_random_gaps_come_from_the_seed_and_differ_from_chosen_ones() -> None:
    pairs = [SummaryPair(NINE, "I nine.")] * 8
    first, again, other = (gap_sentences(pairs, gaps=Gaps(score="random"), seed=seed).gaps for seed in (1, 1, 2))
    assert first == again != other
    assert {gap.target.split(". ")[0] for gap in gap_sentences(pairs).gaps} == {"I nine"}
    assert len({gap.target for gap in first}) > 1


def test_sources_of_one_sentence_are_left_out_and_refused_where_there_are_no_others() -> None:
    several = SummaryPair("One. Two.", "One.")
    found = gap_sentences([SummaryPair("One only.", "One."), several])
    assert (len(found.gaps), found.single) == (1, 1)
    with pytest.raises(CalibrationError, match="all 2 sources have a single sentence") as error:
        gap_sentences([SummaryPair("One only.", "One."), SummaryPair("Another.", "It.")])
    assert "\n" not in str(error.value)


def read(tmp_path: Path, *rows: object) -> Summaries:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Summaries.open(file, InputContext(lambda: "the tokenizer"))


def test_pairs_are_read_as_people_hold_them(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"source": "S.", "summary": "s"},
        {"findings": "F.", "impression": "f"},
        {"article": "A.", "highlights": "a"},
        {"prompt": "P.", "completion": "p"},
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "M."},
            {"role": "assistant", "content": "m"},
        ]},
    )  # fmt: skip
    assert list(found) == [("S.", "s"), ("F.", "f"), ("A.", "a"), ("P.", "p"), ("Be brief.\nM.", "m")]
    assert found.tokenizer == "the tokenizer"


@pytest.mark.parametrize(
    "row",
    [
        {"source": "S."},
        {"source": "S.", "summary": "  "},
        {"source": "", "summary": "s"},
        {"messages": [{"role": "user", "content": "M."}]},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "m"}]},
        ["no object"],
    ],
)
def test_a_line_without_source_or_summary_is_refused_with_its_place(row: object, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"(line|pair) 2\b") as error:
        read(tmp_path, {"source": "S.", "summary": "s"}, row)
    assert "\n" not in str(error.value)


def test_nothing_of_one_part_enters_another() -> None:
    pairs = [SummaryPair(f"Source {number}.", f"summary {number}") for number in range(50)]
    splits = SummarySplits.of(pairs, None, 0)
    assert [len(part) for part in (splits.train, splits.held_out, splits.test)] == [41, 4, 5] and splits.test_from_pairs
    assert sorted([*splits.train, *splits.held_out, *splits.test]) == sorted(pairs) and splits.shared == 0
    given = SummarySplits.of(pairs, pairs[:3], 0)
    assert (len(given.train), len(given.held_out), given.shared, given.test_from_pairs) == (45, 5, 3, False)
    with pytest.raises(MethodError, match="give at least 3"):
        SummarySplits.of(pairs[:2], None, 0)
