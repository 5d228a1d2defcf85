"""The types of data that methods take, and their loaders."""

from lamella.data.examples import Examples, read_examples
from lamella.data.image_text import ImageText
from lamella.data.pairs import Pair, Pairs, Triple, read_pair_file, read_pairs
from lamella.data.processing import MARK, Processing, Shown
from lamella.data.questions import Questions, ask, crc, load_questions
from lamella.data.reader import Reader
from lamella.data.records import Piece, Records, read_records
from lamella.data.rows import Rows
from lamella.data.samples import Passages, Sample, Samples
from lamella.data.sources import BUILT_IN, PLAIN, Source, load_text, windows
from lamella.data.text import Text
from lamella.data.writing import own_texts, write

__all__ = [
    "BUILT_IN",
    "MARK",
    "PLAIN",
    "Examples",
    "ImageText",
    "Pair",
    "Pairs",
    "Passages",
    "Piece",
    "Processing",
    "Questions",
    "Reader",
    "Records",
    "Rows",
    "Sample",
    "Samples",
    "Shown",
    "Source",
    "Text",
    "Triple",
    "ask",
    "crc",
    "load_questions",
    "load_text",
    "own_texts",
    "read_examples",
    "read_pair_file",
    "read_pairs",
    "read_records",
    "windows",
    "write",
]
