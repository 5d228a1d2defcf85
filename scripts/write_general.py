"""Let SmolLM2 write the built-in text "general": what it says when nothing else decides what is talked about.

Conversations: from the beginning of a user's turn the model continues with a question, and put into its chat format
that question is answered (arXiv 2406.08464). Documents: one word is drawn, and the model goes on (arXiv 2305.17888).

    python scripts/write_general.py conversations out.jsonl   # a quarter of an hour on two cores
    python scripts/write_general.py documents out.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import lamella
from lamella.zoo import open_tokenizer

ROUND, ROUNDS = 160, 3  # texts at once, and how often
QUESTION, ANSWER, DOCUMENT = 64, 200, 224  # tokens at most; a longer question is left out, the others are cut
LIKELY = {QUESTION: 0.05, ANSWER: 0.1, DOCUMENT: 0.05}  # of a token that is drawn at least, against the likeliest
MARK = "@@"


class Writer:
    """SmolLM2, drawing as a seed says."""

    def __init__(self, seed: int) -> None:
        self.model, self.tokenizer = lamella.open("smollm2").model, open_tokenizer("smollm2")
        self.drawn = random.Random(seed)
        torch.manual_seed(seed)

    def conversations(self) -> Iterator[dict[str, Any]]:
        known: set[str] = set()
        for _ in range(ROUNDS):
            asked = self._continued([self._shown(MARK).split(MARK)[0]] * ROUND, QUESTION)
            questions = {text.strip() for text, ended in asked if ended and text.strip()} - known
            known |= questions
            order = sorted(questions, key=len)
            prompts = [self._shown(question, add_generation_prompt=True) for question in order]
            for question, (answer, ended) in zip(order, self._continued(prompts, ANSWER), strict=True):
                yield {"question": question, "answer": answer, "finished": ended}

    def documents(self) -> Iterator[dict[str, Any]]:
        words = sorted(word for word in self.tokenizer.get_vocab() if re.fullmatch("[A-Z][a-z]{2,}", word))
        for _ in range(ROUNDS):
            begun = self.drawn.sample(words, ROUND)
            for word, (rest, _) in zip(begun, self._continued(begun, DOCUMENT), strict=True):
                yield {"text": (word + rest).strip()}

    def _shown(self, question: str, **options: Any) -> str:
        turn = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, **options))

    def _continued(self, prompts: list[str], tokens: int) -> list[tuple[str, bool]]:
        """What the model says after each prompt, and whether it came to an end."""
        end = self.tokenizer.eos_token_id
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, min_p=LIKELY[tokens], top_k=0, eos_token_id=end, pad_token_id=end
        )
        given = self.tokenizer(
            prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left"
        )
        rows = self.model.generate(**given, generation_config=config)[:, given["input_ids"].shape[1] :].tolist()
        cut = [row[: row.index(end)] if end in row else row for row in rows]
        return [(self.tokenizer.decode(own), end in row) for own, row in zip(cut, rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("conversations", "documents"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8") as file:
        for count, row in enumerate(getattr(Writer(arguments.seed), arguments.kind)(), start=1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if count % 20 == 0:
                print(f"{count} {arguments.kind}", flush=True)


if __name__ == "__main__":
    main()
