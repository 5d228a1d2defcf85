"""Untrusted folders and plans: no code in them is executed, and no name in them leads out of their folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lamella
from lamella.errors import ArchitectureError, CheckpointError, PlanError
from lamella.plan import (
    ModelReference,
    ModuleReference,
    Plan,
    PlanSeries,
    Point,
    PolicyReference,
    WeightEdit,
    checkpoint,
    mask_edit,
)
from lamella.plan.export import export, export_out_of_core
from lamella.stack import Stack
from lamella.zoo import nano, open_stack, open_tokenizer

NANO_LLAMA = Path(__file__).parents[1] / "models" / "nano-llama"
IDS = torch.arange(12).reshape(2, 6) + 3


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """The file that foreign code would write if it were executed."""
    return tmp_path / "witness"


def tampered(file: Path, witness: Path, old: str = "") -> None:
    file.write_text(f"open({str(witness)!r}, 'w').close()\n{old}")


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A native export of the nano Llama with its tokenizer and dropped sublayers."""
    stack = open_stack(NANO_LLAMA)
    plan = Plan(model=ModelReference.of(stack), drop=["layers.1.mlp", "layers.3.attn"])
    return export(stack, plan, tmp_path / "native", form="native")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO_LLAMA, tmp_path / "model"))


