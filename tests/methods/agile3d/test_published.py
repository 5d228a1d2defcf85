"""The released weights against the authors' code: its names and shapes, MinkowskiEngine's kernels, and its forward."""

from __future__ import annotations

import math
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, layer_norm, linear, relu

import lamella
from lamella.errors import CheckpointError
from lamella.methods.agile3d import ClickScene, Segmenter, SegmenterShape, Session
from lamella.methods.agile3d.published import arranged, read_published, renamed
from lamella.methods.agile3d.sparse import SparseConv, SparseGrid, transposed

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

PLANES, BLOCKS = (32, 64, 128, 256, 256, 128, 96, 96), (2, 3, 4, 6, 2, 2, 2, 2)  # of Res16UNet34C
DOWN = ("conv1p1s2", "conv2p2s2", "conv3p4s2", "conv4p8s2")
UP = ("convtr4p16s2", "convtr5p8s2", "convtr6p4s2", "convtr7p2s2")
SETTINGS = {"voxel_size": 0.25, "num_heads": 4, "num_decoders": 2, "pre_norm": False, "hlevels": [4], "run_id": "test"}


def norms(name: str, channels: int) -> Shapes:
    """A batch norm of MinkowskiEngine."""
    statistics = {f"{name}.bn.{each}": (channels,) for each in ("weight", "bias", "running_mean", "running_var")}
    return statistics | {f"{name}.bn.num_batches_tracked": ()}


