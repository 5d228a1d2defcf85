"""Rate-distortion curves: one layer pruned at a time, the network's output compared, the model left alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from lamella.errors import CalibrationError, MethodError, NumericsError
from lamella.methods.rd_prune import Curves, joint_distortion, magnitude_order, rate_distortion, zero_at
from lamella.methods.rd_prune.probes import AnyModel, Decoder
from lamella.stack import Stack
from lamella.zoo.nano import NANO, nano

CAUSAL = [name for name in NANO if name != "vit"]
IDS = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(0))


def convnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip
    model(torch.randn(8, 1, 8, 8))  # so that the statistics are not those of the start
    return model


def images(count: int = 20) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(model: nn.Module, name: str, pruned: int, inputs: Tensor) -> Tensor:
    """The distortion of each input in float64, on a deep copy whose smallest weights are set to zero one by one."""
    whole = copy.deepcopy(model).double().eval()
    cut = copy.deepcopy(whole)
    weight = dict(cut.named_parameters())[name].data.view(-1)
    for place in sorted(range(len(weight)), key=lambda k: (abs(float(weight[k])), k))[:pruned]:
        weight[place] = 0
    given = inputs if inputs.dtype == torch.int64 else inputs.double()
    outputs = [getattr(m(given), "logits", m(given)) for m in (whole, cut)]
    return (outputs[0] - outputs[1]).square().flatten(1).mean(1)


def test_curves_are_the_mean_and_the_worst_squared_difference_of_the_output_layer_by_layer() -> None:
    model, inputs = convnet(), images()
    curves = rate_distortion(model, inputs, grid=5)
    assert list(curves.layers) == ["0.weight", "3.weight", "6.weight"]
    for row, (name, curve) in enumerate(curves.layers.items()):
        for q in range(6):
            expected = by_hand(model, name, curve.size * q // 5, inputs)
            assert curves.pruned[row, q] == curve.size * q // 5
            assert curve.mean[q] == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-12)
            assert curve.worst[q] == pytest.approx(float(expected.max()), rel=1e-4, abs=1e-12)
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(inputs.double())
    assert curves.silent.mean == pytest.approx(float(logits.square().mean()), rel=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder_measured_from_its_sublayers_on_tells_what_whole_runs_tell(name: str) -> None:
    model = nano(name)
    fast, slow = rate_distortion(Stack(model), IDS, grid=3), rate_distortion(model, IDS, grid=3)
    assert list(fast.layers) == list(slow.layers)
    for reduce in ("mean", "worst"):
        np.testing.assert_allclose(fast.distortion(reduce), slow.distortion(reduce), rtol=1e-4, atol=1e-10)
    assert fast.silent.worst == pytest.approx(slow.silent.worst, rel=1e-5)


def test_a_decoder_s_curve_is_that_of_float64() -> None:
    model = nano("llama")
    curves = rate_distortion(Stack(model), IDS, grid=4)
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"):
        curve = curves.layers[name]
        expected = by_hand(model, name, curve.size * 3 // 4, IDS)
        assert curve.worst[3] == pytest.approx(float(expected.max()), rel=1e-4)


def test_soft_capped_logits_are_compared_after_the_cap() -> None:
    model = nano("gemma3_text", final_logit_softcapping=1.0)
    fast, slow = rate_distortion(Stack(model), IDS, grid=2), rate_distortion(model, IDS, grid=2)
    np.testing.assert_allclose(fast.distortion("mean"), slow.distortion("mean"), rtol=1e-4, atol=1e-10)
    assert fast.silent.mean <= 1


def test_projections_around_the_stack_are_measured_too() -> None:
    model = nano("opt", word_embed_proj_dim=16)
    fast, slow = rate_distortion(Stack(model), IDS, grid=2), rate_distortion(model, IDS, grid=2)
    assert {"model.decoder.project_in.weight", "model.decoder.project_out.weight"} <= set(fast.layers)
    np.testing.assert_allclose(fast.distortion("mean"), slow.distortion("mean"), rtol=1e-4, atol=1e-10)


def test_padding_does_not_count() -> None:
    stack = Stack(nano("llama"))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    rows = [rate_distortion(stack, IDS[:1, 4:], grid=2), rate_distortion(stack, IDS[1:], grid=2)]
    both = rate_distortion(stack, {"input_ids": IDS, "attention_mask": mask}, grid=2)
    expected = (rows[0].distortion("mean") + 2 * rows[1].distortion("mean")) / 3
    np.testing.assert_allclose(both.distortion("mean"), expected, rtol=1e-3, atol=1e-9)
    worst = np.maximum(rows[0].distortion("worst"), rows[1].distortion("worst"))
    np.testing.assert_allclose(both.distortion("worst"), worst, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["module", "stack"])
def test_the_model_is_the_same_bitwise_afterwards_also_when_measuring_fails(kind: str) -> None:
    model: nn.Module = convnet() if kind == "module" else nano("qwen3_moe")
    given = images() if kind == "module" else IDS
    measured = model if kind == "module" else Stack(model)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    mode = model.training

    def unchanged() -> bool:
        now = model.state_dict(keep_vars=True)
        return all(now[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())

    rate_distortion(measured, given, grid=3)
    assert unchanged() and model.training == mode
    assert not any(module._forward_hooks for module in model.modules())
    if kind == "module":
        calls = iter([1.0] * 3 + [float("nan")])
        with pytest.raises(NumericsError, match=r"0\.weight pruned") as error:
            rate_distortion(model, given, grid=3, output=lambda out: out * next(calls))
        assert "\n" not in str(error.value) and unchanged()


def test_what_is_zero_already_costs_nothing_and_is_not_run() -> None:
    model = convnet()
    with torch.no_grad():
        model[6].weight.copy_(zero_at(model[6].weight, magnitude_order(model[6].weight)[:135]))
    curve = rate_distortion(model, images(), grid=4).layers["6.weight"]
    assert curve.zeros == 135 and curve.mean[:3] == [0.0, 0.0, 0.0] and curve.mean[3] > 0


def test_multiply_adds_are_counted_by_the_positions_of_a_convolution() -> None:
    curves = rate_distortion(convnet(), images(), grid=1)
    assert [curve.uses for curve in curves.layers.values()] == [64, 9, 1]
    model = nn.ConvTranspose2d(2, 3, 2, stride=2)
    assert rate_distortion(model, torch.randn(2, 2, 4, 4), grid=1).layers["weight"].uses == 16
    tokens = nn.Linear(4, 3)
    assert rate_distortion(tokens, torch.randn(2, 7, 4), grid=1).layers["weight"].uses == 7
    experts = rate_distortion(Stack(nano("olmoe")), IDS, grid=1).layers
    uses = {name.rsplit(".", 1)[-1]: curve.uses for name, curve in experts.items()}
    assert uses["gate_up_proj"] == 0.5 and uses["weight"] == 1  # 2 experts of 4


def test_a_layer_without_a_way_around_it_severs_the_network_and_a_residual_one_does_not() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x + self.inner(x))

    chain = rate_distortion(convnet(), images(), grid=4).layers
    assert all(curve.severs for curve in chain.values())
    around = rate_distortion(Residual(), torch.randn(9, 6), grid=4).layers
    assert not around["inner.weight"].severs and around["outer.weight"].severs


def test_all_layers_together_are_compared_by_the_joint_distortion() -> None:
    for model, given in ((convnet(), images()), (nano("gpt_neox"), IDS)):
        measured = Stack(model) if given is IDS else model
        names = list(rate_distortion(measured, given, grid=1).layers)
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(0)
        masks = {name: torch.rand(parameters[name].shape, generator=generator) > 0.3 for name in names}
        cut = copy.deepcopy(model).eval()
        for name, keep in masks.items():
            dict(cut.named_parameters())[name].data *= keep
        whole = copy.deepcopy(model).eval()
        with torch.no_grad():
            outputs = [getattr(m(given), "logits", m(given)).double() for m in (whole, cut)]
        expected = (outputs[0] - outputs[1]).square().flatten(1).mean(1)
        found = joint_distortion(measured, masks, given)
        assert found.mean == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found.worst == pytest.approx(float(expected.max()), rel=1e-4)


def test_a_vision_transformer_and_torch_s_own_encoder_are_measured() -> None:
    vit = nano("vit")
    curves = rate_distortion(Stack(vit), {"pixel_values": torch.randn(3, 3, 16, 16)}, grid=2)
    assert len(curves.layers) == 4 * 6 + 2 and (curves.distortion("mean")[:, 1:] > 0).all()
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    curves = rate_distortion(encoder, torch.randn(3, 5, 8), grid=2)
    assert len(curves.layers) == 8 and (curves.distortion("mean")[:, 1:] > 0).all()


def test_a_timm_vision_transformer_is_measured() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=7
    )
    nn.init.normal_(model.head.weight)
    inputs = torch.randn(4, 3, 32, 32)
    curves = rate_distortion(model, inputs, grid=4)
    assert len(curves.layers) == 1 + 4 * 2 + 1 and (curves.distortion("mean")[:, -1] > 0).all()
    assert curves.layers["patch_embed.proj.weight"].uses == 16
    name = "blocks.1.mlp.fc1.weight"
    expected = by_hand(model, name, curves.layers[name].size // 2, inputs)
    assert curves.layers[name].mean[2] == pytest.approx(float(expected.mean()), rel=1e-3)


@pytest.mark.parametrize("kind", ["module", "stack"])
def test_an_interrupted_measurement_resumes_and_a_complete_one_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = convnet() if kind == "module" else nano("llama")
    measured, given = (model, images()) if kind == "module" else (Stack(model), IDS)
    probe = AnyModel if kind == "module" else Decoder
    whole = rate_distortion(measured, given, grid=3, path=tmp_path / "whole.jsonl")
    asked: list[str] = []
    plain = probe.distortion

    def counting(self, changed):
        asked.extend(changed)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return plain(self, changed)

    monkeypatch.setattr(probe, "distortion", counting)
    stop, path = 5, tmp_path / "curves.jsonl"
    with pytest.raises(KeyboardInterrupt):
        rate_distortion(measured, given, grid=3, path=path)
    with pytest.raises(MethodError, match="holds no complete curves"):
        Curves.read(path)
    with path.open("a") as file:
        file.write('{"layer": "cut sho')
    done, stop = asked.copy(), -1
    asked.clear()
    assert rate_distortion(measured, given, grid=3, path=path) == whole
    assert done[0] not in asked and len(done) - 2 + len(asked) == 3 * len(whole.layers)
    asked.clear()
    assert rate_distortion(measured, given, grid=3, path=path) == Curves.read(path) == whole and not asked


def test_a_file_of_other_curves_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    curves = rate_distortion(convnet(), images(), grid=2, path=path)
    others = {
        "another model": (nn.Linear(3, 2), torch.randn(2, 3), 2),
        "other weights": (convnet(seed=1), images(), 2),
        "other calibration data": (convnet(), images(19), 2),
        "a grid of 2, not 3": (convnet(), images(), 3),
    }
    for message, (model, inputs, grid) in others.items():
        with pytest.raises(MethodError, match=f"holds the curves of {message}") as error:
            rate_distortion(model, inputs, grid=grid, path=path)
        assert "\n" not in str(error.value)
    with pytest.raises(MethodError, match="holds the curves of the logits, not ") as error:
        rate_distortion(convnet(), images(), grid=2, path=path, output=lambda out: out)
    assert "\n" not in str(error.value)
    curves.check_model(convnet())
    with pytest.raises(MethodError, match="other weights"):
        curves.check_model(convnet(seed=1))
    for text in ("", "{}", "not json", json.dumps({"schema": "lamella.plan/2"})):
        path.write_text(text)
        with pytest.raises(MethodError, match=r"is not a file of rate-distortion curves") as error:
            rate_distortion(convnet(), images(), grid=2, path=path)
        assert "\n" not in str(error.value)


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.weight, float("nan"))
    cases = [
        (MethodError, "nothing to prune", (nn.LayerNorm(3), torch.randn(2, 3)), {}),
        (MethodError, "grid 0", (convnet(), images()), {"grid": 0}),
        (CalibrationError, "at least 1", (convnet(), images(0)), {}),
        (CalibrationError, "the same length", (convnet(), {"a": images(2), "b": images(3)}), {}),
        (CalibrationError, "give more text", (Stack(nano("llama")), IDS[:, :1]), {}),
        (NumericsError, "non-finite output", (broken, torch.randn(2, 3)), {}),
    ]
    for kind, message, given, options in cases:
        with pytest.raises(kind, match=message) as error:
            rate_distortion(*given, **options)
        assert "\n" not in str(error.value)
