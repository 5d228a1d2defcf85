"""The weights that AGILE3D's authors released, read as those of our network.

Their file ``checkpoint1099.pth`` (github.com/ywyue/AGILE3D) is a pickle of the tensors of the network, the settings of
the training run, and the state of the optimizer. The network is that of modules.py and decoder.py with other names. Its
convolutions are MinkowskiEngine's, whose weights are stored in another way:

- The entry of the offset (x, y, z) in a kernel [K^3, C_in, C_out] has the index x + K y + K^2 z there, and
  K^2 x + K y + z here. Offsets count from -(K // 2) if K is odd, and from 0 if it is even, as they do here.
- A kernel with one entry is a matrix [C_in, C_out]; here it is a linear layer, whose weight is [C_out, C_in].
- A bias is [1, C_out].

A strided convolution joins the coarse cell c to the fine cells 2 c + (x, y, z), and a transposed one joins the same
cells in the other direction, so both keep the order of their kernel.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

BACKGROUND, FEEDFORWARD = "bg_query_feat.weight", "ffn_attention.0.0.linear1.weight"  # their shapes are d, B and F
MARKS = ("backbone.conv0p1s1.kernel", BACKGROUND, FEEDFORWARD)  # names by which the file is recognised
SUPPORTED = {"pre_norm": False, "normalize_pos_enc": True, "hlevels": [4]}  # of the settings that no shape shows
IGNORED = ("total_ops", "total_params")  # counters of a profiler, which the authors' code ignores, too

NAMES = {
    r"backbone\.conv0p1s1\.kernel": "encoder.stem.conv.weight",
    r"backbone\.bn0\.bn\.(\w+)": r"encoder.stem.norm.\1",
    r"lin_squeeze_head\.kernel": "project.weight",
    r"lin_squeeze_head\.bias": "project.bias",
    r"pos_enc\.gauss_B": "decoder.place.G",
    r"bg_query_feat\.weight": "decoder.background.weight",
    r"bg_query_pos\.weight": "decoder.background_place.weight",
    r"c2s_attention\.(\d+)\.0\.multihead_attn\.([\w.]+)": r"decoder.layers.\1.click_to_scene.\2",
    r"c2s_attention\.(\d+)\.0\.norm\.(\w+)": r"decoder.layers.\1.norms.0.\2",
    r"c2c_attention\.(\d+)\.0\.self_attn\.([\w.]+)": r"decoder.layers.\1.click_to_click.\2",
    r"c2c_attention\.(\d+)\.0\.norm\.(\w+)": r"decoder.layers.\1.norms.1.\2",
    r"ffn_attention\.(\d+)\.0\.linear1\.(\w+)": r"decoder.layers.\1.feedforward.0.\2",
    r"ffn_attention\.(\d+)\.0\.linear2\.(\w+)": r"decoder.layers.\1.feedforward.2.\2",
    r"ffn_attention\.(\d+)\.0\.norm\.(\w+)": r"decoder.layers.\1.norms.2.\2",
    r"s2c_attention\.(\d+)\.0\.multihead_attn\.([\w.]+)": r"decoder.layers.\1.scene_to_click.\2",
    r"s2c_attention\.(\d+)\.0\.norm\.(\w+)": r"decoder.layers.\1.norms.3.\2",
    r"decoder_norm\.(\w+)": r"decoder.norm.\1",
    r"mask_embed_head\.([\w.]+)": r"decoder.mask.\1",
}


def _level(conv: str, norm: str, blocks: str, ours: str) -> dict[str, str]:
    """Return the names of one level of the U-Net, given those of its parts."""
    return {
        rf"backbone\.{conv}\.kernel": f"{ours}.change.conv.weight",
        rf"backbone\.{norm}\.bn\.(\w+)": rf"{ours}.change.norm.\1",
        rf"backbone\.{blocks}\.(\d+)\.conv1\.kernel": rf"{ours}.blocks.\1.first.conv.weight",
        rf"backbone\.{blocks}\.(\d+)\.norm1\.bn\.(\w+)": rf"{ours}.blocks.\1.first.norm.\2",
        rf"backbone\.{blocks}\.(\d+)\.conv2\.kernel": rf"{ours}.blocks.\1.second.weight",
        rf"backbone\.{blocks}\.(\d+)\.norm2\.bn\.(\w+)": rf"{ours}.blocks.\1.norm.\2",
        rf"backbone\.{blocks}\.(\d+)\.downsample\.0\.kernel": rf"{ours}.blocks.\1.shortcut.0.weight",
        rf"backbone\.{blocks}\.(\d+)\.downsample\.1\.bn\.(\w+)": rf"{ours}.blocks.\1.shortcut.1.\2",
    }


for n in range(4):  # conv1p1s2 .. conv4p8s2 on the way down, convtr4p16s2 .. convtr7p2s2 on the way up
    NAMES |= _level(f"conv{n + 1}p{2**n}s2", f"bn{n + 1}", f"block{n + 1}", f"encoder.down.{n}")
    NAMES |= _level(f"convtr{n + 4}p{2 ** (4 - n)}s2", f"bntr{n + 4}", f"block{n + 5}", f"encoder.up.{n}")


def read_published(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a released checkpoint, or the state dict in it; nothing in it is run.

    Args:
        file: the file, written by ``torch.save``.

    Returns:
        The fields of :class:`lamella.methods.agile3d.result.SegmenterShape`, and the tensors of the network by our
        names and in our layout.

    Raises:
        ValueError: if the file has other content, such as another network.
        RuntimeError: if it is damaged; torch raises further errors.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):  # the settings, which are plain values
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError("it contains more than tensors and settings") from None
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise ValueError("it has no state dict")
    if missing := [name for name in MARKS if name not in state]:
        raise ValueError(f"it has no tensor {missing[0]}")
    if sum(each.nbytes for each in state.values()) > file.stat().st_size:
        raise ValueError("its tensors are larger than the file")
    settings = vars(content["args"]) if isinstance(content.get("args"), Namespace) else {}
    for name, known in SUPPORTED.items():
        if settings.get(name, known) != known:
            raise ValueError(f"{name} {settings[name]} is not supported, only {known}")
    tensors = {name: each for name, each in state.items() if not name.endswith(IGNORED)}
    return sizes(tensors, settings), {renamed(name): arranged(name, each) for name, each in tensors.items()}


def sizes(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`lamella.methods.agile3d.result.SegmenterShape`.

    Args:
        state: the published tensors.
        settings: the settings of the training run; those that are missing are the paper's.
    """
    background, hidden = state[BACKGROUND].shape
    shared = settings.get("shared_decoder", False)
    layers = sum(re.fullmatch(r"ffn_attention\.\d+\.0\.linear1\.weight", name) is not None for name in state)
    return {
        "encoder": "res16unet34c",
        "voxel": settings.get("voxel_size", 0.05),
        "hidden": hidden,
        "heads": settings.get("num_heads", 8),
        "feedforward": len(state[FEEDFORWARD]),
        "layers": settings.get("num_decoders", 3) if shared else layers,
        "background": background,
        "shared": shared,
    }


def renamed(name: str) -> str:
    """Return our name of a published tensor.

    Args:
        name: its published name.

    Raises:
        ValueError: if AGILE3D has no such tensor.
    """
    for pattern, ours in NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(f"{name} is no tensor of AGILE3D")


def arranged(name: str, tensor: Tensor) -> Tensor:
    """Return a published tensor in our layout; one of an unexpected shape is returned in a shape that does not fit.

    Args:
        name: its published name.
        tensor: the tensor: a kernel [K^3, C_in, C_out], a matrix [C_in, C_out], or any other.
    """
    if name == "lin_squeeze_head.bias":
        return tensor.squeeze(0)
    if not name.endswith(".kernel"):
        return tensor
    if tensor.dim() == 2:
        return tensor.T
    K = round(len(tensor) ** (1 / 3))
    fits = tensor.dim() == 3 and len(tensor) == K**3
    return tensor.unflatten(0, (K, K, K)).transpose(0, 2).flatten(0, 2) if fits else tensor
