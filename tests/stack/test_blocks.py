"""Blocks of models that are not chains: dropped, recorded, measured and replaced, compared with hooks inside them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import timm
import torch
from torch import Tensor, nn

from lamella.errors import ArchitectureError, PlanError
from lamella.stack.blocks import Blocks, resnet_shortcut

NAMES = ("unet", "unet with text", "resnet18", "resnet50")
# By class: the module inside a block whose output is what the block adds to its shortcut.
WRITES = {
    "ResnetBlock2D": "conv2",
    "Attention": "to_out.0",
    "Transformer2DModel": "proj_out",
    "BasicBlock": "bn2",
    "Bottleneck": "bn3",
}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A small model with random weights of the real class, and what it takes."""
    torch.manual_seed(0)
    if name.startswith("resnet"):
        model = timm.create_model(name, pretrained=False, num_classes=10, in_chans=3).eval()
        inputs = {"x": torch.randn(2, 3, 32, 32)}
    else:
        common = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
        inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(3)}
        if name == "unet":
            model = diffusers.UNet2DModel(
                in_channels=3, out_channels=3, attention_head_dim=8, **common,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ).eval()  # fmt: skip
        else:
            model = diffusers.UNet2DConditionModel(
                in_channels=3, out_channels=3, attention_head_dim=8, cross_attention_dim=16, **common,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ).eval()  # fmt: skip
            inputs["encoder_hidden_states"] = torch.randn(2, 5, 16)
    for parameter in model.parameters():  # nothing is silent from the start
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model, inputs


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out.sample


def test_the_sites_of_a_unet() -> None:
    blocks = Blocks(made("unet")[0])
    assert blocks.sites == [
        "unet.down.0.resnets.0",
        "unet.down.1.attentions.0",
        "unet.down.1.resnets.0",
        "unet.up.0.attentions.0",
        "unet.up.0.attentions.1",
        "unet.up.0.resnets.0",
        "unet.up.0.resnets.1",
        "unet.up.1.resnets.0",
        "unet.up.1.resnets.1",
        "unet.mid.attentions.0",
        "unet.mid.resnets.0",
        "unet.mid.resnets.1",
    ]
    assert blocks["unet.mid.resnets.1"] is blocks.model.mid_block.resnets[1]


def test_the_sites_of_a_resnet() -> None:
    blocks = Blocks(made("resnet18")[0])
    assert blocks.sites == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert len(Blocks(made("resnet50")[0])) == 3 + 4 + 6 + 3


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_block_leaves_its_shortcut(name: str) -> None:
    model, inputs = made(name)
    blocks = Blocks(model)
    whole = run(model, inputs)
    for site in blocks.sites:
        writes = blocks[site].get_submodule(WRITES[type(blocks[site]).__name__])
        hook = writes.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        expected = run(model, inputs)
        hook.remove()
        found = run(blocks.without([site]), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, whole, rtol=1e-5, atol=1e-6), site
    assert torch.equal(run(blocks.without([]), inputs), whole) and torch.equal(run(model, inputs), whole)


def test_a_dropped_resnet_block_keeps_its_scale() -> None:
    block = diffusers.models.resnet.ResnetBlock2D(
        in_channels=4, out_channels=8, temb_channels=None, groups=2, output_scale_factor=2.0
    )
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(resnet_shortcut(block, x, {}), block(x, None))


@pytest.mark.parametrize("name", NAMES)
def test_what_blocks_read_and_give_is_recorded(name: str) -> None:
    model, inputs = made(name)
    blocks = Blocks(model)
    seen, output = blocks.record(**inputs)
    assert set(seen) == set(blocks.sites)
    assert torch.equal(output if isinstance(output, Tensor) else output.sample, run(model, inputs))
    expected: dict[str, Tensor] = {}
    hooks = [
        blocks[site].register_forward_hook(
            lambda module, args, out, site=site: expected.update({site: out if isinstance(out, Tensor) else out[0]})
        )
        for site in blocks.sites
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    assert list(expected) == list(seen) and all(torch.equal(seen[site][1], expected[site]) for site in seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_replaced_by_another_module_with_its_call(name: str) -> None:
    model, inputs = made(name)
    blocks = Blocks(model)

    class Same(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs)

    view = blocks.replaced({site: Same(blocks[site]) for site in blocks.sites})
    assert torch.equal(run(view, inputs), run(model, inputs))
    assert not any(isinstance(module, Same) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_modules(name: str) -> None:
    model, _ = made(name)
    blocks = Blocks(model)
    sizes = blocks.sizes()
    inside = {p for site in blocks.sites for p in blocks[site].parameters()}
    assert sum(sizes.values()) == sum(p.numel() for p in inside) < sum(p.numel() for p in model.parameters())


def test_what_is_not_known_is_refused_in_one_line() -> None:
    with pytest.raises(ArchitectureError, match="the blocks of a Linear are unknown; supported are UNet2DModel"):
        Blocks(nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"'layer9\.0' is not a block of ResNet; a block is like 'layer1\.0'"):
        Blocks(made("resnet18")[0]).without(["layer9.0"])
