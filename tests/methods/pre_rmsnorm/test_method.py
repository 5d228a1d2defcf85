"""pre-rmsnorm as a command: what it reports, writes and refuses, and that plain transformers loads the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pre_ln import FAMILIES, built, inputs
from safetensors.torch import save_file
from torch import nn

import lamella
from lamella.errors import ExportError, LamellaError, MethodError, PlanError
from lamella.methods.pre_rmsnorm import checking, pre_rmsnorm
from lamella.methods.pre_rmsnorm.checking import output
from lamella.plan import ModelReference, Plan, compose
from lamella.plan.export import export, natural_form
from lamella.stack import open_model
from lamella.zoo.nano import nano

CRMS = {"norm": "crms", "tied": "untie"}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_reports_what_it_did_and_how_equal_the_result_is(name: str) -> None:
    model = built(name)
    done = pre_rmsnorm(model)
    findings = done.findings
    assert 0 < findings["error"]["float64"]["largest"] <= 1e-10 * findings["error"]["float64"]["size"]
    scales = 2 * 3 * 32 if name.startswith("dinov2") or name == "beit" else 0  # each layer's two vectors
    assert findings["parameters"]["delta"] == -scales and findings["tied"]["before"] == findings["tied"]["after"]
    assert all(each < 1e-12 for layers in findings["mean"]["after"].values() for each in layers)
    layers = sum(len(stack) for stack in model.stacks.values())
    assert len(findings["entrances"]) == (
        name in ("bloom", "clip", "whisper")
    )  # what is not linear makes their streams
    shared = name in ("gptj", "phi", "phi_qk", "falcon", "falcon_one_norm")  # by attention and MLP
    assert len(findings["norms"]) > (1 if shared else 2) * layers and len(findings["recentred"]) >= 2 * layers


def test_untying_is_reported_with_its_cost() -> None:
    done = pre_rmsnorm(built("gpt2"), **CRMS)
    assert done.findings["tied"] == {"before": True, "after": False}
    assert any("which costs 4,096 parameters" in note for note in done.notes)


@pytest.mark.parametrize("options", [{}, {"fold": "bias"}, CRMS], ids=["rms", "bias", "crms"])
@pytest.mark.parametrize("name", FAMILIES)
def test_its_checkpoint_is_opened_without_running_the_file_beside_it(name: str, options: dict, tmp_path: Path) -> None:
    model, given = built(name), inputs(name)
    done = pre_rmsnorm(model, **options)
    out = export(model, done.plan, tmp_path / "out", form="native")
    (out / "modeling_lamella.py").write_text("raise SystemExit('executed')")
    opened = lamella.load(out, dtype=torch.float64)
    with torch.no_grad():
        found, expected = output(opened.model, given), output(done.view, given)
    # mapped weights lie otherwise in memory, so products may round otherwise
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


WRITTEN = {
    f"{name}-{norm}": (name, options)
    for name in ("gpt2", "bloom", "falcon_serial", "vit", "beit", "clip", "dinov2_with_registers", "whisper")
    for norm, options in (("rms", {}), ("crms", CRMS))
}
ALONE = """
import json, sys
sys.modules["lamella"] = None  # importing it would fail
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).glob("*/config.json")):
    folder = folder.parent
    given = load_file(folder.with_suffix(".safetensors"))
    expected = given.pop("expected")
    [kind] = set(json.loads((folder / "config.json").read_text())["auto_map"]) - {"AutoConfig"}
    kind = getattr(transformers, kind)
    model = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    with torch.no_grad():
        out = model(**given)
    found = out.logits if "logits" in out else out.pooler_output
    print(folder.name, float((found - expected).abs().max()), flush=True)
"""


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The largest difference of each checkpoint in plain transformers; one process opens them all."""
    folder = tmp_path_factory.mktemp("alone")
    for case, (name, options) in WRITTEN.items():
        model, given = built(name), inputs(name)
        export(model, pre_rmsnorm(model, **options).plan, folder / case, form="native")
        with torch.no_grad():
            expected = output(model.model, given)
        save_file(given | {"expected": expected.contiguous()}, folder / f"{case}.safetensors")
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", ALONE, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return {case: float(difference) for case, difference in map(str.split, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN)
def test_plain_transformers_loads_it_where_there_is_no_lamella(case: str, differences: dict[str, float]) -> None:
    assert differences[case] < 1e-9


