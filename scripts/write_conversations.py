"""Let SmolLM2 write the conversations of the built-in text "general": it asks, and it answers.

From the beginning of a user's turn the model continues with a question; put into its chat format, that question is
answered. Nothing else decides what is talked about (arXiv 2406.08464).

    python scripts/write_conversations.py out.jsonl           # about a quarter of an hour on two cores
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import lamella
from lamella.zoo import open_tokenizer

ROUND, ROUNDS = 160, 3  # questions at once, and how often
QUESTION, ANSWER = 64, 200  # tokens at most; a question that is longer is left out, an answer is cut
LIKELY = {QUESTION: 0.05, ANSWER: 0.1}  # a token is drawn if it is at least this likely, against the likeliest
MARK = "@@"


def written(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[tuple[str, bool]]:
    """What the model says after each prompt, and whether it came to an end."""
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, min_p=LIKELY[tokens], top_k=0, eos_token_id=end, pad_token_id=end
    )
    inputs = tokenizer(prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    rows = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    cut = [row[: row.index(end)] if end in row else row for row in rows]
    return [(tokenizer.decode(own), end in row) for own, row in zip(cut, rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = lamella.open("smollm2").model, open_tokenizer("smollm2")
    torch.manual_seed(arguments.seed)

    def shown(question: str, **options: Any) -> str:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, **options))

    known: set[str] = set()
    with arguments.out.open("w", encoding="utf-8") as file:
        for turn in range(ROUNDS):
            asked = written(model, tokenizer, [shown(MARK).split(MARK)[0]] * ROUND, QUESTION)
            questions = {text.strip() for text, ended in asked if ended and text.strip()} - known
            known |= questions
            order = sorted(questions, key=len)
            prompts = [shown(question, add_generation_prompt=True) for question in order]
            for question, (answer, ended) in zip(order, written(model, tokenizer, prompts, ANSWER), strict=True):
                row = {"question": question, "answer": answer, "finished": ended}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{turn + 1} of {ROUNDS}: {len(known)} conversations")


if __name__ == "__main__":
    main()
