"""What the first edition wrote is still read: its plans, exports, interrupted trainings, journals; its commands stay.

The files under fixtures/first-edition were made by that version and cannot be made again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

import lamella
from lamella.cli import app
from lamella.files import Work
from lamella.methods.cola import Settings, read_samples, search_paths
from lamella.methods.continual_pretrain import TRAINING
from lamella.plan import Plan, PlanSeries
from lamella.registry import get_method
from lamella.runtime import apply, parallel
from lamella.stack import Stack
from lamella.train import blocks
from lamella.zoo import open_stack, open_tokenizer
from lamella.zoo.nano import nano

FIXTURES = Path(__file__).parent / "fixtures" / "first-edition"
NANO_LLAMA = Path(__file__).parent / "models" / "nano-llama"
COMMANDS = json.loads((FIXTURES / "commands.json").read_text())
PLANS = sorted(file.stem for file in (FIXTURES / "plans").glob("*.json") if file.stem != "series")
LOGITS = load_file(FIXTURES / "logits.safetensors")
IDS = LOGITS["ids"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # another machine rounds differently


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_the_first_edition_computes_what_it_computed(name: str) -> None:
    stack = Stack(nano("llama"))
    plan = Plan.read(FIXTURES / "plans" / f"{name}.json")
    logits = parallel(apply(stack, plan), IDS, torch.full((3,), 8)).logits
    torch.testing.assert_close(logits, LOGITS[name], **CLOSE)


def test_a_series_of_the_first_edition_is_read() -> None:
    series = PlanSeries.read(FIXTURES / "plans" / "series.json")
    assert len(series) == 5 and series[-1].removed == 4 and series.provenance["method"] == "finercut"


@pytest.mark.parametrize(("folder", "plan"), [("native", "dropped"), ("native-phased", None)])
def test_a_native_export_of_the_first_edition_opens(folder: str, plan: str | None) -> None:
    opened = lamella.load(FIXTURES / folder)
    if plan is not None:
        torch.testing.assert_close(opened.model(IDS).logits, LOGITS[plan], **CLOSE)
    else:
        view = apply(Stack(nano("llama")), Plan.read(FIXTURES / folder / "plan.json"))
        lengths = torch.full((3,), 8)
        expected, found = (parallel(each, IDS, lengths).logits for each in (view, opened.model))
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_training_that_the_first_edition_left_goes_on(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "training", tmp_path / "training")
    samples = blocks(torch.randint(3, 128, (10, 12), generator=torch.Generator().manual_seed(2)), loss_on="all")
    with torch.enable_grad():
        method, config = get_method("continual-pretrain"), replace(TRAINING, steps=5)
        healed = method(Stack(nano("gpt2")), samples, config=config, work=Work(tmp_path / "training"))
    expected = load_file(FIXTURES / "trained.safetensors")
    found = dict(healed.stack.model.named_parameters())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].detach(), tensor, rtol=1e-4, atol=1e-5)
    first = json.loads((FIXTURES / "training.log.json").read_text())[0]
    assert healed.log.train[0].loss == first  # read, not computed again


def test_answers_that_the_first_edition_found_are_not_computed_again(tmp_path: Path) -> None:
    journal = tmp_path / "answers.jsonl"
    shutil.copyfile(FIXTURES / "cola" / "answers.jsonl", journal)
    stack = open_stack(NANO_LLAMA)
    samples = read_samples(FIXTURES / "cola" / "samples.jsonl")
    study = search_paths(
        stack, samples, tokenizer=open_tokenizer(NANO_LLAMA), settings=Settings(simulations=12), journal=journal
    )
    assert journal.read_text() == (FIXTURES / "cola" / "answers.jsonl").read_text()
    assert sum(each.executed for each in study.samples) == 0


OTHERWISE = {("compress", "--heal"): "auto"}  # defaults that are others now, for the better


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_first_edition_keeps_its_arguments_and_options(name: str) -> None:
    group: Any = typer.main.get_command(app)
    context = group.make_context("lamella", [name], resilient_parsing=True)
    _, command, _ = group.resolve_command(context, [name])
    options = {option: each for each in command.params for option in each.opts}
    for said in COMMANDS[name]["options"].values():
        for option in said["opts"]:
            assert option in options, f"lamella {name} has lost {option}"
            found = options[option]
            default = found.default if not callable(found.default) else None
            default = None if default == [] else json.loads(json.dumps(default, default=str))  # both say: not given
            before = None if said["default"] == [] else said["default"]
            if before is not None:  # else it was left to the method, whose default now stands there
                assert default == OTHERWISE.get((name, option), before), option
            assert found.is_flag == said["flag"], option
            assert found.required <= said["required"], option
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    assert [each.nargs for each in arguments] == [each["nargs"] for each in COMMANDS[name]["arguments"]]
    assert command.help