def test_a_plan_that_rewrites_is_read_back_and_says_nothing_else(tmp_path: Path) -> None:
    model = built("gpt2")
    plan = pre_rmsnorm(model).plan
    plan.write(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    assert again.rewrite == plan.rewrite and again.digest == plan.digest
    assert plan.digest != Plan(model=plan.model).digest
    assert natural_form(plan, model) == "native"
    with pytest.raises(ValueError, match="rewrite: such a plan can do nothing else"):
        Plan(model=plan.model, rewrite=plan.rewrite, drop=["layers.0"])
    with pytest.raises(PlanError, match="plain: no config can describe a model rewritten by pre-rmsnorm"):
        export(model, plan, tmp_path / "out")
    with pytest.raises(PlanError, match="rewrite"):
        compose(plan, Plan(model=plan.model, drop=["layers.0"]))


def test_plans_on_a_rewritten_model_are_refused_with_the_fix(tmp_path: Path) -> None:
    model = built("gpt2")
    again = lamella.load(export(model, pre_rmsnorm(model).plan, tmp_path / "rms", form="native"))
    reference = ModelReference.of(again)
    for drop in ("layers.1", "layers.1.mlp"):
        with pytest.raises(PlanError, match="was rewritten by pre-rmsnorm, so no further plan can be exported"):
            export(again, Plan(model=reference, drop=[drop]), tmp_path / "out", form="portable")
    with pytest.raises(ValueError, match="or was rewritten; plan for the model that it was made from"):
        Plan(model=reference, width={"hidden.channels": {"keep": list(range(16))}})
    assert "has layers that no config can express" in refused(again)


def test_whole_layers_leave_before_and_single_sublayers_do_not(tmp_path: Path) -> None:
    model, given = built("gpt2"), inputs("gpt2")
    whole = export(model, Plan(model=ModelReference.of(model), drop=["layers.1"]), tmp_path / "whole")
    small = lamella.load(whole, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(output(pre_rmsnorm(small).view, given), output(small.model, given), atol=1e-10)
    part = Plan(model=ModelReference.of(model), drop=["layers.1.mlp"])
    cut = lamella.load(export(model, part, tmp_path / "part", form="native"), dtype=torch.float64)
    assert "has layers that no config can express" in refused(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "no-such"}, "unknown method"),
        ({"params": {"norm": "batch"}}, "norm"),
        ({"params": {"nonsense": 1}}, "nonsense"),
        ({"name": "../ssd"}, "lamella"),
    ],
)
def test_a_config_that_asks_for_what_no_export_says_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    model = built("gpt2")
    out = export(model, pre_rmsnorm(model).plan, tmp_path / "out", form="native")
    config = json.loads((out / "config.json").read_text())
    config["lamella"]["rewrite"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(LamellaError, match=message) as found:
        lamella.load(out)
    assert "\n" not in str(found.value)


def refused(model: object, **options: str) -> str:
    with pytest.raises(MethodError) as found:
        pre_rmsnorm(model if hasattr(model, "stacks") else open_model(model), **options)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_post_ln_models_are_refused() -> None:
    assert "bart is Post-LN" in refused(open_model(nano("bart"), name="bart"))
    assert "Pre-LN" in refused(open_model(nano("opt_post_norm"), name="opt"))


def test_models_whose_residual_stream_has_a_mean_that_counts_are_refused() -> None:
    assert "depend on the mean of the residual stream" in refused(open_model(nano("t5"), name="t5"))
    assert "Pre-LN" in refused(open_model(nano("llama"), name="llama"))


def test_models_of_which_nothing_is_known_are_refused() -> None:
    assert "the architecture table has no wiring of mbart models" in refused(open_model(nano("mbart")))
    for name in ("llava", "qwen2_vl"):
        assert "takes images with text" in refused(open_model(nano(name)))


def test_a_tied_head_that_would_be_scaled_twice_is_refused_with_the_fix() -> None:
    assert "a tied head would be scaled twice" in refused(built("gpt2"), norm="crms")
    assert "--tied untie" in refused(built("gpt2"), fold="affine")
    assert "--fold affine" in refused(built("gpt_neox"), norm="crms", fold="nothing")


def test_a_model_in_int8_is_refused() -> None:
    model = built("gpt2")
    model.model.lm_head.weight = nn.Parameter(torch.ones(128, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ExportError, match="has integer weights: cut the original, and quantise the result"):
        pre_rmsnorm(model)


def test_a_hook_that_writes_the_residual_stream_behind_our_back_is_found_and_nothing_is_made() -> None:
    model = built("gpt2")
    model.model.transformer.h[1].mlp.register_forward_hook(lambda module, given, out: out + given[0].exp())
    assert "differs by" in refused(model)


@pytest.mark.parametrize("opened", [True, False], ids=["a model in memory", "a folder"])
def test_it_needs_the_model_alone_and_no_tokenizer(opened: bool, tmp_path: Path) -> None:
    model = nano("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    given = open_model(model, name="it") if opened else tmp_path / "gpt2"
    done = lamella.run("pre-rmsnorm", given, out=tmp_path / "out")
    assert done.evidence.fidelity is None
    assert [note for note in done.evidence.notes if "was not compared with the original on a text" in note]
    assert done.summary.verdict in (tmp_path / "out" / "README.md").read_text()


def test_a_test_text_without_a_tokenizer_is_refused_before_anything_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewrites(*_: object, **__: object) -> None:
        raise AssertionError("the model is rewritten")

    nano("gpt2").save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr("lamella.runner._call", rewrites)
    with pytest.raises(LamellaError, match="tokenizer") as error:
        lamella.run("pre-rmsnorm", tmp_path / "gpt2", test="stdlib")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_large_model_is_checked_layer_by_layer_with_the_same_findings(name: str, monkeypatch: Any) -> None:
    single = open_model(built(name).model.float(), name=name)
    whole = pre_rmsnorm(single).findings
    monkeypatch.setattr(checking, "LARGEST", 0)
    found = pre_rmsnorm(single).findings
    error = found["error"].pop("float64")
    assert 0 < error["largest"] <= 1e-10 * error["size"] and whole["error"].pop("float64")
    assert found == whole


@pytest.mark.parametrize("layer", [0, 2])
def test_a_hook_in_any_layer_of_a_large_model_is_found(layer: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(checking, "LARGEST", 0)
    model = built("gpt2")
    model.model.transformer.h[layer].mlp.register_forward_hook(lambda module, given, out: out + given[0].exp())
    assert "differs by" in refused(model)
