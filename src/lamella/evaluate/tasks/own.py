"""Lamella's own tasks, which need no network once their data are in the cache.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import lm_eval

from lamella.data.sources import benchmark_rows
from lamella.evaluate.tasks.files import read_config
from lamella.evaluate.tasks.harness import CustomTask
from lamella.evaluate.tasks.running import passes

CHOICES = 4
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def definitions() -> CustomTask:
    """Return the task of choosing the everyday word that a definition describes, from four.

    The words are short and of one kind, so that neither length nor grammar reveals the answer. Any model knows them,
    whatever its training, so a degraded score shows what a change of the model has lost.
    """
    config = {
        "task": "definitions",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Definition: {{definition}}\nWord:",
        "doc_to_choice": "{{words}}",
        "doc_to_target": "{{answer}}",
        "metric_list": ACCURACY,
        "metadata": {"version": 1},
    }
    return CustomTask(config, {"test": [*questions()]})


@cache
def questions() -> tuple[dict[str, Any], ...]:
    """Return the questions of ``definitions``, whose order and wrong answers depend on a hash of the words."""
    lists: dict[str, dict[str, str]] = {}
    text = (resources.files("lamella.evaluate.tasks") / "definitions.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            words = lists.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            word, _, meaning = line.partition(": ")
            words[word] = meaning
    rows = [
        {
            "word": word,
            "definition": meaning,
            "words": (choices := _choices(word, words)),
            "answer": choices.index(word),
        }
        for words in lists.values()
        for word, meaning in words.items()
    ]
    return tuple(sorted(rows, key=lambda row: _drawn("order", row["word"])))


def _choices(word: str, words: dict[str, str]) -> list[str]:
    """Return a word and three others of its kind."""
    others = sorted(words.keys() - {word}, key=lambda other: _drawn(word, other))[: CHOICES - 1]
    return sorted([word, *others], key=lambda each: _drawn("place", word, each))


def _drawn(*parts: str) -> str:
    """Return a deterministic hash that replaces a random number, the same on every machine and Python version."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def gsm8k() -> CustomTask:
    """Return the test questions of GSM8K, with the prompt of lm-eval's ``gsm8k_cot``."""
    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    return CustomTask(read_config(file, trusted=True) | {"task": "gsm8k"}, {"test": [*benchmark_rows("gsm8k")]})


def humaneval() -> CustomTask:
    """Return the functions of HumanEval, completed greedily from their docstrings and run on their tests."""
    config = {
        "task": "humaneval",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 384},
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "process_results": _run,
        "metadata": {"version": 1},
    }
    return CustomTask(config, {"test": [*benchmark_rows("humaneval")]})


def _run(document: dict[str, Any], written: list[str]) -> dict[str, float]:
    program = f"{document['prompt']}{written[0]}\n{document['test']}\ncheck({document['entry_point']})\n"
    return {"pass@1": float(passes(program))}
