"""Checkpoints whose published layout differs from that of the class that opens them.

A family of such checkpoints is a module with a :class:`PublishedLayout` for each published model type: its config
becomes that of Lamella's class, tensor names are mapped while the weights are read, and tokenizer and processor are
made as in the published code, none of which is run.

    llava   LLaDA-V and LaViDa
    ofa     OFA
"""

from lamella.zoo.published.layout import IMAGE, PublishedLayout
from lamella.zoo.published.llava import SIGLIP, grids
from lamella.zoo.published.opening import (
    config_of,
    is_published,
    open_processing,
    open_tokens,
    open_weights,
    renamed,
)

__all__ = [
    "IMAGE",
    "SIGLIP",
    "PublishedLayout",
    "config_of",
    "grids",
    "is_published",
    "open_processing",
    "open_tokens",
    "open_weights",
    "renamed",
]
