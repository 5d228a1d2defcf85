"""The types of data that methods take, and their loaders."""

from lamella.data.pairs import Pair, read_pair_file, read_pairs
from lamella.data.questions import Questions, ask, crc, load_questions
from lamella.data.reader import Reader
from lamella.data.records import Record, Records, read_records
from lamella.data.sources import BUILT_IN, Source, load_text, windows
from lamella.data.text import Text
from lamella.data.writing import own_texts, write

__all__ = [
    "BUILT_IN",
    "Pair",
    "Questions",
    "Reader",
    "Record",
    "Records",
    "Source",
    "Text",
    "ask",
    "crc",
    "load_questions",
    "load_text",
    "own_texts",
    "read_pair_file",
    "read_pairs",
    "read_records",
    "windows",
    "write",
]
