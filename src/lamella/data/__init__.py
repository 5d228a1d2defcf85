"""The types of data that methods take, and their loaders."""

from lamella.data.pairs import Pair, read_pair_file, read_pairs
from lamella.data.questions import ask, crc, load_questions
from lamella.data.records import Record, read_records
from lamella.data.texts import BUILT_IN, Text, load_text, windows
from lamella.data.writing import own_texts, write

__all__ = [
    "BUILT_IN",
    "Pair",
    "Record",
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
