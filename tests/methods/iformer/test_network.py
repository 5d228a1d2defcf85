"""The network against the published counts, and against what its parts are by definition."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lamella.errors import MethodError
from lamella.methods.iformer import BASE, LARGE, SMALL, InceptionMixer, InceptionTransformer, StageShape
from lamella.methods.iformer.backbone import create_model
from lamella.methods.iformer.network import adapt_checkpoint

NANO = StageShape(depths=(1, 1), widths=(16, 32), attention=(1, 3), head_dim=8)
FOUR = StageShape(depths=(1, 1, 1, 1), widths=(8, 16, 24, 32), attention=(0, 1, 2, 4), head_dim=8)
PUBLISHED = {"small": (SMALL, 19_866_344), "base": (BASE, 47_866_216), "large": (LARGE, 86_637_096)}


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(0.3 * torch.randn_like(each))
    return module.double().eval()


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_exactly_their_parameters(size: str) -> None:
    shape, count = PUBLISHED[size]
    with torch.device("meta"):
        models = [InceptionTransformer(shape), timm.create_model(f"iformer_{size}")]
    assert [sum(each.numel() for each in model.parameters()) for model in models] == [count, count]


def test_layer_scale_stands_in_the_third_and_fourth_stage_alone() -> None:
    with torch.device("meta"):
        model = InceptionTransformer()
    scaled = {name.split(".")[0] for name, _ in model.named_parameters() if "layer_scale" in name}
    assert scaled == {"blocks3", "blocks4"}
    scale = InceptionTransformer(StageShape((1, 1, 1), (8, 8, 8), (1, 1, 1), 8)).blocks3[0].layer_scale_1
    torch.testing.assert_close(scale.detach(), torch.full((8,), 1e-6))


@pytest.mark.parametrize(("dim", "heads", "attention"), [(96, 3, 1), (64, 4, 2), (320, 10, 9)])
def test_a_mixer_has_the_parameters_of_its_formula(dim: int, heads: int, attention: int) -> None:
    low = attention * dim // heads
    high = dim - low
    paths = high**2 / 2 + 9 * high + high**2 / 2 + high
    rest = 3 * low**2 + 3 * low + 9 * (2 * high + low) + (2 * high + low) * dim + dim
    assert sum(each.numel() for each in InceptionMixer(dim, heads, attention).parameters()) == paths + rest


def naive(mixer: InceptionMixer, x: np.ndarray, heads: int, pool: int) -> np.ndarray:
    """A mixer for one picture [H, W, C], place by place, in the order of the paper."""
    w = {name: each.detach().numpy() for name, each in mixer.named_parameters()}
    height, width, _ = x.shape
    gelu = np.vectorize(lambda v: v * (1 + math.erf(v / 2**0.5)) / 2)

    def near(z: np.ndarray, i: int, j: int, outside: float) -> np.ndarray:
        padded = np.pad(z, ((1, 1), (1, 1), (0, 0)), constant_values=outside)
        return padded[i : i + 3, j : j + 3]

    def depthwise(z: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        out = np.zeros_like(z)
        for i in range(height):
            for j in range(width):
                out[i, j] = (near(z, i, j, 0.0) * kernel[:, 0].transpose(1, 2, 0)).sum((0, 1))
        return out

    half = mixer.high_dim // 2
    conv = x[..., :half] @ w["high_mixer.conv1.weight"][..., 0, 0].T
    conv = gelu(depthwise(conv, w["high_mixer.proj1.weight"]))
    most = np.stack([[near(x[..., half : 2 * half], i, j, -np.inf).max((0, 1)) for j in range(width)]
                     for i in range(height)])  # fmt: skip
    pooled = gelu(most @ w["high_mixer.proj2.weight"][..., 0, 0].T + w["high_mixer.proj2.bias"])
    low = x[..., mixer.high_dim :]
    rows = range(0, height, pool)
    means = {(i, j): low[i : i + pool, j : j + pool].mean((0, 1)) for i in rows for j in range(0, width, pool)}
    qkv = np.stack(list(means.values())) @ w["low_mixer.qkv.weight"].T + w["low_mixer.qkv.bias"]
    d = mixer.low_dim // heads
    out = np.zeros((len(means), mixer.low_dim))
    for head in range(heads):
        q, k, v = (qkv[:, part * mixer.low_dim + head * d :][:, :d] for part in range(3))
        scores = np.exp(q @ k.T / d**0.5)
        out[:, head * d : (head + 1) * d] = scores / scores.sum(1, keepdims=True) @ v
    found = dict(zip(means, out, strict=True))
    up = np.stack([[found[i // pool * pool, j // pool * pool] for j in range(width)] for i in range(height)])
    y = np.concatenate([conv, pooled, up], -1)
    y = y + depthwise(y, w["conv_fuse.weight"])
    return y @ w["proj.weight"][..., 0, 0].T + w["proj.bias"]


@pytest.mark.parametrize(("grid", "pool"), [((4, 6), 2), ((5, 3), 2), ((3, 4), 1)])
def test_a_mixer_is_its_definition_on_even_and_odd_maps(grid: tuple[int, int], pool: int) -> None:
    mixer = randomised(InceptionMixer(12, 3, 2, pool))
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        found = mixer(x)
    for row in range(2):
        np.testing.assert_allclose(found[row].numpy(), naive(mixer, x[row].numpy(), 2, pool), rtol=1e-9, atol=1e-10)


def attended(mixer: InceptionMixer, x: torch.Tensor) -> torch.Tensor:
    """torch's attention over the last channels, nothing beside it, and the fusion."""
    low, (height, width) = mixer.low_dim, x.shape[1:3]
    plain = nn.MultiheadAttention(low, mixer.low_mixer.heads, batch_first=True).double()
    plain.in_proj_weight.copy_(mixer.low_mixer.qkv.weight)
    plain.in_proj_bias.copy_(mixer.low_mixer.qkv.bias)
    plain.out_proj.weight.copy_(torch.eye(low))
    plain.out_proj.bias.zero_()
    tokens = x[..., -low:].flatten(1, 2)
    y = plain(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(-1, (height, width))
    y = torch.cat([y.new_zeros(len(x), 2 * mixer.high_dim, height, width), y], 1)
    return mixer.proj(y + mixer.conv_fuse(y)).permute(0, 2, 3, 1)


def test_a_mixer_whose_heads_all_attend_is_plain_attention_and_the_fusion() -> None:
    mixer = randomised(InceptionMixer(16, 4, 4))
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), attended(mixer, x))
    assert not hasattr(mixer, "high_mixer")