def settings(folder: Path, name: str = "config.json", **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Code that lies in a checkpoint's folder.


def test_a_tampered_modelling_file_of_a_native_export_does_not_run(native: Path, witness: Path) -> None:
    before = lamella.load(native).model(IDS).logits
    file = native / "modeling_lamella.py"
    tampered(file, witness, file.read_text())
    opened = lamella.load(native)
    assert torch.equal(opened.model(IDS).logits, before)
    open_tokenizer(native)
    assert not witness.exists()


def test_a_native_export_without_its_modelling_file_opens(native: Path) -> None:
    before = lamella.load(native).model(IDS).logits
    (native / "modeling_lamella.py").unlink()
    assert torch.equal(lamella.load(native).model(IDS).logits, before)


@pytest.mark.parametrize("said", [{"lamella": {}}, {"lamella": {"form": "native", "plan": "plan.json"}}, {}])
@pytest.mark.parametrize("model_type", ["llama", "lamella_llama", "lamella_", "foreign"])
def test_code_of_a_folder_that_calls_itself_an_export_does_not_run(
    model: Path, witness: Path, said: dict[str, Any], model_type: str
) -> None:
    tampered(model / "evil.py", witness, "class Config: ...\nclass Model: ...\nclass Tokenizer: ...")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.Tokenizer"}
    settings(model, auto_map=auto, model_type=model_type, **said)
    for run in (lamella.load, lamella.open, open_tokenizer):
        try:
            run(model)
        except (ArchitectureError, CheckpointError, PlanError) as error:
            assert "\n" not in str(error)
    assert not witness.exists()


def test_code_of_a_tokenizer_does_not_run(model: Path, witness: Path) -> None:
    tampered(model / "evil.py", witness, "class Tokenizer: ...")
    settings(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    settings(model, "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    try:
        open_tokenizer(model)
    except (ArchitectureError, CheckpointError) as error:
        assert "\n" not in str(error)
    assert not witness.exists()


def test_a_model_with_code_of_its_own_says_what_to_do(model: Path, witness: Path) -> None:
    tampered(model / "evil.py", witness, "class Config: ...")
    settings(model, auto_map={"AutoConfig": "evil.Config"}, model_type="foreign")
    with pytest.raises(ArchitectureError, match=r"never runs.*lamella\.open\(model\)"):
        lamella.open(model)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_not_asked_for(model: Path, name: str) -> None:
    settings(model, **{name: "someone/kernel"})
    with pytest.raises(CheckpointError, match="asks to run code of 'someone/kernel'"):
        lamella.open(model)


def test_an_adapter_beside_a_model_does_not_lead_to_another_model(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    nano("llama").save_pretrained(other)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    with pytest.raises(CheckpointError, match="merge it with peft"):
        lamella.open(model)


# A native export that says what no export says.


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"form": "native"},
        {"form": "native", "plan": "../plan.json"},
        {"form": "native", "plan": "plan.json", "sublayers": [["attn", "mlp"]] * 6},
        {"form": "native", "sublayers": [["attn", "mlp"]] * 6, "width": {"channels": {"../x": 1}}},
        {"form": "native", "sublayers": [[]] * 6, "more": 1},
        {"form": "native", "sublayers": 5},
        {"form": "native", "sublayers": [["attn", "mlp"]]},
        {"form": "native", "sublayers": [["attn", "os.system"]] * 6},
        {"form": "native", "sublayers": [["attn", "attn"]] * 6},
        [],
        None,
    ],
)
def test_what_no_export_says_is_refused_in_one_line(native: Path, said: Any) -> None:
    settings(native, lamella=said)
    with pytest.raises(CheckpointError) as error:
        lamella.load(native)
    assert "\n" not in str(error.value) and str(native) in str(error.value)


def test_a_native_export_that_lacks_what_its_config_promises_is_refused(native: Path) -> None:
    settings(native, lamella={"form": "native", "sublayers": [["attn", "mlp"]] * 6})
    with pytest.raises(CheckpointError, match="lacks"):
        lamella.load(native)


def test_a_plain_model_is_not_taken_for_a_cut_one(model: Path) -> None:
    settings(model, lamella={"form": "native", "sublayers": [["mlp"]] * 6})
    with pytest.raises(CheckpointError, match="contradict"):
        lamella.load(model)


# Names of files inside documents.

OUTSIDE = ["../x.safetensors", "/etc/hostname", "a/b.safetensors", "..", ".", "", "a\\b", "..\\x", "x\0y"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("op", ["mask", "scale", "replace", "restore"])
def test_side_files_have_plain_names(name: str, op: str, tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    document = Plan(model=ModelReference.of(stack)).model_dump(by_alias=True)
    document["weights"] = [{"op": op, "sites": ["layers.1"], "file": name, "sha256": "0" * 64}]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(document))
    if op == "restore" and name.startswith("/"):  # another checkpoint: a folder, or refused when it is needed
        plan = Plan.read(file)
        with pytest.raises(PlanError, match="cannot be used"):
            lamella.apply(stack, plan)
        plan.write(tmp_path / "copy.json")
        assert not (tmp_path / "hostname").exists()
        return
    with pytest.raises(PlanError, match="not a plain file name"):
        Plan.read(file)
    with pytest.raises(ValueError, match="not a plain file name"):
        WeightEdit(op=op, sites=["layers.1"], file=name, sha256="0" * 64)


@pytest.mark.parametrize("name", [name for name in OUTSIDE])
def test_side_files_of_policies_and_of_series_have_plain_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        PolicyReference(name="first", file=name)
    document = PlanSeries(model=ModelReference.of(Stack(nano("llama"))), points=[Point()]).document.model_dump(
        by_alias=True
    )
    file = tmp_path / "series.json"
    for part, site in (("policies", "text"), ("modules", "layers.1")):
        changed = json.loads(json.dumps(document))
        changed["points"][0][part] = {site: {"name": "first", "file": name}}
        file.write_text(json.dumps(changed))
        with pytest.raises(PlanError, match="not a plain file name"):
            PlanSeries.read(file)


@pytest.mark.parametrize("name", ["../first", "/first", "first/../x", "First", "", "os.system", "lamella.x"])
def test_policies_and_networks_are_called_by_a_slug(name: str) -> None:
    for reference in (PolicyReference, ModuleReference):
        with pytest.raises(ValueError, match="name"):
            reference(name=name)


def test_a_shard_of_an_index_lies_in_its_folder(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    names = [tensor.name for tensor in checkpoint.read_header(outside)]
    for place in ("../outside.safetensors", str(outside)):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        plan = Plan(model=ModelReference.of(open_stack(NANO_LLAMA)))
        for run in (
            lambda: lamella.open(model),
            lambda: checkpoint.read(model),
            lambda plan=plan: export_out_of_core(model, plan, tmp_path / "out"),
        ):
            with pytest.raises(CheckpointError):
                run()
    assert not (tmp_path / "out").exists()


def test_a_written_plan_copies_nothing_but_what_lies_beside_it(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    edit = mask_edit(stack, {name: torch.rand(stack.model.get_parameter(name).shape) > 0.5}, tmp_path / "here")
    plan = Plan(model=ModelReference.of(stack), weights=[edit])
    plan.write(tmp_path / "there" / "plan.json")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"plan.json", edit.file}


def test_a_tensor_file_called_outside_does_not_reach_the_output(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    save_file({"x": torch.zeros(1)}, secret)
    stack = Stack(nano("llama"))
    reference = PolicyReference(name="first")
    object.__setattr__(reference, "file", "../secret.safetensors")  # past the check at reading
    reference._folder = tmp_path / "plans"
    plan = Plan(model=ModelReference.of(stack)).model_copy(update={"policies": {"text": reference}})
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match="not a plain file name"):
        plan.write(tmp_path / "out" / "plan.json")
    assert list((tmp_path / "out").iterdir()) == []
