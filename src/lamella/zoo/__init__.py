"""Models and texts that every machine can have: the embedded default, built-in texts, nano models."""

from lamella.zoo.cache import cache_folder
from lamella.zoo.nano import NANO, nano
from lamella.zoo.opening import chat_inputs, check_folder, load, open_stack, open_tokenizer
from lamella.zoo.pairs import Pair, read_pair_file, read_pairs
from lamella.zoo.pull import ZOO, pull, resolve
from lamella.zoo.texts import BUILT_IN, Text, load_text, windows
from lamella.zoo.writing import own_texts, write

__all__ = [
    "BUILT_IN",
    "NANO",
    "ZOO",
    "Pair",
    "Text",
    "cache_folder",
    "chat_inputs",
    "check_folder",
    "load",
    "load_text",
    "nano",
    "open_stack",
    "open_tokenizer",
    "own_texts",
    "pull",
    "read_pair_file",
    "read_pairs",
    "resolve",
    "windows",
    "write",
]