def test_no_attention_and_single_paths_have_no_empty_branches() -> None:
    x = torch.randn(1, 4, 4, 16)
    for paths in ("both", "conv", "pool"):
        mixer = InceptionMixer(16, 4, 0, paths=paths)
        assert mixer(x).shape == x.shape and not hasattr(mixer, "low_mixer")
        assert mixer.proj.in_channels == 32
        assert all(each.numel() for each in mixer.parameters())


def test_high_branches_that_give_nothing_leave_attention_alone() -> None:
    mixer = randomised(InceptionMixer(16, 4, 2))
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        for each in mixer.high_mixer.parameters():
            each.zero_()
        torch.testing.assert_close(mixer(x), attended(mixer, x))


def test_the_order_of_heads_in_the_low_branch_does_not_matter() -> None:
    mixer, other = (randomised(InceptionMixer(16, 4, 3, 2)) for _ in range(2))
    order = torch.tensor([2, 0, 1])
    moved = torch.cat([4 * each + torch.arange(4) for each in order])
    with torch.no_grad():
        for name in ("weight", "bias"):
            qkv = getattr(mixer.low_mixer.qkv, name)
            getattr(other.low_mixer.qkv, name).copy_(qkv.view(3, 3, 4, -1)[:, order].reshape(qkv.shape))
        other.conv_fuse.weight[8:] = mixer.conv_fuse.weight[8:][moved]
        other.proj.weight[:, 8:] = mixer.proj.weight[:, 8:][:, moved]
        x = torch.randn(1, 6, 4, 16, dtype=torch.float64)
        torch.testing.assert_close(other(x), mixer(x))


@pytest.mark.parametrize("size", [(64, 96), (33, 50), (32, 32)])
def test_pictures_of_any_size_go_through(size: tuple[int, int]) -> None:
    model = InceptionTransformer(NANO, img_size=32, num_classes=5).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)
    assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, -(-size[0] // 8), -(-size[1] // 8), 32)


def test_positions_are_interpolated_wherever_the_grid_is_another_one_with_as_many_places() -> None:
    model = randomised(InceptionTransformer(NANO, img_size=32, num_classes=5)).float()
    model(torch.randn(1, 3, 16, 64))  # 4 x 16 places, as many as 8 x 8
    weights = model.state_dict()
    larger = InceptionTransformer(NANO, img_size=48, num_classes=5)
    larger.load_state_dict(adapt_checkpoint({"state_dict": weights}, larger))
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(larger.eval()(x), model(x))


def test_timm_loads_a_checkpoint_of_the_authors_layout_at_another_size_and_with_another_head(tmp_path: Path) -> None:
    model = create_model("iformer_small", FOUR, img_size=64).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(create_model("iformer_small", FOUR, img_size=96, **given).eval()(x), model(x))
    other = create_model("iformer_small", FOUR, img_size=96, num_classes=5, **given).eval()
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x))
    assert other(x).shape == (1, 5)


