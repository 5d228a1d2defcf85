"""Prompts: one sequence for each row of a user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lamella.data import InputContext, Prompts, load_text
from lamella.errors import CalibrationError

NANO = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture(scope="module")
def context() -> InputContext:
    return InputContext(lambda: AutoTokenizer.from_pretrained(NANO), split="whole")


def rows(file: Path, *given: Any) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in given))
    return file


def test_each_row_is_a_sequence_with_its_own_prompt(context: InputContext, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What purrs?"}, {"role": "assistant", "content": "A cat."}]
    given = [{"messages": chat}, {"prompt": "What purrs?", "response": "A cat."}, {"messages": chat[:1]},
             {"prompt": "What purrs?"}, {"text": "A cat purrs when it is fed."}, "A dog barks at a boat."]  # fmt: skip
    found = Prompts.open(rows(tmp_path / "rows.jsonl", *given), context)
    answers = [context.tokenizer.decode(ids[length:], skip_special_tokens=True) for ids, length in found]
    assert answers[:4] == ["A cat.", "A cat.", "", ""]
    questions = [ids[:length].tolist() for ids, length in found]
    assert questions[0] == questions[1] == questions[2] == questions[3]
    assert [length for _, length in found[4:]] == [max(1, len(ids) // 4) for ids, _ in found[4:]]
    assert found.describe()["prompts"] == 6 and found.describe()["unanswered"] == 2


@pytest.mark.parametrize(
    "row", [{"number": 1}, {"text": " "}, 3, {"messages": [{"role": "assistant", "content": "A."}]}]
)
def test_a_row_that_is_no_prompt_is_refused_with_its_line(row: Any, context: InputContext, tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", {"prompt": "What barks?"}, row)
    with pytest.raises(CalibrationError, match="line 2 holds neither a prompt nor a text"):
        Prompts.open(file, context)


def test_a_prompt_that_is_too_long_is_refused_with_its_line(context: InputContext, tmp_path: Path) -> None:
    file = rows(
        tmp_path / "rows.jsonl", {"prompt": "What barks? " * 20, "response": "A dog."}, {"text": "A dog. " * 20}
    )
    with pytest.raises(CalibrationError, match=r"line 1 has a prompt of .* too long for 16"):
        Prompts.open(file, context, max_length=16)
    (text,) = Prompts.open(rows(file, {"text": "A dog. " * 20}), context, max_length=16)
    assert (len(text.tokens), text.length) == (16, 4)


def test_the_splits_of_a_file_of_rows_have_no_row_in_common(context: InputContext, tmp_path: Path) -> None:
    texts = [f"Row {n} is about {n} boats" + " and their crew" * (n % 7) + "." for n in range(23)]
    file = rows(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    test = Prompts.open(file, InputContext(context.opener, split="test"))
    calibration = load_text(file, "calibration")
    shown = [context.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in test]
    assert shown == texts[18:] and calibration == "\n\n".join(texts[:18])
    assert test.part("whole").describe()["prompts"] == 23
    with pytest.raises(CalibrationError, match="too few for two splits"):
        Prompts.open(rows(tmp_path / "one.jsonl", {"text": texts[0]}), InputContext(context.opener, split="test"))


def test_some_of_the_prompts_are_chosen_by_the_seed(context: InputContext, tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", *({"text": f"Row {n} is a row."} for n in range(40)))
    opened = [Prompts.open(file, InputContext(context.opener, seed, "whole"), prompts=5) for seed in (1, 1, 2)]
    one, same, other = ([ids.tolist() for ids, _ in each] for each in opened)
    assert one == same != other and len(one) == 5
