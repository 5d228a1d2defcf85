"""Relation attention: each reading of it against its formula, and blocks that change nothing when they are inserted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import MethodError
from lamella.methods.muranet import BlockDesign, RelationAttention2d, RelationBlock, of_timm
from lamella.methods.muranet.attention import EPS

VARIANTS = ("gate", "msca", "local_softmax", "depthwise")


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def eye(convolution: nn.Module) -> None:
    """A 1 x 1 map that gives what it gets."""
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(convolution.out_channels)[:, :, None, None])


def convolved(plane: Tensor, path: nn.Module, channel: int) -> Tensor:
    """A 3 x 3 depthwise convolution of one plane [H, W], by hand."""
    assert isinstance(path, nn.Conv2d) and path.bias is not None
    apart, (h, w) = path.dilation[0], plane.shape
    found = torch.full_like(plane, float(path.bias[channel]))
    for i in range(h):
        for j in range(w):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    y, x = i + apart * a, j + apart * b
                    if 0 <= y < h and 0 <= x < w:
                        found[i, j] += path.weight[channel, 0, a + 1, b + 1] * plane[y, x]
    return found


@torch.no_grad()
def test_msca_with_one_scale_and_identity_maps_is_the_gate_by_hand() -> None:
    torch.manual_seed(0)
    attention = RelationAttention2d(2, "msca", 1).double()
    for each in (attention.q, attention.mix, attention.out):
        eye(each)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    u = x.clone().apply_(gelu)
    expected = torch.stack([convolved(u[0, c], attention.paths[0], c) * u[0, c] for c in range(2)])
    torch.testing.assert_close(attention(x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("paths", ["chained", "parallel"])
def test_the_default_is_its_formula(paths: str) -> None:
    torch.manual_seed(0)
    attention = RelationAttention2d(3, "gate", 3, paths).double()  # type: ignore[arg-type]
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)

    def mapped(linear: nn.Module, maps: Tensor) -> Tensor:
        assert isinstance(linear, nn.Conv2d) and linear.bias is not None
        return torch.einsum("dc,chw->dhw", linear.weight[:, :, 0, 0], maps) + linear.bias[:, None, None]

    q, k, v = (mapped(each, x[0]) for each in (attention.q, attention.k, attention.v))
    q, k = (each / (each.square().mean(0) + EPS).sqrt() for each in (q, k))
    u = (q * k).apply_(gelu)
    r, total = u, u.clone()
    for path in attention.paths:
        r = torch.stack([convolved((r if paths == "chained" else u)[c], path, c) for c in range(3)])
        total = total + r
    expected = mapped(attention.out, mapped(attention.mix, total) * v)
    torch.testing.assert_close(attention(x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gate", "local_softmax", "depthwise"])
def test_the_output_grows_linearly_with_a_large_input(variant: str) -> None:
    attention = RelationAttention2d(32, variant).double()  # type: ignore[arg-type]
    for name, each in attention.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(each)
    x = torch.randn(1, 32, 9, 8, dtype=torch.float64)
    growth = attention(1e6 * x).abs().amax() / attention(1e3 * x).abs().amax()
    assert growth < 1e4  # linear is a thousand, the cube a billion


@torch.no_grad()
def test_chained_paths_see_three_five_and_seven_pixels() -> None:
    attention = RelationAttention2d(1, "msca", 3)
    r = torch.zeros(1, 1, 15, 15)
    r[..., 7, 7] = 1
    for path, side in zip(attention.paths, (3, 5, 7), strict=True):
        assert isinstance(path, nn.Conv2d) and path.bias is not None
        nn.init.ones_(path.weight)
        nn.init.zeros_(path.bias)
        r = path(r)
        rows = r[0, 0].nonzero()
        assert (rows.amax(0) - rows.amin(0) + 1).tolist() == [side, side] and len(rows) == side**2


@torch.no_grad()
def test_local_softmax_is_a_mean_over_nine_neighbours_at_each_scale() -> None:
    torch.manual_seed(0)
    attention = RelationAttention2d(64, "local_softmax", 2).double()
    x = torch.randn(1, 64, 4, 5, dtype=torch.float64)
    q, k, v = (each(x)[0].view(2, 32, 4, 5) for each in (attention.q, attention.k, attention.v))
    total = torch.zeros(2, 32, 4, 5, dtype=torch.float64)
    for s in (1, 2):
        for i in range(4):
            for j in range(5):
                near = [(i + s * a, j + s * b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
                near = [(y, z) for y, z in near if 0 <= y < 4 and 0 <= z < 5]
                for head in range(2):
                    scores = torch.stack([q[head, :, i, j] @ k[head, :, y, z] for y, z in near]) / math.sqrt(32)
                    values = torch.stack([v[head, :, y, z] for y, z in near])
                    total[head, :, i, j] += scores.softmax(0) @ values
    torch.testing.assert_close(attention(x), attention.out(total.view(1, 64, 4, 5)))


@pytest.mark.parametrize("channels", [16, 48, 64, 256])
def test_the_block_to_compare_with_has_as_many_parameters(channels: int) -> None:
    counts = {v: sum(p.numel() for p in RelationBlock(channels, v, expand=2).parameters()) for v in VARIANTS}
    assert abs(counts["depthwise"] / counts["gate"] - 1) < 0.05  # that of the default


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_without_scale_changes_nothing_bitwise(variant: str) -> None:
    block = RelationBlock(32, variant, scale=0.0)  # type: ignore[arg-type]
    x = 100 * torch.randn(2, 32, 9, 8)
    assert torch.equal(block(x), x) and torch.equal(block.eval()(x), x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_inserted_attention_leaves_all_maps_of_a_timm_network_as_they_were(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = of_timm(name).eval()
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, pretrained=False).eval()
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    scaled = (pixels.float() / 255 - encoder.mean) / encoder.spread
    expected = theirs(scaled)
    assert [tuple(each.shape[1:2]) for each in expected] == [(c,) for c in encoder.channels]
    encoder.insert([0, 2, 3], BlockDesign())
    for ours, each in zip(encoder.eval()(pixels)[0], expected, strict=True):
        assert torch.equal(ours, each)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    for name in ("vit_tiny_patch16_224", "local-dir:/tmp", "swin_tiny_patch4_window7_224"):
        with pytest.raises(MethodError, match=r"choose another network|timm has no network"):
            of_timm(name)