def test_timm_gives_features_classifiers_and_groups() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model("iformer_small", FOUR, img_size=64, num_classes=3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3) and model.get_classifier() is model.head
    features = create_model("iformer_small", FOUR, img_size=64, features_only=True, out_indices=(1, 2)).eval()
    model.eval().load_state_dict(
        {**model.state_dict(), **{name.removeprefix("model."): each for name, each in features.state_dict().items()}}
    )
    x = torch.randn(1, 3, 64, 96)
    maps = features(x)
    assert [tuple(each.shape) for each in maps] == [(1, 16, 8, 12), (1, 24, 4, 6)]
    assert features.feature_info.channels() == [16, 24] and features.feature_info.reduction() == [8, 16]
    last, every = model.forward_intermediates(x)
    torch.testing.assert_close(maps, every[1:3])
    torch.testing.assert_close(last, model.forward_features(x))
    model.reset_classifier(0)
    assert model(x).shape == (1, 32)
    assert model.no_weight_decay() == {f"pos_embed{stage}" for stage in range(1, 5)}


def test_the_first_stages_are_to_be_had_without_the_others() -> None:
    model = create_model("iformer_small", FOUR, img_size=64, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 96)
    every = model.forward_intermediates(x, intermediates_only=True)
    last, found = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close([last.permute(0, 3, 1, 2), *found], [every[0], every[0]])
    assert model.prune_intermediate_layers([0], prune_head=False) == [0]
    torch.testing.assert_close(model.forward_features(x).permute(0, 3, 1, 2), every[0])
    torch.testing.assert_close(model.forward_intermediates(x)[1], every[:1])
    assert model(x).shape == (2, 8)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


def test_checkpoints_of_the_authors_have_these_names() -> None:
    with torch.device("meta"):
        names = set(InceptionTransformer().state_dict())
    block = "blocks3.8."
    attn = f"{block}attn."
    for name in (
        "patch_embed.proj1.weight", "patch_embed.norm2.running_var", "patch_embed4.proj.bias", "pos_embed3",
        "norm.weight", "head.bias", f"{block}norm1.weight", f"{attn}high_mixer.conv1.weight",
        f"{attn}high_mixer.proj1.weight", f"{attn}high_mixer.proj2.bias", f"{attn}low_mixer.qkv.bias",
        f"{attn}conv_fuse.weight", f"{attn}proj.bias", f"{block}mlp.fc1.weight", f"{block}layer_scale_2",
    ):  # fmt: skip
        assert name in names
    assert not any(name.startswith("blocks1.0.layer_scale") for name in names)


def test_gradients_are_the_same_when_blocks_are_checkpointed() -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model("iformer_small", NANO, img_size=32, num_classes=2)
        model.set_grad_checkpointing(checkpointing)
        model.train()(torch.ones(2, 3, 32, 32) * torch.arange(2).view(2, 1, 1, 1)).sum().backward()
        grads.append(model.blocks1[0].attn.proj.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"widths": (16, 30)}, "30 channels and heads of 8: give whole heads"),
        ({"attention": (1, 5)}, "5 heads attend in stage 2, which has 4"),
        ({"attention": (1,)}, "1 values for 2 layers"),
        ({"depths": (1, 1, 1)}, "give one value per stage"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_line(given: dict[str, object], said: str) -> None:
    sizes = {"depths": (1, 1), "widths": (16, 32), "attention": (1, 3), "head_dim": 8} | given
    with pytest.raises(MethodError, match=said) as error:
        StageShape(**sizes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [1.0, 2.0, -0.1])
def test_a_drop_path_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(MethodError, match=f"a drop path of {rate:g}: give a value of at least 0 and below 1"):
        InceptionTransformer(StageShape((1,), (8,), (1,), 8), drop_path_rate=rate)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(MethodError, match="give a number of heads that divides"):
        InceptionMixer(16, 3, 1)
