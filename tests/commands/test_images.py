"""A method that takes text or images with text gets what fits the model, and is judged on rows of the same kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lamella.commands.compress.healing import Heal, heal_cut
from lamella.commands.heal.command import context_of
from lamella.data import ImageText, InputContext, Processing
from lamella.errors import LamellaError
from lamella.evaluate.scored import read_inputs
from lamella.files import Work
from lamella.methods import unified_skip
from lamella.plan import ModelReference, Plan
from lamella.runner import run
from lamella.zoo import open_processor, open_stack
from lamella.zoo.vlm import shapes_vlm

NANO = Path(__file__).parents[1] / "models" / "nano-llama"
METHOD = '''
"""Without one: leave a layer out. Nobody, "Of no importance", 2026."""

from lamella.data import ImageText, Text
from lamella.plan import ModelReference, Plan
from lamella.registry import method
from lamella.results import Edit
from lamella.stack import Stack


@method("without-one", purpose="prune")
def without_one(stack: Stack, data: Text | ImageText, *, layer: int = 1) -> Edit:
    """Leave a layer out.

    Args:
        stack: the opened model.
        data: is only looked at.
        layer: its number.
    """
    plan = Plan(model=ModelReference.of(stack), drop=[f"{stack.prefix}layers.{layer}"])
    return Edit(stack=stack, plan=plan, findings={"data": type(data).__name__, "rows": len(data)})
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package with the method, as an installer leaves it."""
    site = tmp_path / "site"
    (site / "looking").mkdir(parents=True)
    (site / "looking" / "__init__.py").write_text("")
    (site / "looking" / "without_one.py").write_text(METHOD.lstrip())
    info = site / "looking-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: looking\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lamella.methods]\nwithout-one = looking.without_one\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "looking"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llava"
    for part in shapes_vlm("llava", num_hidden_layers=3):
        part.save_pretrained(folder)
    return folder


def test_a_model_of_images_is_given_rows_and_judged_over_their_answers(
    installed: None, vlm: Path, tmp_path: Path
) -> None:
    done = run("without-one", vlm, "shapes:colour", rows=5, of_stack="text", out=tmp_path / "out")
    assert done.result.findings == {"data": "ImageText", "rows": 5}
    said = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert said["provenance"]["inputs"]["data"] | {"sha256": ""} == {
        "data": "shapes:colour", "split": "calibration", "rows": 5, "images": 5, "sha256": ""
    }  # fmt: skip
    assert said["data"]["test"]["split"] == "test" and said["data"]["test"]["rows"] == 64
    assert said["fidelity"]["sequences"] == 64 and said["fidelity"]["positions"] == 2 * 64  # a colour, and the end
    assert said["fidelity"]["kl"]["mean"] > 0
    assert type(open_processor(tmp_path / "out")).__name__ == "LlavaProcessor"


@pytest.mark.slow
def test_other_rows_judge_where_they_are_named(installed: None, vlm: Path) -> None:
    done = run("without-one", vlm, "shapes:colour", rows=3, of_stack="text", test="shapes:position")
    assert done.evidence.data["test"]["data"] == "shapes:position"
    assert done.evidence.model_dump()["fidelity"]["positions"] == 5 * done.evidence.data["test"]["rows"]


def test_a_whole_model_is_judged_over_what_its_decoder_writes_and_the_steps_take_its_plans(
    lamella: Any, tmp_path: Path
) -> None:
    for part in shapes_vlm("patch_bart", encoder_layers=2, decoder_layers=2):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    done = run("mue", tmp_path / "model", "shapes:caption", rows=5, steps=1, batch=2, accumulate=1, out=out)
    assert done.evidence.data["test"]["split"] == "test"
    assert done.evidence.model_dump()["fidelity"]["sequences"] == 64
    compared = lamella("eval", tmp_path / "model", out, "--rows", "3", "--test", "shapes:caption", "--json")
    assert compared.code == 0 and json.loads(compared.out)["data"]["test"]["rows"] == 3
    timed = lamella(
        "bench",
        out,
        out / "plan.json",
        "--batch",
        "1",
        "--tokens",
        "2",
        "--rounds",
        "1",
        "--text",
        "shapes:caption",
        "--json",
    )
    assert timed.code == 0 and len(json.loads(timed.out)["findings"]["timings"]) == 2
    applied = lamella("apply", out / "plan.json", out, "-o", tmp_path / "applied", "--form", "native")
    assert applied.code == 0 and type(open_processor(tmp_path / "applied")).__name__ == "LlavaProcessor"


