"""Every type of input in the signatures of the registry: its example is opened as the runner opens it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from worlds import COMMANDS, difference, given, opened, put, state, usual, written

from lamella.errors import LamellaError
from lamella.inputs import Opening
from lamella.provenance import describe
from lamella.registry import Method
from lamella.runner import checked
from lamella.signature import Parameter, is_model, kind_of


def loaders() -> Iterator[tuple[str, Method, Parameter]]:
    """The types that have a loader of their own, each with the first command that takes it."""
    seen = set()
    for command, entry in COMMANDS.items():
        if entry.is_own:  # which take what methods take, and models
            continue
        for each in entry.signature.inputs.values():
            kind = kind_of(each)
            if not is_model(kind) and kind not in seen and (hasattr(kind, "example") or hasattr(kind, "default")):
                seen.add(kind)
                yield f"{kind.__name__} of {command}", entry, each


LOADERS = {name: (entry, parameter) for name, entry, parameter in loaders()}
FROM_FILES = [
    name for name, (_, each) in LOADERS.items() if getattr(getattr(kind_of(each), "example", None), "content", None)
]


def read(name: str, value: Any = None, seed: int = 0) -> Any:
    """The input as the runner opens it for a run on a nano model; its example when no value is given."""
    entry, parameter = LOADERS[name]
    kind = kind_of(parameter)
    example = getattr(kind, "example", None)
    settings = example.settings if example else {}
    if value is None:
        value = put(example) if example else kind.default
    opening = Opening(entry, {parameter.name: value, "seed": seed, **settings})
    if {"Stack", "Model", "SavedModel"} & set(entry.inputs.values()):
        opening.model = opened(usual(f"{entry.slug} {entry.name}".strip()))
    return opening(Parameter(parameter.name, kind, split=parameter.split))


@pytest.mark.parametrize("name", LOADERS)
def test_its_type_says_what_it_takes(name: str) -> None:
    kind = kind_of(LOADERS[name][1])
    assert kind.source_help and "\n" not in kind.source_help and kind.__doc__
    assert (kind.open.__doc__ or "").strip()


@pytest.mark.parametrize("name", LOADERS)
def test_its_example_opens_as_its_type_and_says_what_it_is(name: str) -> None:
    found = read(name)
    assert isinstance(found, kind_of(LOADERS[name][1]))
    said = describe(found)
    assert json.loads(json.dumps(said)) == said
    assert state(found), "an example holds something"


@pytest.mark.parametrize("name", FROM_FILES)
def test_it_names_its_file_and_tells_one_content_from_another(name: str) -> None:
    example = kind_of(LOADERS[name][1]).example
    said = json.dumps(describe(read(name)))
    assert example.source in said
    another = read(name, str(written(example.source, 2 * example.content)))
    assert _without_folders(json.dumps(describe(another))) != _without_folders(said)


def _without_folders(said: str) -> str:
    return re.sub(r"/[\w/.-]*/", "", said)


@pytest.mark.parametrize("name", LOADERS)
def test_opened_twice_it_is_the_same(name: str) -> None:
    first, second = read(name), read(name)
    assert describe(first) == describe(second)
    assert not difference(state(first), state(second))


@pytest.mark.parametrize("name", LOADERS)
def test_a_name_of_nothing_is_refused_in_one_line_that_has_it(name: str) -> None:
    with pytest.raises(LamellaError, match="no-such-thing") as error:
        read(name, "no-such-thing.txt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_is_given_by_name_passes_the_checks_before_anything_is_opened(command: str) -> None:
    entry = COMMANDS[command]
    title, _, rows = checked(entry.slug, command=entry.name, **given(command, usual(command)))
    assert command in title and {row[1] for row in rows} >= set(entry.signature.inputs)
