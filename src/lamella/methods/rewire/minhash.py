"""Near-duplicates by datatrove's MinHash: signatures in several processes, then its other steps one after the other.

Imported only if datatrove is installed. Its own tokenizer of English words needs spaCy; here words are runs of letters
and digits.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document as Piece
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

from lamella.progress import tracker
from lamella.reading import read_rows
from lamella.workers import Workers

CONFIG = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # rows of 5 words, a similarity of about 0.72
TOGETHER = 20_000  # texts in a file; each file has signatures of its own


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


@dataclass(frozen=True)
class Signatures:
    """Computes the signatures of the texts in one file.

    Attributes:
        folder: the folder of the texts and signatures.
    """

    folder: Path

    def texts(self, number: int) -> Path:
        """Return the file of some of the texts."""
        return self.folder / "texts" / f"{number:05d}.jsonl"

    def __call__(self, number: int) -> None:
        """Write the signatures of the texts in one file, and remove it; without it they are complete.

        Args:
            number: index of the file.
        """
        if not self.texts(number).exists():
            return
        with _quietly():
            rows = read_rows(self.texts(number))
            step = MinhashDedupSignature(str(self.folder / "signatures"), CONFIG, Words())
            step.run((Piece(text=text, id=str(line)) for line, text in rows), number)
        self.texts(number).unlink()


def duplicate_indices(texts: Sequence[str], folder: Path, workers: Workers) -> set[int]:
    """Return the indices of near-duplicates to remove; one text of each group is kept.

    Args:
        texts: the texts.
        folder: folder for texts and signatures; existing content is replaced.
        workers: where signatures are computed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    signatures = Signatures(folder)
    parts = [range(start, min(start + TOGETHER, len(texts))) for start in range(0, len(texts), TOGETHER)]
    for number, part in enumerate(parts):
        signatures.texts(number).parent.mkdir(parents=True, exist_ok=True)
        with signatures.texts(number).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(texts[index]) + "\n" for index in part)
    with tracker("signatures", len(parts)) as done, workers.pool(folder / "tasks") as pool:
        for _ in pool.each(signatures, range(len(parts))):
            done()
    buckets, removed = str(folder / "buckets"), str(folder / "removed")
    duplicates = set()
    with _quietly():
        for bucket in range(CONFIG.num_buckets):
            step = MinhashDedupBuckets(str(folder / "signatures"), buckets, config=CONFIG)
            step.run(None, bucket, CONFIG.num_buckets)
        MinhashDedupCluster(buckets, removed, CONFIG).run(None)
        for number, part in enumerate(parts):
            pieces = (Piece(text=".", id=str(index)) for index in part)
            duplicates |= {*part} - {int(piece.id) for piece in MinhashDedupFilter(removed).run(pieces, number)}
    return duplicates


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide datatrove's messages and progress bars."""
    logger.disable("datatrove")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("datatrove")
