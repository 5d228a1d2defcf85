"""What summaries are worth: what a model writes for pairs that it has not seen, beside one constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lamella.data import write
from lamella.data.samples import Sample
from lamella.evaluate import TextScores
from lamella.methods.cstrl.recipe import Lengths, Reading
from lamella.methods.cstrl.summaries import Pair
from lamella.stack import Model, share

COLLAPSED = 0.5  # of the different summaries of the teacher: with fewer, a student says the same again and again


def written(model: Model, reading: Reading, samples: Sequence[Sample], most: int) -> list[str]:
    """What a model writes, greedily, for the sources of samples.

    Args:
        most: tokens of each text.
    """
    tokenizer, end = reading.tokenizer, reading.tokenizer.eos_token_id
    prompts = [each["input_ids"][: int(each.get("prompt_lengths", len(each["input_ids"])))] for each in samples]
    texts = []
    for ids in write(share(model.model).eval(), prompts, most):
        row = ids.tolist()
        texts.append(tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True).strip())
    return texts


class Judge:
    """A test, and what to write for it.

    Args:
        reading: of the models that are judged.
        pairs: the test.
        prefix, lengths: of what they read and write.
    """

    def __init__(self, reading: Reading, pairs: Sequence[Pair], prefix: str, lengths: Lengths) -> None:
        self.reading, self.pairs = reading, list(pairs)
        self.samples = reading.samples(self.pairs, prefix, lengths.source_length, lengths.summary_length)
        self.most = max(len(self._wanted(each)) for each in self.samples)  # a longer one is wrong whatever follows

    @staticmethod
    def _wanted(sample: Sample) -> Any:
        return sample["input_ids"][int(sample["prompt_lengths"]) :] if "prompt_lengths" in sample else sample["labels"]

    def of(self, model: Model) -> dict[str, Any]:
        """The scores of what a model writes."""
        return self.scores(written(model, self.reading, self.samples, self.most))

    def scores(self, texts: Sequence[str]) -> dict[str, Any]:
        return TextScores.of(texts, [pair.summary.strip() for pair in self.pairs]).as_dict()

    def constant(self, train: Sequence[Pair]) -> dict[str, Any]:
        """The scores of the summary that is the most frequent in training, whatever the source says."""
        ((text, _),) = Counter(pair.summary.strip() for pair in train).most_common(1)
        return self.scores([text] * len(self.pairs))
