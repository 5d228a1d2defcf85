"""int8: the integers and the format on disk are torchao's, and the outputs equal torchao's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lamella
from lamella.errors import CheckpointError, ExportError, LamellaError
from lamella.plan import ModelReference, Plan
from lamella.plan.export import export
from lamella.plan.quantize import Int8Linear, int8_copy
from lamella.plan.quantize.int8 import in_integers
from lamella.zoo import nano

from .conftest import Saved, findings, quantize

torchao = pytest.importorskip("torchao.quantization")
IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def test_integers_and_scales_are_those_of_torchao() -> None:
    linear = nn.Linear(96, 40, bias=False)
    linear.weight.data[3] = 0  # a row of nothing
    weight, scale = in_integers(linear.weight)
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    assert torch.equal(weight, linear.weight.qdata)
    torch.testing.assert_close(scale, linear.weight.scale.flatten(), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_linear_map_of_integers_is_the_one_that_is_written_out(rows: int) -> None:
    linear = nn.Linear(64, 48)
    weight, scale = in_integers(linear.weight)
    ours = Int8Linear(weight, scale.bfloat16(), nn.Parameter(linear.bias.detach().bfloat16()))
    x = torch.randn(rows, 2, 64)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).T + linear.bias.double()
    given = ours(x.bfloat16())
    assert given.dtype == torch.bfloat16 and given.shape == (rows, 2, 48)
    torch.testing.assert_close(given.double(), expected, rtol=0.02, atol=0.02)  # 8 bits of mantissa


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_folder_opens_here_and_in_transformers_with_the_same_logits(
    family: str, saved: Saved, tmp_path: Path
) -> None:
    folder = saved(family)
    report = findings(quantize(folder, tmp_path / "int8", "int8"))
    opened = lamella.load(tmp_path / "int8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        original = lamella.open(folder).model(IDS).logits.log_softmax(-1)
        for ids in (IDS, IDS[:, :3]):  # many rows, and so few that the kernel for integers takes them
            ours, others = opened.model(ids).logits.float(), theirs(ids).logits.float()
            torch.testing.assert_close(ours.log_softmax(-1), others.log_softmax(-1), rtol=0.05, atol=0.1)
        kl = (original.exp() * (original - opened.model(IDS).logits.float().log_softmax(-1))).sum(-1).mean()
    assert 0 < kl < 0.01
    assert report["after"] < 0.5 * report["before"]
    assert not list((tmp_path / "int8").glob("*.bin")) + list((tmp_path / "int8").glob("*.pt"))


def test_a_folder_opens_in_other_precisions_and_generates(saved: Saved, tmp_path: Path) -> None:
    quantize(saved(), tmp_path / "int8", "int8")
    single = lamella.open(tmp_path / "int8", dtype=torch.float32).model
    half = lamella.open(tmp_path / "int8").model
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(single(IDS).logits, half(IDS).logits.float(), rtol=0.1, atol=0.2)
        written = half.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4)
    assert written.shape == (2, 28)


def test_a_copy_leaves_the_model_and_its_head_alone() -> None:
    model = nano("llama")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    copy = int8_copy(model)
    linear = [name for name, each in model.named_modules() if type(each) is nn.Linear]
    integers = [name for name, each in copy.named_modules() if isinstance(each, Int8Linear)]
    assert set(linear) - set(integers) == {"lm_head"}
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_view_of_fewer_layers_is_copied_as_it_runs() -> None:
    stack = lamella.open(nano("llama"))
    view = lamella.apply(stack, Plan(model=ModelReference.of(stack), drop=["layers.1"]))
    copy, ids = int8_copy(view), IDS % 120
    with torch.no_grad():
        cut, ours, whole = (model(ids).logits.float() for model in (view, copy, stack.model))
    assert (ours - cut).abs().mean() < 0.2 * (whole - cut).abs().mean()


def test_what_cannot_be_quantised_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = saved()
    stack = lamella.open(folder)
    sublayers = Plan(model=ModelReference.of(stack), drop=["layers.1.mlp"])
    with pytest.raises(ExportError, match="is a native export"):
        quantize(export(stack, sublayers, tmp_path / "native", form="native"), tmp_path / "out", "int8")
    quantize(folder, tmp_path / "int8", "int8")
    for kind in ("int8", "q8_0"):
        with pytest.raises(CheckpointError, match="is already quantised"):
            quantize(tmp_path / "int8", tmp_path / "out", kind)
    with pytest.raises(ExportError, match="has integer weights: cut the original"):
        opened = lamella.open(tmp_path / "int8")
        export(opened, Plan(model=ModelReference.of(opened), drop=["layers.1"]), tmp_path / "out")
    with pytest.raises(ExportError, match="exists"):
        quantize(folder, tmp_path / "int8", "int8")
    assert not (tmp_path / "out").exists()


def test_without_torchao_one_line_says_how_to_get_it(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr("lamella.extras.import_module", missing)
    with pytest.raises(LamellaError, match=r"a model in int8 needs torchao: pip install 'lamella\[quantize\]'"):
        quantize(saved(), tmp_path / "int8", "int8")
