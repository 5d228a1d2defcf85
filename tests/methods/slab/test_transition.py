"""From norms to batch norms and away: what is folded computes the same, in float64, of ViTs and of decoders."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lamella.errors import ArchitectureError, MethodError
from lamella.methods.slab.method import rms_statistics
from lamella.methods.slab.modules import PRepBN, initial_repbn
from lamella.methods.slab.networks import VisionConfig
from lamella.methods.slab.sites import Site, sites_of
from lamella.methods.slab.transition import (
    Transition,
    constancy,
    convert,
    fold_after,
    fold_before,
    merge,
    prepbn_modules,
    refresh,
    reshuffled,
    sizes,
)
from lamella.stack import Stack
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised
from lamella.zoo import nano

VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
DECODERS = ("llama", "qwen2", "gpt2", "opt")


def vit(**changes: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, class_token=False, global_pool="avg", **VIT | changes
    )


def stirred(model: nn.Module) -> None:
    """Statistics, gains, shifts and etas that are not what they begin with."""
    for number, each in enumerate(prepbn_modules(model)):
        drawn = torch.Generator().manual_seed(number)
        for name, tensor in each.rep.named_parameters():
            tensor.data.normal_(generator=drawn).add_(0.5 if name == "bn.weight" else 0)
        each.rep.bn.running_mean.normal_(generator=drawn)
        each.rep.bn.running_var.uniform_(0.5, 2, generator=drawn)
        each.rep.bn.num_batches_tracked.fill_(1)
        each.step.fill_(each.steps)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "convolution", "no bias"])
@torch.no_grad()
def test_both_folds_are_what_they_replace(kind: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6).double(), torch.randn(6).double()
    linear = {
        "linear": nn.Linear(6, 6), "no bias": nn.Linear(6, 6, bias=False), "conv1d": Conv1D(6, 6),
        "convolution": nn.Conv2d(6, 6, 3),
    }[kind].double()  # fmt: skip
    if kind != "no bias":
        nn.init.normal_(linear.bias)
    x = torch.randn(2, 6, 5, 5).double() if kind == "convolution" else torch.randn(4, 6).double()
    shape = (1, -1, 1, 1) if kind == "convolution" else (-1,)
    behind = linear(x) * a.view(shape) + b.view(shape)
    folded = copy.deepcopy(linear)
    fold_after(folded, a, b)
    torch.testing.assert_close(folded(x), behind, rtol=1e-11, atol=1e-11)
    before = linear(a.view(shape) * x + b.view(shape))
    folded = copy.deepcopy(linear)
    fold_before(folded, a, b)
    torch.testing.assert_close(folded(x), before, rtol=1e-11, atol=1e-11)


def test_a_shift_before_a_convolution_with_padding_cannot_be_folded() -> None:
    with pytest.raises(MethodError, match="pads with zeros, so the shift of the norm cannot be folded"):
        fold_before(nn.Conv2d(6, 6, 3, padding=1), torch.ones(6), torch.zeros(6))


def test_the_norms_of_a_vit_and_what_reads_them() -> None:
    found = sites_of(vit())
    assert [site.path for site in found] == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "fc_norm",
    ]
    assert found[0].readers == ("blocks.0.attn.qkv",) and found[-1].readers == ("head",)


def test_the_norms_of_a_decoder_and_what_reads_them() -> None:
    found = sites_of(Stack(nano("llama")))
    assert len(found) == 9
    assert found[0] == Site(
        "model.layers.0.input_layernorm", tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    )
    assert found[1].readers == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert found[-1] == Site("model.norm", ("lm_head",))
    with pytest.raises(ArchitectureError):
        sites_of(nn.Linear(2, 2))


@torch.no_grad()
def test_a_merged_vit_computes_what_it_did() -> None:
    model = vit().double()
    sites = sites_of(model)
    convert(model, sites, steps=5)
    model = model.double().eval()
    stirred(model)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    merge(model, sites)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert not [each for each in model.modules() if isinstance(each, nn.LayerNorm | nn.BatchNorm1d | PRepBN)]


NETWORKS = {
    "vit": VisionConfig(size=8, patch=2, channels=1, width=16, depth=(2,), heads=2),
    "swin": VisionConfig("swin", 32, 4, 3, 8, (2, 2, 1), 2, window=4),
    "pvt": VisionConfig("pvt", 32, 4, 1, 8, (1, 2, 1, 1), 2),
}
SITES = {"vit": 5, "swin": 1 + 10 + 2 + 1, "pvt": 4 + 10 + 1}  # patches, layers, merging, the last; reductions later


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("linear", [0, 2, None])
@torch.no_grad()
def test_every_family_computes_the_same_when_merged(family: str, linear: int | None) -> None:
    torch.manual_seed(0)
    network = replace(NETWORKS[family], attention="linear", linear=linear, kernel=3)
    model = network.build(10)
    for each in model.parameters():
        each.add_(0.1 * torch.randn_like(each))  # of biases and positions, too
    sites = sites_of(model)
    reductions = {0: 4, 2: 2, None: 0}[linear] if family == "pvt" else 0  # of the 4 layers with one, those with softmax
    assert len(sites) == SITES[family] + reductions
    convert(model, sites, steps=5)
    model = model.double().eval()
    stirred(model)
    x = torch.randn(3, network.channels, network.size, network.size, dtype=torch.float64)
    before = model(x)
    merge(model, sites)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert not [each for each in model.modules() if isinstance(each, nn.LayerNorm | nn.BatchNorm1d | PRepBN)]


@pytest.mark.parametrize("family", NETWORKS)
@torch.no_grad()
def test_the_last_batch_norm_counts_every_token(family: str) -> None:
    network = NETWORKS[family]
    model = network.build(10)
    sites = sites_of(model)
    convert(model, sites, steps=0)
    counted: list[int] = []
    last: Any = model.get_submodule(sites[-1].path)
    last.rep.bn.register_forward_pre_hook(lambda module, given: counted.append(len(given[0])))
    model.train()(torch.randn(3, network.channels, network.size, network.size))
    assert counted == [3 * network.sides[-1] ** 2]


def test_sizes_that_do_not_fit_are_refused() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=40, window_size=4, embed_dim=12, depths=(1,),
                              num_heads=(1,))  # fmt: skip
    with pytest.raises(ArchitectureError, match="pads its windows with zeros after the norm"):
        sites_of(model)
    with pytest.raises(MethodError, match="window 4: a stage has 10 tokens per side"):
        VisionConfig("swin", 40, 4, 3, 8, (1,), 2, window=4)
    with pytest.raises(MethodError, match="depth 1, 1: a vit has at most 1 stages"):
        VisionConfig(depth=(1, 1))
    with pytest.raises(MethodError, match="a pvt has patches of 4"):
        VisionConfig("pvt")


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_merged_decoder_computes_what_it_did_with_a_cache_too(name: str) -> None:
    model = copy.deepcopy(nano(name)).double()
    model.config.tie_word_embeddings = False
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.clone())
    sites = sites_of(Stack(model))
    convert(model, sites, steps=5)
    model = model.double().eval()
    stirred(model)
    ids = torch.randint(3, 100, (2, 7))
    before = model(ids).logits
    merge(model, sites)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-9, atol=1e-9)
    cache = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=cache.past_key_values).logits  # nothing of a token depends on another
    torch.testing.assert_close(rest, before[:, 4:], rtol=1e-9, atol=1e-9)


def test_what_is_not_done_cannot_be_merged() -> None:
    model = vit()
    sites = sites_of(model)
    with pytest.raises(MethodError, match="is a LayerNorm, not a converted norm"):
        merge(model, sites)
    convert(model, sites, steps=8)
    with pytest.raises(
        MethodError, match=r"blocks.0.norm1 is at step 0, where the norm still has the weight 1.00: train to the end"
    ):
        merge(model, sites)
    for each in prepbn_modules(model):
        each.step.fill_(8)
    with pytest.raises(MethodError, match=r"blocks\.0\.norm1 has no statistics yet"):
        merge(model, sites)


def test_a_tied_head_would_be_scaled_twice() -> None:
    model = copy.deepcopy(nano("gpt2"))
    sites = sites_of(Stack(model))
    convert(model, sites, steps=0)
    stirred(model)
    with pytest.raises(MethodError, match="lm_head has a tied weight,"):
        merge(model, sites)


def test_steps_are_those_of_the_optimizer_however_many_passes_they_have(tmp_path: Path) -> None:
    model = vit()
    convert(model, sites_of(model), steps=4)
    rows = [{"x": torch.randn(1, 8, 8), "y": torch.tensor(n % 10)} for n in range(16)]
    config = TrainConfig(steps=3, lr=1e-3, batch=4, accumulate=2, save_every=2)
    fit(
        model,
        rows,
        supervised(class_cross_entropy),
        config,
        out=tmp_path / "run",
        trainable=lambda name: True,
        hooks=[Transition()],
    )
    assert [int(each.step) for each in prepbn_modules(model)] == [3] * 5
    assert prepbn_modules(model)[0].gamma == 0.25
    again = vit()
    convert(again, sites_of(again), steps=4)
    fit(
        again,
        rows,
        supervised(class_cross_entropy),
        config,
        out=tmp_path / "run",
        trainable=lambda name: True,
        hooks=[Transition()],
    )
    assert [int(each.step) for each in prepbn_modules(again)] == [3] * 5
    bns = [
        (a.rep.bn.running_mean, b.rep.bn.running_mean)
        for a, b in zip(prepbn_modules(model), prepbn_modules(again), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in bns)


@torch.no_grad()
def test_statistics_are_measured_again_and_nothing_else_changes() -> None:
    model = vit(drop_path_rate=0.3)
    convert(model, sites_of(model), steps=0)
    model.eval()
    before = {name: each.clone() for name, each in model.named_parameters()}
    batches = [torch.randn(8, 1, 8, 8) for _ in range(4)]
    seen: list[Tensor] = []
    first = prepbn_modules(model)[0]
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, 1).clone()))
    refresh(model, [batches], model, iter([1.0, 0.0]).__next__)
    hook.remove()
    tokens = torch.stack(seen)  # what the first norm reads does not depend on the others
    torch.testing.assert_close(first.rep.bn.running_mean, tokens.mean((0, 1)))
    torch.testing.assert_close(first.rep.bn.running_var, tokens.var(1).mean(0))
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert not any(each.rep.bn.training for each in prepbn_modules(model)) and first.rep.bn.momentum == 0.1


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((3.0, 2.0, 1.0), 2), ((3.0, 1.0, 2.0), 1), ((1.0, 2.0, 3.0), 0), ((float("nan"), 2.0, 3.0), 1)],
)
@torch.no_grad()
def test_all_passes_count_and_the_best_statistics_are_kept(scores: tuple[float, ...], kept: int) -> None:
    model = vit()
    convert(model, sites_of(model), steps=0)
    model.eval()
    first: Any = prepbn_modules(model)[0].rep.bn
    first.running_mean.fill_(7)
    passes = [[torch.randn(8, 1, 8, 8) for _ in range(2)] for _ in range(2)]
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, given: seen.append(given[0].mean(0)))
    assert refresh(model, passes, model, iter(scores).__next__)[1:] == list(scores[1:])
    hook.remove()
    expected = torch.stack(seen[: 2 * kept]).mean(0) if kept else torch.full((24,), 7.0)
    torch.testing.assert_close(first.running_mean, expected)
    assert int(first.num_batches_tracked) == 2 * kept


def test_every_pass_has_all_items_in_another_order() -> None:
    first, second = ([each for batch in one for each in batch] for one in reshuffled(range(20), 2, 3, list, 0))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


@torch.no_grad()
def test_norms_whose_tokens_are_alike_are_found() -> None:
    model = copy.deepcopy(nano("llama")).eval()
    sites = sites_of(Stack(model))
    ids = torch.randint(3, 100, (2, 6))
    found = constancy(sizes(model, sites, lambda: model(ids)))
    states = model(ids, output_hidden_states=True).hidden_states
    rms = states[0].square().mean(-1).sqrt().flatten().numpy()
    assert found["model.layers.0.input_layernorm"] == pytest.approx(float(np.std(rms, ddof=1) / rms.mean()), rel=1e-4)
    assert len(found) == 9 and initial_repbn(model.model.norm, "norm").eta == 0


@torch.no_grad()
def test_a_first_token_that_is_large_counts_where_it_is_asked_whether_tokens_are_alike() -> None:
    model = copy.deepcopy(nano("llama")).eval()
    ids = torch.randint(3, 100, (2, 6))
    ids[:, 0] = 0
    usual, divides = rms_statistics(Stack(model), sites_of(Stack(model)), ids)
    model.get_input_embeddings().weight[0] *= 100
    varies, same = rms_statistics(Stack(model), sites_of(Stack(model)), ids)
    norm = "model.layers.0.input_layernorm"
    assert varies[norm] > 2 > usual[norm]
    assert same[norm] == pytest.approx(divides[norm])
