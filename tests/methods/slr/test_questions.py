"""Questions with many right answers: the built-in ones, files, and how a tokenizer reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamella.errors import CalibrationError
from lamella.methods.slr import open_questions
from lamella.methods.slr.answers import ChoiceQuestion
from lamella.methods.slr.questions import crc, encode_questions, load_questions
from lamella.zoo import open_tokenizer

NANO_LLAMA = Path(__file__).parents[2] / "models" / "nano-llama"


class Letters:
    """A tokenizer of single characters; digits after a space, and pairs of capitals, are one token."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids, at = [0] if add_special_tokens else [], 0
        while at < len(text):
            size = 2 if text[at] == " " and text[at + 1 : at + 2].isdigit() else 1
            ids.append(sum(ord(each) * 300**k for k, each in enumerate(text[at : at + size])))
            at += size
        return {"input_ids": ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>"


def test_the_built_in_task_has_two_families_of_20_in_each_split_in_other_words_and_sets() -> None:
    splits = [crc(split) for split in ("calibration", "test")]
    for questions in splits:
        assert [sum(each.family == family for each in questions) for family in ("letters", "digits")] == [20, 20]
        assert all(len(answer) == 1 for each in questions for answer in each.answers)
        assert all(len(set(each.answers)) == len(each.answers) for each in questions)
    encoded = [{each.prompt for each in questions} for questions in splits]
    assert len(encoded[0] | encoded[1]) == 80
    sets = [{(each.family, each.answers) for each in questions} for questions in splits]
    assert not sets[0] & sets[1]
    with pytest.raises(CalibrationError, match="unknown split 'train'"):
        crc("train")  # type: ignore[arg-type]


def test_open_questions_have_many_answers_without_underscores() -> None:
    questions = open_questions()
    assert len(questions) == 12 and all(len(each.answers) >= 30 for each in questions)
    assert not any("_" in answer for each in questions for answer in each.answers)
    assert all(len(set(each.answers)) == len(each.answers) for each in questions)


def test_an_answer_counts_in_every_form_that_is_one_token_behind_its_prompt() -> None:
    encoded = encode_questions(Letters(), [ChoiceQuestion("n:", ("1", "2")), ChoiceQuestion("letter:", ("A", "B"))])
    forms = encoded.tokens.tolist()
    assert forms[0] == [[ord("1"), ord(" ") + 300 * ord("1")], [ord("2"), ord(" ") + 300 * ord("2")]]
    assert forms[1] == [[ord("A"), -1], [ord("B"), -1]]  # " A" is two tokens here
    assert encoded.attention_mask.sum(1).tolist() == [3, 8] and encoded.attention_mask[0].tolist() == [0] * 5 + [1] * 3


def test_prompts_go_through_the_chat_template_and_open_the_answer() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = "<>"
    encoded = encode_questions(tokenizer, [ChoiceQuestion("n", ("1", "2"))], prefill="=")
    assert encoded.input_ids[0].tolist() == [ord(each) for each in "<n>="]


def test_an_answer_of_several_tokens_is_named() -> None:
    with pytest.raises(CalibrationError, match="question 'a number': the answer '10' is no single token") as error:
        encode_questions(Letters(), [ChoiceQuestion("a number", ("1", "10"))])
    assert "\n" not in str(error.value)


def test_the_built_in_task_is_single_tokens_for_a_byte_level_tokenizer() -> None:
    encoded = encode_questions(open_tokenizer(NANO_LLAMA), crc("test"))
    assert (encoded.tokens >= 0).any(-1).sum(-1).tolist() == [len(each.answers) for each in encoded.questions]


def rows(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines) + "\n")
    return path


def test_the_lines_of_a_file_go_to_the_two_splits_in_turn(tmp_path: Path) -> None:
    made = [{"prompt": f"p{k}", "answers": ["A", "B"], "family": "x"} for k in range(5)]
    file = rows(tmp_path / "q.jsonl", *made[:2], "", *made[2:])
    chosen, reported = (load_questions(file, split) for split in ("calibration", "test"))
    assert [each.prompt for each in chosen] == ["p0", "p2", "p4"]
    assert [each.prompt for each in reported] == ["p1", "p3"] and reported[0].family == "x"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "p", "answers": ["A", "B"]}'], "holds 1 question; give 2 or more:"),
        (["{"], "line 1 is not JSON"),
        (['{"prompt": "p"}'], "line 1: write one object per line,"),
        (['{"prompt": 3, "answers": ["A", "B"]}'], "line 1: write one object per line,"),
        (['{"prompt": "p", "answers": 3}'], "line 1: write one object per line,"),
        (['{"prompt": "p", "answers": ["A", 1]}'], "line 1: write one object per line,"),
        (["[]"], "line 1: write one object per line,"),
        (['{"prompt": "p", "answers": ["A"]}'], "line 1: question 'p': give a prompt and at least 2"),
        ([], "holds 0 question"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        load_questions(rows(tmp_path / "q.jsonl", *lines), "test")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read .*give crc or a \.jsonl file"):
        load_questions(tmp_path / "no.jsonl", "test")
