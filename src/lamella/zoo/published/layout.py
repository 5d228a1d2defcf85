"""What a family of published checkpoints declares, so that its folders open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE = "<image>"  # the placeholder of an image, which the published tokenizers do not have


@dataclass(frozen=True)
class PublishedLayout:
    """A published layout.

    Attributes:
        names: by a pattern of published tensor names, their replacement in Lamella's class; None for tensors that it
            does not need. The first pattern that is found applies; other names are kept.
        config_of: returns the config of Lamella's class for a folder.
        open_tokens: returns the tokenizer of a folder, with :data:`IMAGE`.
        open_processing: returns the processor of a folder.
    """

    names: Mapping[str, str | None]
    config_of: Callable[[Path], Any]
    open_tokens: Callable[[Path], Any]
    open_processing: Callable[[Path], Any]
