"""Models and texts that every machine can have: the embedded default, built-in texts, nano models."""

from lamella.zoo.cache import cache_folder
from lamella.zoo.nano import NANO, nano
from lamella.zoo.open_questions import open_questions
from lamella.zoo.opening import chat_inputs, check_folder, load, open_stack, open_tokenizer
from lamella.zoo.pairs import Pair, read_pair_file, read_pairs
from lamella.zoo.pull import ZOO, convert_gguf, pull, resolve
from lamella.zoo.questions import ask, crc, load_questions
from lamella.zoo.records import Record, read_records
from lamella.zoo.texts import BUILT_IN, Text, load_text, windows
from lamella.zoo.writing import own_texts, write

__all__ = [
    "BUILT_IN",
    "NANO",
    "ZOO",
    "Pair",
    "Record",
    "Text",
    "ask",
    "cache_folder",
    "chat_inputs",
    "check_folder",
    "convert_gguf",
    "crc",
    "load",
    "load_questions",
    "load_text",
    "nano",
    "open_questions",
    "open_stack",
    "open_tokenizer",
    "own_texts",
    "pull",
    "read_pair_file",
    "read_pairs",
    "read_records",
    "resolve",
    "windows",
    "write",
]
