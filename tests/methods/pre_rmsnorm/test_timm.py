"""Vision transformers of timm compute the same with RMSNorm and CRMSNorm, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lamella.errors import MethodError
from lamella.methods.pre_rmsnorm import CRMSNorm, RMSNorm, rewrite_timm

timm = pytest.importorskip("timm")
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "norm behind the pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "norm before the pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "registers, LayerScale, norms of Q and K": (
        "vit_tiny_patch16_224",
        {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True, "no_embed_class": True},
    ),
    "no biases, a norm before the first block": ("vit_tiny_patch16_224", {"qkv_bias": False, "pre_norm": True}),
    "DeiT with distillation": ("deit_tiny_distilled_patch16_224", {}),
}


@torch.no_grad()
def built(kind: str) -> Any:
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **SIZES | changes).eval()
    for each in model.parameters():
        each.add_(0.2 * torch.randn_like(each))
    if model.patch_embed.proj.bias is not None:
        model.patch_embed.proj.bias.add_(30)  # so that a forgotten mean is loud
    return model


@pytest.mark.parametrize("options", [{}, {"fold": "bias"}, {"fold": "affine"}, {"norm": "crms"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_computes_the_same_in_float64(kind: str, options: dict[str, Any]) -> None:
    model = built(kind).double()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    view = rewrite_timm(model, **options)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(view(x), model(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    wanted = CRMSNorm if options.get("norm") == "crms" else RMSNorm
    assert all(isinstance(each, wanted) for block in view.blocks for each in (block.norm1, block.norm2))
    naive = copy.deepcopy(model)  # the mistake: RMSNorm in place of LayerNorm, and nothing recentred
    for block in naive.blocks:
        for name in ("norm1", "norm2"):
            old = getattr(block, name)
            setattr(block, name, RMSNorm(24, old.eps, old.weight, old.bias))
    assert float((naive(x) - model(x)).abs().max()) > 1e-3


def test_other_models_of_timm_are_refused_in_one_line() -> None:
    post = timm.create_model("vit_relpos_small_patch16_224", pretrained=False, depth=1)
    swin = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, depths=(1,), num_heads=(1,), embed_dim=8)
    for model in (post, swin, nn.Linear(2, 2)):
        with pytest.raises(MethodError, match="is not a vision transformer of timm with its usual blocks") as found:
            rewrite_timm(model)
        assert "\n" not in str(found.value)
    pooled = timm.create_model("vit_tiny_patch16_224", pretrained=False, global_pool="map", class_token=False, **SIZES)
    with pytest.raises(MethodError, match="it is not known what attn_pool"):
        rewrite_timm(pooled)
