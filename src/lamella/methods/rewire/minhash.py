"""Near-duplicates by datatrove's MinHash: its steps, one after the other, on any sequence of texts.

Imported only if datatrove is installed. Its own tokenizer of English words needs spaCy; here words are runs of letters
and digits.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from datatrove.data import Document as Piece
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger


class Words(WordTokenizer):
    """Tokenizer of words of letters and digits."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return re.findall(r"\w+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the text as one sentence."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return the span of the text."""
        return [(0, len(text))]


def duplicate_indices(texts: Sequence[str], folder: Path) -> set[int]:
    """Return the indices of near-duplicates to remove; one text of each group is kept.

    Args:
        texts: the texts.
        folder: folder for signatures; existing content is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    signatures, buckets, removed = (str(folder / name) for name in ("signatures", "buckets", "removed"))
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # rows of 5 words, a similarity of about 0.72

    def pieces() -> Iterator[Piece]:
        return (Piece(text=text, id=str(index)) for index, text in enumerate(texts))

    logger.disable("datatrove")
    try:
        MinhashDedupSignature(signatures, config, Words()).run(pieces())
        for bucket in range(config.num_buckets):
            MinhashDedupBuckets(signatures, buckets, config=config).run(None, bucket, config.num_buckets)
        with contextlib.redirect_stderr(io.StringIO()):  # it prints its own progress bar
            MinhashDedupCluster(buckets, removed, config).run(None)
        others = set(range(len(texts)))
        for piece in MinhashDedupFilter(removed).run(pieces()):
            others.remove(int(piece.id))
    finally:
        logger.enable("datatrove")
    return others
