"""Generate the built-in text "general" with SmolLM2: unconditional samples of the model.

Conversations: from the beginning of a user's turn the model generates a question, which is then answered in its chat
format (arXiv 2406.08464). Documents: the model continues a random word (arXiv 2305.17888).

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

ROUND, ROUNDS = 160, 3  # batch size, and number of batches
QUESTION, ANSWER, DOCUMENT = 64, 200, 224  # maximum tokens; longer questions are skipped, others truncated
MIN_P = {QUESTION: 0.05, ANSWER: 0.1, DOCUMENT: 0.05}  # minimum probability relative to the most likely token
MARK = "@@"


class Writer:
    """Samples from SmolLM2 with a random seed.

    Args:
        seed: random seed.
    """

    def __init__(self, seed: int) -> None:
        self.model, self.tokenizer = lamella.open("smollm2").model, open_tokenizer("smollm2")
        self.rng = random.Random(seed)
        torch.manual_seed(seed)

    def conversations(self) -> Iterator[dict[str, Any]]:
        """Generate questions with their answers."""
        previous: set[str] = set()
        for _ in range(ROUNDS):
            outputs = self._continue([self._format(MARK).split(MARK)[0]] * ROUND, QUESTION)
            questions = {text.strip() for text, ended in outputs if ended and text.strip()} - previous
            previous |= questions
            order = sorted(questions, key=len)
            prompts = [self._format(question, add_generation_prompt=True) for question in order]
            for question, (answer, ended) in zip(order, self._continue(prompts, ANSWER), strict=True):
                yield {"question": question, "answer": answer, "finished": ended}

    def documents(self) -> Iterator[dict[str, Any]]:
        """Generate documents from random words."""
        words = sorted(word for word in self.tokenizer.get_vocab() if re.fullmatch("[A-Z][a-z]{2,}", word))
        for _ in range(ROUNDS):
            starts = self.rng.sample(words, ROUND)
            for word, (rest, _) in zip(starts, self._continue(starts, DOCUMENT), strict=True):
                yield {"text": (word + rest).strip()}

    def _format(self, question: str, **options: Any) -> str:
        turn = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, **options))

    def _continue(self, prompts: list[str], tokens: int) -> list[tuple[str, bool]]:
        """Return the model's continuation of each prompt, and whether it ended by itself."""
        end = self.tokenizer.eos_token_id
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, min_p=MIN_P[tokens], top_k=0, eos_token_id=end, pad_token_id=end
        )
        inputs = self.tokenizer(
            prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left"
        )
        rows = self.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
        cut = [row[: row.index(end)] if end in row else row for row in rows]
        return [(self.tokenizer.decode(own), end in row) for own, row in zip(cut, rows, strict=True)]


def main() -> None:
    """Parse the arguments and run the script."""
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