def test_it_is_given_text_where_text_is_named_or_the_model_reads_no_images(installed: None, vlm: Path) -> None:
    done = run("without-one", NANO, "pydoc", sequences=2, length=16)
    assert done.result.findings["data"] == "Text" and done.evidence.data["test"]["data"] == "stdlib"
    done = run("without-one", vlm, "pydoc", sequences=2, length=16, of_stack="text")
    assert done.result.findings["data"] == "Text"


def test_a_plan_is_made_for_one_stack_on_rows_of_images(vlm: Path, tmp_path: Path, lamella: Any) -> None:
    told = ("--calibration", "shapes:colour", "--rows", "4", "-o")
    assert lamella("plan", "shortgpt", vlm, *told, tmp_path / "a").code == 0
    left_out = Plan.read(tmp_path / "a" / "plan.json")  # it works on decoders, and the other stack is none
    assert lamella("plan", "shortgpt", vlm, "--stack", "text", *told, tmp_path / "b").code == 0
    plan = Plan.read(tmp_path / "b" / "plan.json")
    assert left_out.model.stack == "text" and left_out.digest == plan.digest
    assert "works on decoders" in lamella("plan", "shortgpt", vlm, "--stack", "vision", *told, tmp_path / "c").refused()
    assert plan.drop and plan.provenance["inputs"]["calibration"]["images"] == 4


def test_rows_for_a_model_that_reads_no_images_are_refused(installed: None) -> None:
    with pytest.raises(LamellaError) as error:
        run("without-one", NANO, "shapes:colour", rows=3)
    assert "\n" not in str(error.value)


def test_its_help_has_the_settings_of_both(installed: None, lamella: Any) -> None:
    outcome = lamella("run", "without-one", "--help")
    said = " ".join(outcome.out.replace("│", " ").split())
    assert outcome.code == 0 and all(option in said for option in ("--sequences", "--rows", "--pixels", "--stack"))


SHAPES: dict[str, Any] = {"speedup": 1.1, "calibration": "shapes:colour", "heal": None}


@pytest.mark.slow
def test_a_model_of_images_is_cut_by_what_it_makes_of_them(vlm: Path, tmp_path: Path, measured_memory: None) -> None:
    out = tmp_path / "out"
    run("compress", vlm, out=out, method="shortgpt", **SHAPES)
    evidence = json.loads((out / "evidence.json").read_text())
    planned, tested = (evidence["data"][role] for role in ("calibration", "test"))
    assert (planned["rows"], planned["images"], planned["split"]) == (16, 16, "calibration")
    assert (tested["rows"], tested["split"]) == (64, "test")
    assert evidence["chosen"]["fidelity"]["sequences"] == 64
    assert evidence["chosen"]["drop"] and evidence["base"]["memory"]["peak_bytes"] > 0
    assert type(open_processor(out)).__name__ == "LlavaProcessor"
    assert "64 rows with 64 images" in (out / "README.md").read_text()
    assert "64 rows with 64 images" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_model_of_images_is_healed_on_rows_like_those_that_planned(vlm: Path, tmp_path: Path) -> None:
    given = SHAPES | {"heal": Heal(steps=30)}
    healing = run("compress", vlm, out=tmp_path / "out", method="shortgpt", **given).evidence.healing
    assert (healing["method"], healing["data"]["training"]["rows"]) == ("distillation", 256)
    assert healing["data"]["training"]["split"] == "calibration" and healing["fidelity"]["sequences"] == 64
    cut = json.loads((tmp_path / "out" / "evidence.json").read_text())["chosen"]["fidelity"]
    assert healing["fidelity"]["kl"]["mean"] < cut["kl"]["mean"]
    assert "healed" in (tmp_path / "out" / "report.html").read_text()
    assert type(open_processor(tmp_path / "out")).__name__ == "LlavaProcessor"


