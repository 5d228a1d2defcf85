"""Runs as files: the schema of every command, ``run.yaml`` beside a result, and what would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml

from lamella.cli.schema import schema_of
from lamella.plan import Plan
from lamella.registry import Method, all_commands
from lamella.runner import run

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
COMMANDS = {f"{slug} {name}".strip(): each for slug, found in all_commands().items() for name, each in found.items()}
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum", "minItems", "maxItems")
ONE = ("shortgpt", NANO_LLAMA, "--sequences", "2", "--length", "48", "--share", "0.34")


def bounds(schema: Any) -> set[str]:
    """Every bound that a schema has, wherever it stands in it."""
    if isinstance(schema, dict):
        own = {f"{name}={schema[name]}" for name in BOUNDS if name in schema}
        own |= {f"enum={[schema['const']]}"} if "const" in schema else set()
        return own.union(*(bounds(each) for each in schema.values()))
    return set().union(*(bounds(each) for each in schema)) if isinstance(schema, list) else set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_schema_has_every_option_with_the_bounds_that_pydantic_sees(command: str) -> None:
    entry: Method = COMMANDS[command]
    schema = json.loads(json.dumps(schema_of(entry, command)))
    assert set(schema["required"]) <= set(entry.inputs) <= set(schema["properties"])
    for name, option in entry.signature.options.items():
        if option.is_checked and not any(get_origin(kind) is dict for kind in option.kinds):
            theirs = option._adapter.json_schema() | {"default": None, "title": ""}
            assert bounds(schema["properties"][name]) == bounds(theirs), name


def test_a_command_prints_its_schema(lamella: Any) -> None:
    schema = json.loads(lamella("run", "finercut", "--schema").out)
    assert schema["properties"]["exclude_front"]["default"] == 0.4 and schema["required"] == ["stack"]
    assert json.loads(lamella("compress", "--schema").out)["properties"]["heal_minutes"]["anyOf"][-1] == {
        "type": "null"
    }


def test_a_run_is_repeated_from_the_file_beside_it(lamella: Any, tmp_path: Path) -> None:
    assert lamella("plan", *ONE, "-o", tmp_path / "one").code == 0
    file = tmp_path / "one" / "run.yaml"
    said = yaml.safe_load(file.read_text())
    assert said["command"] == "run shortgpt" and (said["sequences"], said["share"]) == (2, 0.34)
    again = lamella("--config", file, "-o", tmp_path / "two")
    assert again.code == 0, again.err
    one, two = (Plan.read(tmp_path / name) for name in ("one", "two"))
    assert one == two and (tmp_path / "two" / "run.yaml").read_text() == file.read_text()
    assert lamella("--config", file, "--share", "0.2", "-o", tmp_path / "three").code == 0
    assert Plan.read(tmp_path / "three").removed < one.removed
    assert lamella("run", "shortgpt", "--config", file, "-o", tmp_path / "four").code == 0
    assert Plan.read(tmp_path / "four") == one


def test_the_test_and_the_stack_of_a_run_are_repeated(lamella: Any, tmp_path: Path) -> None:
    brief = ("--sequences", "8", "--length", "16", "--steps", "1", "--batch", "2", "--test", "pydoc", "--stack", "text")
    assert lamella("heal", NANO_LLAMA, *brief, "-o", tmp_path / "one").code == 0
    file = tmp_path / "one" / "run.yaml"
    said = yaml.safe_load(file.read_text())
    assert (said["test"], said["of_stack"], said["steps"]) == ("pydoc", "text", 1)
    again = lamella("--config", file, "-o", tmp_path / "two", "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert found["data"]["test"]["data"] == "pydoc"
    assert found["fidelity"] == json.loads((tmp_path / "one" / "evidence.json").read_text())["fidelity"]


@pytest.mark.parametrize(
    "content",
    [
        "command: run random\nstack: x\nallow_pickle: true",
        "command: run random\nstack: x\noverwrite: true",
        "command: run random\nstack: x\noutput: /tmp/elsewhere",
        "command: eval\nmodel: x\ntasks: [humaneval]\nrun_generated_code: true",
        "command: run random --allow-pickle\nstack: x",
        "command: compress\nstack: x\nplanners: [1]",
        "command: compress\nstack: x\nplanners: {finercut: 1}",
    ],
)
def test_a_file_gives_no_permission_and_no_further_arguments(lamella: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert "run.yaml: " in lamella("--config", tmp_path / "run.yaml", "-o", tmp_path / "out").refused()
    assert not (tmp_path / "out").exists()


def test_a_run_on_what_has_no_name_leaves_no_file(tmp_path: Path) -> None:
    from lamella.zoo import open_stack

    run("random", open_stack(NANO_LLAMA), out=tmp_path / "out")
    assert not (tmp_path / "out" / "run.yaml").exists()


@pytest.mark.parametrize("content", ["- 1", "a: [", "\0", "command: 3"])
def test_a_file_that_is_no_run_is_refused(lamella: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert "run.yaml" in lamella("--config", tmp_path / "run.yaml", "-o", tmp_path / "out").refused()


def test_a_dry_run_says_what_would_run_and_opens_nothing(
    lamella: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamella.zoo.opening.open_model", lambda *_: pytest.fail("a model is opened"))
    done = lamella("plan", *ONE, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0 and "lamella shortgpt would run" in done.out and "0.34" in done.out
    assert not list(tmp_path.iterdir())
    assert "never overwritten" in lamella("plan", *ONE, "-o", NANO_LLAMA, "--dry-run").refused()


def test_completion_knows_commands_and_options(lamella: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    script = "from lamella.cli.app import app; app(prog_name='lamella')"
    for words, expected in (
        ("lamella comp", {"compress", "compare"}),
        ("lamella compress --heal-m", {"--heal-minutes"}),
    ):
        shell = {"_LAMELLA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=shell, check=False)
        assert expected <= set(done.stdout.split()), done.stderr
