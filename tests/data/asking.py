"""Steps of a pipeline for tests, in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.pipeline.base import PipelineStep

from lamella.data import Request
from lamella.data.steps import REQUEST, WRITTEN


class Ask(PipelineStep):
    """Ask for a continuation of each document; one that is named fails."""

    type, name = "test", "ask"

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails = fails

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        for each in data:
            if each.id == self.fails:
                raise ValueError(f"{each.id} fails")
            each.metadata |= {"id": each.id}
            each.metadata[REQUEST] = Request(each.id, [{"role": "user", "content": each.text}], 6, len(each.text))
            yield each


class Tell(PipelineStep):
    """Put what was written into the row."""

    type, name = "test", "tell"

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        for each in data:
            each.metadata["text"] = each.metadata.pop(WRITTEN).text
            yield each
