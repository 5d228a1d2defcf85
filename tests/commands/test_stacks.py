"""Which stack of a model a method works on: the only one that fits what it declares, or the one that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamella as api
from lamella.errors import ArchitectureError, LamellaError, MethodError
from lamella.methods.gamma_mod import gamma_mod
from lamella.methods.shortgpt import shortgpt
from lamella.registry import fitting_stack
from lamella.zoo import nano
from lamella.zoo.vlm import shapes_vlm

ROWS = "shapes:colour"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    for part in shapes_vlm("llava", num_hidden_layers=3):
        part.save_pretrained(folder)
    return folder


def test_gamma_mod_takes_the_text_of_a_model_with_images(lamella: Any, vlm: Path, tmp_path: Path) -> None:
    brief = ("--rows", 4, "--layers", 1, "--steps", 1, "--probes", 2, "--batch", 2)
    ran = lamella("run", "gamma-mod", vlm, "--train", ROWS, *brief, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    options = {"rows": 4, "layers": (1,), "steps": 1, "probes": 2, "batch": 2}
    left_out, named = (api.run("gamma-mod", vlm, ROWS, **options, **stack) for stack in ({}, {"of_stack": "text"}))
    assert left_out.result.plan.digest == named.result.plan.digest and left_out.result.stack.stack == "text"
    for wrong, why in (
        ({"of_stack": "vision"}, "gamma-mod works on decoders"),
        ({"of_stack": "middle"}, "has no stack 'middle': it has vision and text"),
    ):
        with pytest.raises(LamellaError, match=why):
            api.run("gamma-mod", vlm, ROWS, **options, **wrong)


def test_a_whole_model_stands_for_its_fitting_stack_in_python(vlm: Path) -> None:
    model, rows = api.open(vlm), api.run("shortgpt", vlm, ROWS, rows=4)
    assert not isinstance(model, api.Stack)
    drops = [plan.drop for plan in rows.result]
    text = api.windows(_tokenizer(vlm), api.load_text("pydoc", "calibration"), 2, 32, 0)
    assert [plan.drop for plan in api.make_plan("shortgpt", model, text)] == [
        plan.drop for plan in api.make_plan("shortgpt", model.stacks["text"], text)
    ]
    assert [plan.drop for plan in shortgpt(model, text)] == [plan.drop for plan in shortgpt(model.stacks["text"], text)]
    assert len(drops) > 1


def _tokenizer(folder: Path) -> Any:
    from lamella.zoo import open_tokenizer

    return open_tokenizer(folder)


def test_where_several_stacks_fit_one_must_be_named_and_where_none_does_all_are(lamella: Any, vlm: Path) -> None:
    asked = lamella("run", "depth-efficiency", vlm, "--calibration", ROWS, "--rows", 2, "--brief").refused()
    assert "works on the stacks vision and text of llava: choose one with --stack text (of_stack in Python)" in asked
    encoders = api.open(nano("llava"))
    with pytest.raises(
        MethodError, match=r"^some works on models that predict masked tokens; .* the stacks vision, a "
    ):
        fitting_stack("some", "masked tokens", encoders)
    with pytest.raises(MethodError, match="works on the stacks vision and text"):
        fitting_stack("some", "any", encoders)
    assert fitting_stack("some", ("clip_vision_model", "masked tokens"), encoders).stack == "vision"


@pytest.mark.parametrize("name", ["text", "vision", "encoder", "decoder"])
def test_the_name_of_a_stack_is_not_taken_for_a_model(lamella: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ArchitectureError, match=f"'{name}' is the name of a stack, not of a model: give a model"
    ) as error:
        api.open(name)
    assert "\n" not in str(error.value)
    with pytest.raises(ArchitectureError, match="is the name of a stack"):
        api.run("gamma-mod", stack=name, train=ROWS)
    assert f"--stack {name}" in lamella("chat", name, "--prompt", "a").refused()


def test_a_stack_that_is_given_beside_the_model_is_pointed_to_of_stack(vlm: Path) -> None:
    model = api.open(vlm)
    for call in (
        lambda: api.run("gamma-mod", vlm, train=ROWS, stack="text"),
        lambda: api.make_plan("lora-drop", vlm, stack="text"),
        lambda: gamma_mod(model, [], stack="text"),
    ):
        with pytest.raises(MethodError, match=r"stack is given both by position and by name.*of_stack"):
            call()
    with pytest.raises(MethodError, match=r"train is given both by position and by name: give it once$"):
        api.run("gamma-mod", vlm, ROWS, train=ROWS)


def test_compare_and_bench_take_the_stack_that_writes_text(lamella: Any, vlm: Path, tmp_path: Path) -> None:
    compared = lamella(
        "compare", vlm, "--new", "stdlib", "--method", "lora", "--steps", 1, "--batch", 1, "--length", 16
    )
    assert compared.code == 0, compared.err
    timed = lamella("bench", vlm, vlm, "--batch", 1, "--prompt", 8, "--tokens", 2, "--rounds", 1)
    assert timed.code == 0, timed.err
