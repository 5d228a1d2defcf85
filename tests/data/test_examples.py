"""Examples: prompts with answers as people hold them, and rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lamella.data import Examples, InputContext
from lamella.errors import LamellaError

NANO = Path(__file__).parents[1] / "models" / "nano-llama"


@pytest.fixture(scope="module")
def context() -> InputContext:
    return InputContext(lambda: AutoTokenizer.from_pretrained(NANO))


def rows(file: Path, *given: Any) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in given))
    return file


def test_examples_are_read_as_people_hold_them(context: InputContext, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What purrs?"},
                         {"role": "assistant", "content": "A cat."}]}  # fmt: skip
    found = Examples.open(
        rows(tmp_path / "rows.jsonl", chat, {"prompt": "What purrs?", "completion": "A cat."},
             {"instruction": "Say it.", "input": "What purrs?", "output": "A cat."}), context)  # fmt: skip
    tokenizer = context.tokenizer
    for each in found:
        length = int(each["prompt_lengths"])
        answer = each["input_ids"][length:]
        assert tokenizer.decode(answer, skip_special_tokens=True) == "A cat."
        assert tokenizer.eos_token_id is None or int(answer[-1]) == tokenizer.eos_token_id
        assert (each["labels"][:length] == -100).all() and torch.equal(each["labels"][length:], answer)
    prompts = [tokenizer.decode(each["input_ids"][: int(each["prompt_lengths"])]) for each in found]
    assert "Be brief." in prompts[0] and "Be brief." not in prompts[1] and "Say it.\nWhat purrs?" in prompts[2]


@pytest.mark.parametrize(
    "row",
    [{"prompt": "What purrs?"}, {"prompt": "What purrs?", "completion": " "}, {"messages": []}, ["What purrs?"],
     {"messages": [{"role": "user", "content": "What purrs?"}]}, {"messages": [{"role": "assistant", "content": "A."}]},
     {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "A cat."}]},
     {"messages": "What purrs?"}, {"text": "A cat."}],
)  # fmt: skip
def test_a_row_without_prompt_or_answer_is_refused_with_its_line(
    row: Any, context: InputContext, tmp_path: Path
) -> None:
    file = rows(tmp_path / "rows.jsonl", {"prompt": "What barks?", "completion": "A dog."}, row)
    with pytest.raises(LamellaError, match="line 2 has no prompt with an answer") as error:
        Examples.open(file, context)
    assert "\n" not in str(error.value)


def test_an_empty_file_is_refused(context: InputContext, tmp_path: Path) -> None:
    with pytest.raises(LamellaError, match="holds no examples"):
        Examples.open(rows(tmp_path / "rows.jsonl"), context)
