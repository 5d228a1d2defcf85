"""Models and texts that every machine can have: the embedded default, built-in texts, nano models."""

from lamella.zoo.cache import cache_folder
from lamella.zoo.nano import NANO, nano
from lamella.zoo.opening import chat_inputs, check_folder, load, open_stack, open_tokenizer
from lamella.zoo.pull import ZOO, pull, resolve
from lamella.zoo.records import Record, read_records
from lamella.zoo.texts import BUILT_IN, Text, load_text, windows

__all__ = [
    "BUILT_IN",
    "NANO",
    "ZOO",
    "Record",
    "Text",
    "cache_folder",
    "chat_inputs",
    "check_folder",
    "load",
    "load_text",
    "nano",
    "open_stack",
    "open_tokenizer",
    "pull",
    "read_records",
    "resolve",
    "windows",
]
