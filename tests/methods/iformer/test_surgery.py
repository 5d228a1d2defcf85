"""A vision transformer with local paths: to begin with it is the fitted model, it costs what it says, it heals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.iformer.conftest import vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from lamella.data import Captioned, InputContext
from lamella.errors import BudgetError, CalibrationError, CheckpointError, MethodError, TrainingError
from lamella.files import Finished, Work
from lamella.methods.iformer import (
    Album,
    Geometry,
    Ramped,
    StageShape,
    Vision,
    apply_plan,
    compare,
    convolution_replacement,
    cost_of,
    costs_by_heads,
    fit_convolutions,
    heal,
    iformer,
    importance,
    measure_spectra,
    plan,
    train,
)
from lamella.methods.iformer.recipe import new_network
from lamella.train import Augmentation, TrainConfig

Pictures = tuple[Captioned, ...]
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no token before the grid": {"class_token": False, "global_pool": "avg"},
    "registers, no positions for them, LayerScale": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "norms of Q and K, no biases, a wide picture": {"qk_norm": True, "qkv_bias": False, "img_size": (16, 32)},
}


def by_definition(model: Any, kept: list[tuple[int, ...]], fit: list[Any], geometry: Geometry, x: torch.Tensor) -> Any:
    """The model whose missing heads are their fitted convolutions, summed shift by shift."""
    prefix, (height, width), k = geometry.prefix, geometry.grid, 3

    def attend(layer: int, attn: Any, tokens: torch.Tensor) -> torch.Tensor:
        q, k_, v = attn.qkv(tokens).reshape(*tokens.shape[:2], 3, geometry.heads, -1).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k_), v)
        d = v.shape[-1]
        for head in range(geometry.heads):
            if head in kept[layer]:
                continue
            weights = fit[layer].weights[head * d : (head + 1) * d].float()
            maps = v[:, head, prefix:].reshape(-1, height, width, d)
            padded = torch.zeros(len(maps), height + 2, width + 2, d)
            padded[:, 1:-1, 1:-1] = maps
            total = weights[:, -1].expand_as(maps)
            for tap in range(k * k):
                i, j = divmod(tap, k)
                total = total + weights[:, tap] * padded[:, i : i + height, j : j + width]
            first = fit[layer].prefix[:, head * d : (head + 1) * d].expand(len(maps), -1, -1)
            out[:, head] = torch.cat([first, total.flatten(1, 2)], 1)
        return attn.proj(out.transpose(1, 2).flatten(2))

    h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for layer, block in enumerate(model.blocks):
        h = h + block.ls1(attend(layer, block.attn, block.norm1(h)))
        h = h + block.ls2(block.mlp(block.norm2(h)))
    return model.forward_head(model.norm(h))


@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_model_with_its_fitted_convolutions(kind: str, images: Pictures) -> None:
    vision = Vision.of(vit(**KINDS[kind]))
    geometry = Geometry.of(vision.model)
    geometry.verify(vision.model, kind)
    found = fit_convolutions(vision, geometry, images, 3, 1e-3)
    kept = [(1,), (), (0, 1, 2)]
    before = {name: each.clone() for name, each in vision.model.state_dict().items()}
    built = apply_plan(vision, geometry, plan(geometry, kept, 0.5), found, 3, 0)
    x = vision.prepare(images[:3])
    with torch.no_grad():
        expected = by_definition(vision.model, kept, found, geometry, x)
        torch.testing.assert_close(built.model(x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(vision.model(x), expected, atol=1e-3)
    assert all(torch.equal(each, before[name]) for name, each in vision.model.state_dict().items())


def test_a_head_is_worth_what_the_output_moves_by_without_it(vision: Vision, images: Pictures) -> None:
    geometry = Geometry.of(vision.model)
    found = fit_convolutions(vision, geometry, images, 3, 1e-3)
    worth = importance(vision, geometry, images, convolution_replacement(found, geometry, 3), Finished(None, []))
    x = vision.prepare(images[-4:])  # a fifth of twenty
    with torch.no_grad():
        base = vision.model(x).softmax(-1)
        for layer, head in ((0, 2), (2, 0)):
            kept = [tuple(range(3))] * 3
            kept[layer] = tuple(each for each in range(3) if each != head)
            changed = by_definition(vision.model, kept, found, geometry, x).softmax(-1)
            expected = (base * (base / changed).log()).sum(-1).mean()
            assert worth[layer, head] == pytest.approx(float(expected), rel=1e-3)
    assert worth.shape == (3, 3) and worth.min() >= 0


def test_what_a_head_gives_to_the_class_token_and_the_fit_are_those_of_all_pictures(
    vision: Vision, images: Pictures
) -> None:
    geometry = Geometry.of(vision.model)
    [first, *_] = fit_convolutions(vision, geometry, images, 3, 1e-3)
    seen: list[torch.Tensor] = []
    attn = vision.model.blocks[0].attn
    hook = attn.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        vision.model(vision.prepare(images[:16]))
    hook.remove()
    torch.testing.assert_close(first.prefix, seen[0][:, :1].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_costs_are_those_that_torch_counts(vision: Vision, kept: int, images: Pictures) -> None:
    geometry = Geometry.of(vision.model)
    cost = costs_by_heads(vision, geometry, 3, 0.5)[kept]
    found = fit_convolutions(vision, geometry, images, 3, 1e-3)
    built = apply_plan(vision, geometry, plan(geometry, [tuple(range(kept))] * 3, 0.5), found, 3, 0)
    attn = built.model.blocks[0].attn
    assert cost == cost_of(attn, 17, 16)
    assert cost.parameters == sum(each.numel() for each in attn.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        attn(torch.randn(1, 17, 24))
    assert 2 * cost.flops == counter.get_total_flops()


def test_the_ramp_rises_keeps_to_its_share_and_is_read_back_from_its_folder(vision: Vision, tmp_path: Path) -> None:
    images = Album.open("textures", InputContext(), count=20)
    done = iformer(vision, images, share=0.9, work=Work(tmp_path / "work"))
    kept = [len(each.kept) for each in done.layers]
    assert kept == sorted(kept) and kept[0] < 3
    cost = done.findings["cost"]["flops"]
    assert (
        cost["after"] <= 0.9 * cost["before"]
        and cost["before"] == 3 * costs_by_heads(vision, done.geometry, 3, 0.5)[3].flops
    )
    folder = tmp_path / "out"
    folder.mkdir()
    done.write(folder)
    again = Ramped.read(folder)
    x = vision.prepare(images.items[:2])
    assert torch.equal(again.vision.model(x), done.vision.model(x)) and again.layers == done.layers
    opened = Vision.open(folder)
    assert torch.equal(opened.prepare(images.items[:2]), x) and torch.equal(opened.model(x), done.vision.model(x))
    result = measure_spectra(opened, images)["spectra"]
    assert list(result[0]) == ["layer", "mixer", "conv", "attention"]


@pytest.mark.slow
def test_healing_brings_it_nearer_and_trains_every_new_part(vision: Vision, tmp_path: Path) -> None:
    images = Album.open("textures", InputContext(), count=40)
    ramped = iformer(vision, images, share=0.8)
    before = {name: each.clone() for name, each in ramped.vision.model.state_dict().items()}
    config = TrainConfig(steps=20, lr=5e-3, batch=16, log_every=4)
    healed = heal(vision, ramped, images, config=config, work=Work(tmp_path / "work"))
    far, near = (compare(vision, each.vision, images.items, 20)["kl"] for each in (ramped, healed))
    assert near < 0.7 * far and healed.findings["loss"][-1] < healed.findings["loss"][0]
    assert healed.findings["before"] == ramped.findings["judged"]
    after = healed.vision.model.state_dict()
    assert all(not torch.equal(after[name], each) for name, each in before.items())
    assert all(torch.equal(each, before[name]) for name, each in ramped.vision.model.state_dict().items())
    with_labels = heal(vision, ramped, images, labels=1.0, config=replace(config, steps=2), work=Work(tmp_path / "two"))
    assert set(with_labels.log.train[-1].parts) == {"kl", "features", "labels"}


def test_training_images_are_augmented_where_it_is_asked_for(tmp_path: Path) -> None:
    images = Album.open("textures", InputContext(), count=20)
    shape = StageShape((1, 1), (8, 16), (1, 1), 8)
    config = TrainConfig(steps=2, lr=1e-3, batch=8)
    plain, mixed = (
        train(images, shape=shape, size=32, augment=augment, config=config, work=Work(tmp_path / str(number)))
        for number, augment in enumerate((None, Augmentation()))
    )
    weights = [each.vision.model.state_dict() for each in (plain, mixed)]
    assert any(not torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    with pytest.raises(TrainingError):  # another run, which does not go on from this one
        train(images, shape=shape, size=32, augment=Augmentation(), config=config, work=Work(tmp_path / "0"))


def test_healing_of_another_network_does_not_go_on_from_a_run(vision: Vision, tmp_path: Path) -> None:
    images = Album.open("textures", InputContext(), count=20)
    config = TrainConfig(steps=1, lr=1e-3, batch=8)
    first, second = (iformer(vision, images, share=0.8, seed=seed) for seed in (0, 1))
    heal(vision, first, images, config=config, work=Work(tmp_path))
    heal(vision, first, images, config=config, work=Work(tmp_path))
    for other in (second, replace(first, kernel=5)):
        with pytest.raises(TrainingError):
            heal(vision, other, images, config=config, work=Work(tmp_path))


def test_networks_in_bfloat16_are_measured_operated_on_and_healed(tmp_path: Path) -> None:
    model = Vision.of(vit().bfloat16(), "a small ViT")
    images = Album.open("textures", InputContext(), count=20)
    done = iformer(model, images, share=0.8)
    assert {each.dtype for each in done.vision.model.parameters()} == {torch.bfloat16}
    result = measure_spectra(model, images)["layers"]
    assert np.allclose([each["distance"] for each in result], [each["distance"] for each in done.findings["layers"]])
    exact = measure_spectra(Vision.of(model.model.float()), images)["layers"]
    assert np.allclose([each["distance"] for each in result], [each["distance"] for each in exact], rtol=0.02)
    again = Vision.of(vit().bfloat16())
    healed = heal(again, done, images, config=TrainConfig(steps=2, lr=1e-3, batch=8), work=Work(tmp_path))
    assert np.isfinite(healed.findings["loss"]).all()
    iformers = new_network(StageShape((1,), (8,), (1,), 8), 32, 3, 20)
    iformers.model.bfloat16()
    assert iformers.logits(images.items[:2]).shape == (2, 20)


def test_the_most_that_surgery_saves_is_what_its_page_says() -> None:
    import timm

    with torch.device("meta"):
        small = timm.create_model("vit_small_patch16_224")
    geometry = Geometry.of(small)
    for pool, saved in ((0.5, 0.44), (0.0, 0.59)):
        costs = costs_by_heads(Vision.of(small), geometry, 3, pool)
        assert 1 - costs[0].flops / costs[-1].flops == pytest.approx(saved, abs=0.005)


def test_a_refused_budget_costs_no_measurement(vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Album.open("textures", InputContext(), count=20)
    smallest = costs_by_heads(vision, Geometry.of(vision.model), 3, 0.5)
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", None)
    with pytest.raises(BudgetError, match=r"below the smallest shape: with 1 of 3 heads") as error:
        iformer(vision, images, share=0.999 * smallest[1].flops / smallest[3].flops)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 9}, "least 9: layers have 3 heads"),
        ({"kernel": 4}, "kernel 4: give an odd number"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(vision: Vision, options: dict[str, Any], message: str) -> None:
    images = Album.open("textures", InputContext(), count=20)
    with pytest.raises(MethodError, match=message) as error:
        iformer(vision, images, **options)
    assert "\n" not in str(error.value)


def test_too_few_pictures_and_foreign_models_are_refused(vision: Vision, tmp_path: Path) -> None:
    images = Album.open("textures", InputContext(), count=20)
    with pytest.raises(CalibrationError, match="9 images are too few"):
        iformer(vision, Album.open("textures", InputContext(), count=9), share=0.9)
    with pytest.raises(MethodError, match="has no classes"):
        iformer(Vision.of(vit(num_classes=0)), images, share=0.9)
    ramped = iformer(vision, images, share=0.9)
    for other in ({"num_classes": 3}, {"depth": 4}, {"depth": 2}, {"embed_dim": 48}, {"num_heads": 4}):
        with pytest.raises(MethodError, match="is not the original of that network"):
            heal(Vision.of(vit(**other)), ramped, images, work=Work(tmp_path))
    another = Vision.of(vit())
    another.model.head.bias.data.add_(1)
    with pytest.raises(MethodError, match="is not the original of that network"):
        heal(another, ramped, images, work=Work(tmp_path))
    with pytest.raises(MethodError, match="not a timm vision transformer with plain attention"):
        heal(new_network(StageShape((1,), (8,), (1,), 8), 32, 3, 20), ramped, images, work=Work(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(MethodError, match="with plain attention: block 0 has another kind"):
        iformer(ramped.vision, images)
    digits = Album.open("digits", InputContext(), count=20)
    with pytest.raises(CalibrationError, match="has 20: set labels to 0"):
        heal(vision, ramped, digits, labels=1.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document | {"schema": "other"},
        lambda document: document | {"layers": document["layers"][:2]},
        lambda document: document | {"layers": [document["layers"][0] | {"kept": [0, 7]}, *document["layers"][1:]]},
        lambda document: document | {"layers": [document["layers"][0] | {"conv": 8000}, *document["layers"][1:]]},
        lambda document: document | {"geometry": document["geometry"] | {"width": 1 << 40}},
        lambda document: document | {"geometry": document["geometry"] | {"depth": 10**9}},
        lambda document: document | {"geometry": document["geometry"] | {"size": [33, 32]}},
        lambda document: document | {"kernel": "3"},
        lambda document: document | {"looks": document["looks"] | {"std": [0, 0, 0]}},
        lambda document: document | {"looks": document["looks"] | {"size": [16, 32]}},
        lambda document: document | {"looks": document["looks"] | {"size": [1 << 40, 32]}},
        lambda document: document | {"looks": document["looks"] | {"channels": 1, "mean": [0.5], "std": [0.5]}},
        lambda document: {name: value for name, value in document.items() if name != "looks"},
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(vision: Vision, tmp_path: Path, damage: Any) -> None:
    import json

    geometry = Geometry.of(vision.model)
    found = [
        replace(each)
        for each in fit_convolutions(vision, geometry, Album.open("textures", InputContext(), count=10).items, 3, 1e-3)
    ]
    layers = plan(geometry, [(1,), (0, 1), (0, 1, 2)], 0.5)
    built = apply_plan(vision, geometry, layers, found, 3, 0)
    Ramped(vision=built, geometry=geometry, layers=layers, kernel=3, origin="some").write(tmp_path)
    document = json.loads((tmp_path / "network.json").read_text())
    (tmp_path / "network.json").write_text(json.dumps(damage(document)))
    with pytest.raises(CheckpointError, match="not a network of iformer") as error:
        Ramped.read(tmp_path)
    assert "\n" not in str(error.value)


def test_the_same_seed_gives_the_same_network(vision: Vision, images: Pictures) -> None:
    geometry = Geometry.of(vision.model)
    found = fit_convolutions(vision, geometry, images, 3, 1e-3)
    layers = plan(geometry, [(1,), (0, 1), (0, 1, 2)], 0.5)
    first, second, other = (
        apply_plan(vision, geometry, layers, found, 3, seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(each, second[name]) for name, each in first.items())
    differ = [name for name, each in first.items() if not torch.equal(each, other[name])]
    assert differ == [
        "blocks.0.attn.proj.weight",
        "blocks.1.attn.proj.weight",
    ]  # the columns that will read the pooling
    assert np.isfinite(found[0].explained).all()
