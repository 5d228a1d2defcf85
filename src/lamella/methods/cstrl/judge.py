"""Evaluation: scores of generated summaries of test pairs, against a constant baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lamella.data import write
from lamella.data.samples import Sample
from lamella.evaluate import TextScores
from lamella.methods.cstrl.recipe import PairEncoder, TextLengths
from lamella.methods.cstrl.summaries import SummaryPair
from lamella.stack import Model, share

COLLAPSE_RATIO = 0.5  # a student with fewer distinct summaries than this fraction of its teacher's has collapsed


def generate_texts(model: Model, encoder: PairEncoder, samples: Sequence[Sample], max_length: int) -> list[str]:
    """Generate texts greedily for the sources of samples.

    Args:
        model: the model.
        encoder: its sample encoding.
        samples: the samples.
        max_length: maximum number of new tokens.
    """
    tokenizer, end = encoder.tokenizer, encoder.tokenizer.eos_token_id
    prompts = [each["input_ids"][: int(each.get("prompt_lengths", len(each["input_ids"])))] for each in samples]
    texts = []
    for ids in write(share(model.model).eval(), prompts, max_length):
        row = ids.tolist()
        texts.append(tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True).strip())
    return texts


class Judge:
    """A test set and its scores.

    Args:
        encoder: sample encoding of the evaluated models.
        pairs: the test pairs.
        prefix: text in front of each source.
        lengths: maximum lengths of sources and summaries.
    """

    def __init__(self, encoder: PairEncoder, pairs: Sequence[SummaryPair], prefix: str, lengths: TextLengths) -> None:
        self.encoder, self.pairs = encoder, list(pairs)
        self.samples = encoder.samples(self.pairs, prefix, lengths.source_length, lengths.summary_length)
        self.most = max(len(self._wanted(each)) for each in self.samples)  # a longer output is wrong in any case

    @staticmethod
    def _wanted(sample: Sample) -> Any:
        return sample["input_ids"][int(sample["prompt_lengths"]) :] if "prompt_lengths" in sample else sample["labels"]

    def of(self, model: Model) -> dict[str, Any]:
        """Score the summaries that a model generates."""
        return self.scores(generate_texts(model, self.encoder, self.samples, self.most))

    def scores(self, texts: Sequence[str]) -> dict[str, Any]:
        """Score summaries of the test pairs."""
        return TextScores.of(texts, [pair.summary.strip() for pair in self.pairs]).as_dict()

    def constant(self, train: Sequence[SummaryPair]) -> dict[str, Any]:
        """Score the most frequent training summary as a constant answer."""
        ((text, _),) = Counter(pair.summary.strip() for pair in train).most_common(1)
        return self.scores([text] * len(self.pairs))