def linears(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def stage(name: str, before: int, after: int, blocks: int) -> Shapes:
    """Residual blocks, of which the first may change the number of channels."""
    found: Shapes = {}
    for n in range(blocks):
        inputs = after if n else before
        found |= {f"{name}.{n}.conv1.kernel": (27, inputs, after)} | norms(f"{name}.{n}.norm1", after)
        found |= {f"{name}.{n}.conv2.kernel": (27, after, after)} | norms(f"{name}.{n}.norm2", after)
        if inputs != after:
            found |= {f"{name}.{n}.downsample.0.kernel": (inputs, after)} | norms(f"{name}.{n}.downsample.1", after)
    return found


def shapes(d: int = 128, F: int = 1024, L: int = 3, B: int = 10) -> Shapes:
    """All tensors that the authors' network has in its state dict."""
    found: Shapes = {"backbone.conv0p1s1.kernel": (125, 3, 32)} | norms("backbone.bn0", 32)
    width = 32
    for n, conv in enumerate(DOWN):
        found |= {f"backbone.{conv}.kernel": (8, width, width)} | norms(f"backbone.bn{n + 1}", width)
        found |= stage(f"backbone.block{n + 1}", width, PLANES[n], BLOCKS[n])
        width = PLANES[n]
    for n, (conv, skip) in enumerate(zip(UP, (128, 64, 32, 32), strict=True), start=4):
        found |= {f"backbone.{conv}.kernel": (8, width, PLANES[n])} | norms(f"backbone.bntr{n}", PLANES[n])
        found |= stage(f"backbone.block{n + 1}", PLANES[n] + skip, PLANES[n], BLOCKS[n])
        width = PLANES[n]
    found |= {"lin_squeeze_head.kernel": (96, d), "lin_squeeze_head.bias": (1, d), "pos_enc.gauss_B": (3, d // 2)}
    found |= {"bg_query_feat.weight": (B, d), "bg_query_pos.weight": (B, d)}
    found |= linears("mask_embed_head.0", d, d) | linears("mask_embed_head.2", d, d)
    found |= {"decoder_norm.weight": (d,), "decoder_norm.bias": (d,)}
    for n in range(L):
        for kind, attention in (("c2s", "multihead_attn"), ("c2c", "self_attn"), ("s2c", "multihead_attn")):
            name = f"{kind}_attention.{n}.0.{attention}"
            found |= {f"{name}.in_proj_weight": (3 * d, d), f"{name}.in_proj_bias": (3 * d,)}
            found |= linears(f"{name}.out_proj", d, d)
        found |= linears(f"ffn_attention.{n}.0.linear1", d, F) | linears(f"ffn_attention.{n}.0.linear2", F, d)
        for kind in ("c2s", "c2c", "s2c", "ffn"):
            found |= {f"{kind}_attention.{n}.0.norm.{each}": (d,) for each in ("weight", "bias")}
    return found


def drawn(wanted: Shapes) -> State:
    """Random values with which features differ between voxels, so that each label wins some of them."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in wanted.items():
        value = torch.randn(shape, generator=random) / math.sqrt(max(1, math.prod(shape[:-1])))
        if name.endswith(".kernel"):
            value = 2 * value  # most neighbours are empty
        elif name.endswith(("bias", "running_mean")):
            value = value / 10
        elif name.endswith("running_var"):
            value = value.abs() + 0.5
        found[name] = torch.tensor(1099) if name.endswith("num_batches_tracked") else value
    return found


def test_every_tensor_has_a_name_and_a_shape_here_and_none_is_left() -> None:
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes().items()}
    with torch.device("meta"):
        ours = {name: each.shape for name, each in SegmenterShape().build().state_dict().items()}
    assert {renamed(name): arranged(name, each).shape for name, each in theirs.items()} == ours
    assert len(theirs) == len(ours)


# Kernels


def offset(k: int, K: int) -> Tensor:
    """The offset of entry k of a kernel of MinkowskiEngine [3]: the first axis varies fastest."""
    return torch.tensor([k % K, k // K % K, k // K**2]) - (K // 2 if K % 2 else 0)


def convolved(x: Tensor, kernel: Tensor, sources: Tensor, targets: Tensor, stride: int = 1) -> Tensor:
    """Every target cell looks at every source cell, for each entry of the kernel."""
    out = x.new_zeros(len(targets), kernel.shape[2])
    for k, W in enumerate(kernel):
        wanted = stride * targets + offset(k, round(len(kernel) ** (1 / 3)))
        out += (wanted[:, None] == sources[None]).all(dim=2).to(x.dtype) @ x @ W
    return out


def convolved_back(x: Tensor, kernel: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """The transposed convolution of stride 2, from coarse to fine cells."""
    out = x.new_zeros(len(targets), kernel.shape[2])
    for k, W in enumerate(kernel):
        reached = 2 * sources + offset(k, 2)
        out += (reached[:, None] == targets[None]).all(dim=2).T.to(x.dtype) @ x @ W
    return out


def with_kernel(kernel: Tensor) -> SparseConv:
    """Our convolution with a published kernel."""
    conv = SparseConv(kernel.shape[1], kernel.shape[2], len(kernel))
    conv.weight = nn.Parameter(arranged("conv.kernel", kernel))
    return conv


def cells_and(channels: int) -> tuple[Tensor, Tensor]:
    """Occupied cells in no order [N, 3], and their features [N, C]."""
    random = torch.Generator().manual_seed(1)
    cells = torch.nonzero(torch.rand(6, 6, 6, generator=random) < 0.3)
    cells = cells[torch.randperm(len(cells), generator=random)]
    return cells, torch.randn(len(cells), channels, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("K", [1, 3, 5])
def test_a_convolution_has_the_kernel_of_minkowski_engine(K: int) -> None:
    cells, x = cells_and(4)
    kernel = torch.randn(K**3, 4, 5, dtype=torch.float64)
    ours = with_kernel(kernel)(x, SparseGrid(cells).neighbours(K), len(cells))
    torch.testing.assert_close(ours, convolved(x, kernel, cells, cells), atol=1e-10, rtol=0)


def test_a_strided_convolution_has_the_kernel_of_minkowski_engine() -> None:
    cells, x = cells_and(4)
    kernel, (coarse, pairs) = torch.randn(8, 4, 5, dtype=torch.float64), SparseGrid(cells).coarser
    ours = with_kernel(kernel)(x, pairs, len(coarse))
    torch.testing.assert_close(ours, convolved(x, kernel, cells, coarse.cells, stride=2), atol=1e-10, rtol=0)


def test_a_transposed_convolution_has_the_kernel_of_minkowski_engine() -> None:
    cells, _ = cells_and(4)
    kernel, (coarse, pairs) = torch.randn(8, 4, 5, dtype=torch.float64), SparseGrid(cells).coarser
    x = torch.randn(len(coarse), 4, dtype=torch.float64)
    ours = with_kernel(kernel)(x, transposed(pairs), len(cells))
    torch.testing.assert_close(ours, convolved_back(x, kernel, coarse.cells, cells), atol=1e-10, rtol=0)


# The network, as the authors' code computes it


class Reference:
    """The published network, computed from its own tensors under its own names."""

    def __init__(self, state: State, heads: int) -> None:
        self.state, self.heads = state, heads

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.bn.{each}"] for each in ("running_mean", "running_var", "weight", "bias")
        )
        return batch_norm(x, mean, var, weight, bias)

    def stage(self, name: str, x: Tensor, cells: Tensor, blocks: int) -> Tensor:
        for block in (f"{name}.{n}" for n in range(blocks)):
            h = convolved(x, self.state[f"{block}.conv1.kernel"], cells, cells)
            h = convolved(relu(self.norm(f"{block}.norm1", h)), self.state[f"{block}.conv2.kernel"], cells, cells)
            if f"{block}.downsample.0.kernel" in self.state:
                x = self.norm(f"{block}.downsample.1", x @ self.state[f"{block}.downsample.0.kernel"])
            x = relu(self.norm(f"{block}.norm2", h) + x)
        return x

    def features(self, cells: Tensor, colours: Tensor) -> Tensor:
        """The features of every voxel [N, d]."""
        x = convolved(colours, self.state["backbone.conv0p1s1.kernel"], cells, cells)
        x = relu(self.norm("backbone.bn0", x))
        passed = []
        for n, conv in enumerate(DOWN):
            passed.append((cells, x))
            coarse = (cells // 2).unique(dim=0)
            x = convolved(x, self.state[f"backbone.{conv}.kernel"], cells, coarse, stride=2)
            x = self.stage(f"backbone.block{n + 1}", relu(self.norm(f"backbone.bn{n + 1}", x)), coarse, BLOCKS[n])
            cells = coarse
        for n, conv in enumerate(UP, start=4):
            fine, skip = passed.pop()
            x = convolved_back(x, self.state[f"backbone.{conv}.kernel"], cells, fine)
            x = torch.cat([relu(self.norm(f"backbone.bntr{n}", x)), skip], dim=1)
            x, cells = self.stage(f"backbone.block{n + 1}", x, fine, BLOCKS[n]), fine
        return x @ self.state["lin_squeeze_head.kernel"] + self.state["lin_squeeze_head.bias"]

    def attended(self, name: str, q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None) -> Tensor:
        attention = nn.MultiheadAttention(q.shape[1], self.heads)
        attention.load_state_dict(
            {key.removeprefix(f"{name}."): each for key, each in self.state.items() if key.startswith(f"{name}.")}
        )
        found: Tensor = attention(q, k, v, attn_mask=blocked)[0]
        return found

    def normed(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def logits(self, f: Tensor, coords: Tensor, clicks: list[list[tuple[int, int]]], layers: int) -> Tensor:
        """The logits [N, M + 1], given the token and the time of each click on the background and on each object."""
        d = f.shape[1]
        scaled = 2 * math.pi * (coords - coords.amin(0)) / (coords.amax(0) - coords.amin(0))
        angles = scaled @ self.state["pos_enc.gauss_B"]
        p = torch.cat([angles.sin(), angles.cos()], dim=1)
        rates = torch.exp(torch.arange(0, d, 2) * (-math.log(10_000) / d))
        e, q = [], []
        for tokens in (*clicks[1:], None, clicks[0]):  # objects, learned queries, clicks on the background
            if tokens is None:
                q.append(self.state["bg_query_feat.weight"])
                e.append(self.state["bg_query_pos.weight"])
            for token, time in tokens or ():
                row = torch.empty(d)
                row[0::2], row[1::2] = (time * rates).sin(), (time * rates).cos()
                q.append(f[[token]])
                e.append(p[[token]] + row)
        queries, positions, s = torch.cat(q), torch.cat(e), f
        label = torch.tensor([k for k in range(1, len(clicks)) for _ in clicks[k]])
        label = torch.cat([label, torch.zeros(len(queries) - len(label), dtype=torch.long)])
        blocked = None
        for n in range(layers):
            name = f"c2s_attention.{n}.0"
            tgt = self.attended(f"{name}.multihead_attn", queries + positions, s + p, s, blocked)
            queries = self.normed(f"{name}.norm", queries + tgt)
            name = f"c2c_attention.{n}.0"
            tgt = self.attended(f"{name}.self_attn", queries + positions, queries + positions, queries)
            queries = self.normed(f"{name}.norm", queries + tgt)
            name = f"ffn_attention.{n}.0"
            tgt = self.linear(f"{name}.linear2", relu(self.linear(f"{name}.linear1", queries)))
            queries = self.normed(f"{name}.norm", queries + tgt)
            name = f"s2c_attention.{n}.0"
            tgt = self.attended(f"{name}.multihead_attn", s + p, queries + positions, queries)
            s = self.normed(f"{name}.norm", s + tgt)
            hidden = relu(self.linear("mask_embed_head.0", self.normed("decoder_norm", queries)))
            products = s @ self.linear("mask_embed_head.2", hidden).T
            logits = torch.stack([products[:, label == k].amax(dim=1) for k in range(len(clicks))], dim=1)
            blocked = torch.stack([logits.argmax(dim=1) != k for k in label])
            blocked[blocked.all(dim=1)] = False
        return logits


@pytest.fixture(scope="module")
def state() -> State:
    return drawn(shapes(d=32, F=48, L=2, B=3))


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the authors' training writes."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1000])
    path: Path = tmp_path_factory.mktemp("agile3d") / "checkpoint1099.pth"
    training = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 1099}
    torch.save({"model": state, "args": Namespace(**SETTINGS)} | training, path)
    yield path
    path.unlink()  # 150 MB


@pytest.fixture(scope="module")
def found(file: Path) -> Segmenter:
    return Segmenter.read(file, allow_pickle=True)


@pytest.fixture
def scene() -> ClickScene:
    random = np.random.default_rng(2)
    coords = random.uniform(0, 2, (150, 3)).astype(np.float32)
    return ClickScene(coords, random.random((150, 3)).astype(np.float32))


def clicked(found: Segmenter, scene: ClickScene) -> Session:
    session = Session(found.model, scene)
    for label, point in ((2, 5), (1, 40), (0, 90), (1, 12)):
        session.add(label, point)
    return session


def test_the_settings_of_the_run_and_the_shapes_determine_the_network(found: Segmenter) -> None:
    assert found.shape == SegmenterShape("res16unet34c", 0.25, 32, 4, 48, 2, 3)
    assert not found.model.training


@torch.no_grad()
def test_the_network_computes_what_the_published_one_does(found: Segmenter, state: State, scene: ClickScene) -> None:
    session, reference = clicked(found, scene), Reference(state, heads=4)
    f = reference.features(session.tokens.cells, session.tokens.colours)
    assert f.abs().max() > 0.1
    torch.testing.assert_close(session.encoded.f, f, atol=1e-5 * float(f.abs().max()), rtol=0)
    (first, second, background, third) = (click.token for click in session.clicks)
    clicks = [[(background, 2)], [(second, 1), (third, 3)], [(first, 0)]]
    logits = reference.logits(f, session.tokens.coords, clicks, layers=2)
    ours = found.model.decode(session.encoded, session.clicks)[-1]
    torch.testing.assert_close(ours, logits, atol=1e-4 * float(logits.abs().max()), rtol=0)
    assert len(ours.argmax(dim=1).unique()) == 3 and torch.equal(ours.argmax(dim=1), logits.argmax(dim=1))


def test_written_as_our_folder_it_gives_the_same_labels(found: Segmenter, scene: ClickScene, tmp_path: Path) -> None:
    found.write(tmp_path)
    again = Segmenter.read(tmp_path)
    assert again.describe() == found.describe()
    assert torch.equal(clicked(again, scene).labels(), clicked(found, scene).labels())


def test_a_state_dict_alone_has_the_papers_settings(tmp_path: Path) -> None:
    torch.save(some() | {"backbone.total_ops": torch.zeros(1)}, tmp_path / "weights.pth")
    fields, tensors = read_published(tmp_path / "weights.pth")
    assert (fields["voxel"], fields["heads"], fields["layers"], fields["shared"]) == (0.05, 8, 1, False)
    assert len(tensors) == len(some())


def test_a_shared_layer_runs_as_often_as_the_settings_say(tmp_path: Path) -> None:
    settings = Namespace(shared_decoder=True, num_decoders=5)
    torch.save({"model": some(), "args": settings}, tmp_path / "weights.pth")
    fields, _ = read_published(tmp_path / "weights.pth")
    assert (fields["layers"], fields["shared"]) == (5, True)


def test_the_runner_opens_it_with_permission_only(file: Path) -> None:
    how: dict[str, Any] = {"command": "judge", "budget": 1, "objects": 1, "count": 1}
    with pytest.raises(CheckpointError, match=r"checkpoint1099\.pth is a pickle.* add --allow-pickle"):
        lamella.run("agile3d", file, "rooms", **how)
    with pytest.raises(CheckpointError, match=r"is a pickle"):
        Segmenter.read(file)
    judged = lamella.run("agile3d", file, "rooms", **how, allow_pickle=True)
    assert 0 <= judged.evidence.findings["agile3d"]["iou"]["1"] <= 1


# Files that are refused


def some(**others: Any) -> dict[str, Any]:
    """A few tensors of the network, by which it is recognised, and others."""
    wanted = shapes(d=16, F=8, L=1)
    names = ("backbone.conv0p1s1.kernel", "bg_query_feat.weight", "ffn_attention.0.0.linear1.weight")
    return {name: torch.zeros(wanted[name]) for name in names} | others


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


REFUSED: dict[str, tuple[Any, str]] = {
    "a missing tensor": (some(), "lacks tensors of the network"),
    "an unknown tensor": (some(**{"backbone.final.kernel": torch.zeros(96, 20)}), "backbone.final.kernel is no tensor"),
    "a block too many": (some(**{"backbone.block1.2.conv2.kernel": torch.zeros(27, 32, 32)}), "has nothing"),
    "another kernel": (some(**{"backbone.conv0p1s1.kernel": torch.zeros(26, 3, 32)}), r"\[26, 3, 32\]"),
    "more channels": (some(**{"backbone.conv1p1s2.kernel": torch.zeros(8, 32, 33)}), r"\[8, 32, 33\]"),
    "another bias": (some(**{"lin_squeeze_head.bias": torch.zeros(2, 8)}), r"\[2, 8\]"),
    "an odd width": (some(**{"bg_query_feat.weight": torch.zeros(1, 15)}), "hidden 15"),
    "a large width": (some(**{"bg_query_feat.weight": torch.zeros(1, 8192)}), "4096"),
    "a width without data": (some(**{"bg_query_feat.weight": torch.zeros(1).expand(10**6, 2**12)}), "larger"),
    "another network": ({"conv1.weight": torch.zeros(1)}, "has no tensor backbone"),
    "no tensors": ({"model": [1, 2]}, "no state dict"),
    "a list": ([1, 2], "has no tensor backbone"),
    "values that are no tensors": ({"model": some(more=1)}, "no state dict"),
    "norms first": ({"model": some(), "args": Namespace(pre_norm=True)}, "pre_norm True is not supported"),
    "several levels": ({"model": some(), "args": Namespace(hlevels=[3, 4])}, "hlevels"),
    "wrong heads": ({"model": some(), "args": Namespace(num_heads=3)}, "heads"),
    "no number": ({"model": some(), "args": Namespace(voxel_size="0.05")}, "voxel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_content_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        Segmenter.read(tmp_path / "weights.pth", allow_pickle=True)
    assert "\n" not in str(error.value) and "weights.pth: no weights of AGILE3D" in str(error.value)


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(some(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for content in (b"", b"PK", data[: len(data) // 2], pickle.dumps(some()), b"text"):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match="no weights of AGILE3D") as error:
            Segmenter.read(tmp_path / "weights.pth", allow_pickle=True)
        assert "\n" not in str(error.value)


def test_no_code_of_the_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": some(), "args": Harmful(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="contains more than tensors and settings"):
        Segmenter.read(tmp_path / "weights.pth", allow_pickle=True)
    assert not (tmp_path / "made").exists()