def dropped(vlm: Path) -> Plan:
    stack = open_stack(vlm, stack="text")
    return Plan(model=ModelReference.of(stack), drop=[f"{stack.prefix}layers.1"])


def test_healing_learns_what_the_whole_model_answers_about_images(vlm: Path, tmp_path: Path) -> None:
    given = {"train": "shapes:colour", "rows": 32, "steps": 20, "lr": 2e-3, "batch": 8}
    evidence = run("heal", vlm, plan=dropped(vlm), out=tmp_path / "healed", **given).evidence
    assert evidence.findings["recipe"] == "distillation"
    assert evidence.fidelity["kl"]["mean"] < evidence.before["kl"]["mean"]
    trained, tested = (evidence.data[role] for role in ("training", "test"))
    assert (trained["rows"], trained["split"]) == (32, "calibration")
    assert (tested["rows"], tested["split"]) == (64, "test")
    assert type(open_processor(tmp_path / "healed")).__name__ == "LlavaProcessor"


def test_a_model_of_images_that_is_healed_on_text_keeps_its_processor(vlm: Path, tmp_path: Path) -> None:
    given = {"train": "pydoc", "sequences": 4, "length": 16, "steps": 1, "batch": 2, "loss": "kd"}
    run("heal", vlm, plan=dropped(vlm), out=tmp_path / "healed", **given)
    assert type(open_processor(tmp_path / "healed")).__name__ == "LlavaProcessor"


def test_recipes_that_train_on_text_alone_refuse_images(vlm: Path, tmp_path: Path) -> None:
    given = {"plan": dropped(vlm), "train": "shapes", "rows": 8}
    with pytest.raises(LamellaError, match="continual-pretrain trains on text only, but images were given"):
        run("heal", vlm, **given, loss="ce", steps=1)
    with pytest.raises(LamellaError, match="no option 'replay'"):
        run("heal", vlm, **given, replay=0.1, minutes=1)
    stack, processing = open_stack(vlm, stack="text"), Processing(open_processor(vlm))
    reader = InputContext(lambda: processing.tokenizer, processing_opener=lambda: processing)
    rows = ImageText.open("shapes", reader, rows=4)
    how, work = Heal("recipe"), Work(tmp_path / "work")
    healed, said = heal_cut(stack, dropped(vlm), context_of(rows, 0), how, work, rows)
    assert healed is None and "trains on text only" in said["note"]  # a compression goes on without


@pytest.mark.parametrize("method, options", [("unified-skip", {}), ("lora-drop", {"keep_first": 1})])
def test_methods_that_skip_tune_on_images(vlm: Path, method: str, options: dict[str, int]) -> None:
    series = run(method, vlm, of_stack="text", **options).result
    rows = {"rows": 4, "of_stack": "text", "batch": 2, "accumulate": 1}
    done = run(method, vlm, series[-1], "shapes:colour", command="tune", steps=2, **rows)
    assert done.result.log.train and done.evidence.provenance["inputs"]["train"]["images"] == 4


def test_hidden_states_that_unified_skip_compares_have_read_the_image(vlm: Path) -> None:
    model, processing = open_stack(vlm, stack="text").model, Processing(open_processor(vlm))
    rows = ImageText.open(
        "shapes:colour", InputContext(processing_opener=lambda: processing, opener=lambda: None), rows=2
    )
    batch = processing.batch(rows[:])
    ours = unified_skip._hidden_states(model, batch)
    theirs = model(**read_inputs(model, batch), output_hidden_states=True, use_cache=False).hidden_states
    assert len(ours) == len(theirs) == 4 and all(torch.equal(*each) for each in zip(ours, theirs, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl_moe"])
def test_all_planners_race_over_images(kind: str, tmp_path: Path) -> None:
    for part in shapes_vlm(kind, num_hidden_layers=6):
        part.save_pretrained(tmp_path / "whole")
    evidence = run("compress", tmp_path / "whole", method="all", **SHAPES).evidence.model_dump()
    assert {"finercut", "portfolio", "shortgpt", "sleb", "window", "random"} <= {
        curve["method"] for curve in evidence["curves"]
    }
    assert all(point["fidelity"]["sequences"] == 64 for curve in evidence["curves"] for point in curve["points"])
