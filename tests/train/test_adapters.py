"""Adapters separate from a model: equal to peft's results, with exact sums, and merges that round once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lamella.data import ImageText, InputContext, Processing
from lamella.errors import CheckpointError, ExportError, LamellaError, PlanError, TrainingError
from lamella.evaluate.scored import read_inputs
from lamella.stack import Stack, last_stack, share
from lamella.train import Adapter, Lora, add_lora, concatenate, merge, own
from lamella.zoo.nano import NANO, nano
from lamella.zoo.vlm import shapes_vlm

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
CAUSAL = [name for name in NANO if name != "vit"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def adapted(stack: Stack, seed: int = 0, **options: Any) -> tuple[Any, Lora]:
    """A view whose adapters do something: B is random too."""
    view = share(stack.model)
    lora = add_lora(view, **{"r": 4, "alpha": 8} | options, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for name, each in view.named_parameters():
        if ".lora_B." in name:
            each.copy_(0.1 * torch.randn(each.shape, generator=generator))
    return view, lora


@pytest.mark.parametrize("family", CAUSAL)
def test_plain_peft_reads_and_merges_what_is_written(family: str, tmp_path: Path) -> None:
    stack = Stack(nano(family))
    view, lora = adapted(stack, sites=["layers.0", "layers.3"])
    wanted = logits(view)
    assert (wanted - logits(stack.model)).abs().max() > 1e-3
    folder = lora.adapter().write(tmp_path / "adapter", "nano")

    read = peft.PeftModel.from_pretrained(nano(family), str(folder))
    torch.testing.assert_close(logits(read), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(read.merge_and_unload()), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(merge(stack, Adapter.open(folder)).model), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_what_peft_wrote_is_read_with_its_scale(settings: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1, 3]} | settings
    )
    theirs = peft.get_peft_model(nano("llama"), config)
    for name, each in theirs.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(each, std=0.1)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = merge(Stack(nano("llama")), Adapter.open(tmp_path / "theirs"))
    torch.testing.assert_close(logits(ours.model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_sum_of_unlike_adapters_is_the_sum_of_their_dense_maps_and_goes_through_a_folder(tmp_path: Path) -> None:
    stack = Stack(nano("llama"))
    one = adapted(stack, 1, r=4, alpha=8)[1].adapter()
    two = adapted(stack, 2, r=3, alpha=9, targets=["up_proj"], sites=["layers.1", "layers.2"])[1].adapter()
    both = concatenate([one, two], [0.5, -2.0])
    both.write(tmp_path / "both")
    for each in (both, Adapter.open(tmp_path / "both")):
        assert set(each.modules) == set(one.modules)
        for name in one.modules:
            dense = torch.zeros_like(stack.model.get_submodule(name).weight, dtype=torch.float64)
            for adapter, weight, scale in ((one, 0.5, 2.0), (two, -2.0, 3.0)):
                if name in adapter.pairs:
                    a, b = (half.double() for half in adapter.pairs[name])
                    dense += weight * scale * (b @ a)
            torch.testing.assert_close(each.delta(name).double(), dense, atol=1e-6, rtol=1e-6)


def test_a_merge_in_bfloat16_rounds_once_where_one_after_the_other_loses_what_is_small() -> None:
    stack = Stack(nano("llama").bfloat16())
    name = "model.layers.0.mlp.up_proj"
    weight = stack.model.get_submodule(name).weight
    weight.fill_(1.0)
    small = torch.full((1, 32), 1.0), torch.full((64, 1), 2.0**-10)  # an eighth of the step from 1 to the next number
    adapters = [Adapter({name: small}, {name: 1.0}) for _ in range(8)]
    lost = stack
    for each in adapters:
        lost = merge(lost, each)
    assert torch.equal(lost.model.get_submodule(name).weight, weight)
    kept = merge(stack, concatenate(adapters)).model.get_submodule(name).weight
    assert kept.dtype == torch.bfloat16 and torch.equal(kept, torch.full_like(kept, 1 + 2.0**-7))


def test_merging_changes_the_adapted_weights_of_another_model_only_and_weight_0_changes_none() -> None:
    stack = Stack(nano("llama"))
    before = {name: each.clone() for name, each in stack.model.named_parameters()}
    _, lora = adapted(stack, sites=["layers.1.mlp"])
    adapter = lora.adapter()
    after = dict(merge(stack, adapter).model.named_parameters())
    changed = {name for name, each in after.items() if each is not stack.model.get_parameter(name)}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert all(torch.equal(each, before[name]) for name, each in stack.model.named_parameters())
    assert torch.equal(logits(merge(stack, adapter, 0.0).model), logits(stack.model))
    half, whole = (merge(stack, adapter, weight).model.get_parameter(min(changed)) for weight in (0.5, 1.0))
    torch.testing.assert_close(half, (whole + before[min(changed)]) / 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3"])
def test_of_a_model_with_images_the_text_is_adapted_and_plain_peft_reads_a_module_that_comes_whole(
    kind: str, tmp_path: Path
) -> None:
    model, processor = shapes_vlm(kind, num_hidden_layers=2)
    stack, processing = last_stack(model), Processing(processor)
    rows = ImageText.open("shapes:colour", InputContext(processing_opener=lambda: processing), rows=3)
    inputs = read_inputs(model, rows.batch(rows))
    view, lora = adapted(stack)
    assert {name.startswith(stack.architecture.prefix) for name in lora.modules} == {True}
    adapter = lora.adapter()
    if kind == "llava":
        name = "model.multi_modal_projector"
        own(view, lambda each: each.startswith(name))
        for each in view.get_submodule(name).parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(7)))
        adapter = replace(adapter, whole={name: view.get_submodule(name).state_dict()})
    wanted = view(**inputs).logits
    merged = merge(stack, adapter)
    assert merged.stack == stack.stack and (wanted - model(**inputs).logits).abs().max() > 1e-3
    torch.testing.assert_close(merged.model(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(merge(stack, adapter, 0.0).model(**inputs).logits, model(**inputs).logits)

    folder = adapter.write(tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(shapes_vlm(kind, num_hidden_layers=2)[0], str(folder))
    torch.testing.assert_close(read(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.merge_and_unload()(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    if adapter.whole:
        with pytest.raises(CheckpointError, match="modules_to_save"):
            Adapter.open(folder)
        with pytest.raises(TrainingError, match="merge it alone"):
            concatenate([adapter, adapter])
        with pytest.raises(TrainingError, match="for another model"):
            merge(stack, replace(adapter, whole={name: {"linear_1.weight": torch.zeros(2, 2)}}))


@pytest.mark.parametrize("family", CAUSAL)
def test_sites_hold_all_linear_modules_of_their_layers_each_in_one_half(family: str) -> None:
    stack = Stack(nano(family))

    def modules(*sites: str) -> set[str]:
        return set(add_lora(share(stack.model), sites=sites).modules)

    halves = [modules(f"layers.1.{half}") for half in ("attn", "mlp") if family not in ("qwen3_moe", "olmoe")]
    whole = {name for name, each in stack.model.named_modules() if name.startswith(f"{stack.architecture.prefix}1.")
             and type(each).__name__ in ("Linear", "Conv1D")}  # fmt: skip
    assert modules("layers.1") == whole != set()
    if halves:
        assert halves[0] | halves[1] == whole and not halves[0] & halves[1]
    assert modules("layers.0", "layers.1") == whole | modules("layers.0")
    assert len(modules("layers.0", "layers.3")) == 2 * len(whole)


def test_sites_and_targets_that_hold_nothing_together_are_refused() -> None:
    view = share(nano("llama"))
    with pytest.raises(TrainingError, match=r"there is no linear module at layers.1.attn"):
        add_lora(view, targets=["up_proj"], sites=["layers.1.attn"])
    with pytest.raises(PlanError, match="out of range"):
        add_lora(view, sites=["layers.4"])
    with pytest.raises(TrainingError, match="there is no linear module at no site"):
        add_lora(view, sites=[])


def test_an_adapter_is_refused_by_another_revision_another_size_and_a_tied_weight() -> None:
    stack = Stack(nano("llama"))
    adapter = adapted(stack)[1].adapter()
    with pytest.raises(TrainingError, match="other weights than the model"):
        merge(Stack(nano("llama", seed=1)), adapter)
    assert merge(Stack(nano("llama").bfloat16()), adapter)  # the same revision in another precision
    with pytest.raises(TrainingError, match=r"is \[32, 32\], the adapter's \[48, 48\]"):
        merge(stack, adapted(Stack(nano("llama", hidden_size=48)))[1].adapter())
    with pytest.raises(TrainingError, match=r"has no linear module transformer\.h\.0"):
        merge(stack, adapted(Stack(nano("gpt2")))[1].adapter())
    tied = Stack(nano("llama", tie_word_embeddings=True))
    head = Adapter({"lm_head": (torch.ones(1, 32), torch.ones(128, 1))}, {"lm_head": 1.0})
    with pytest.raises(TrainingError, match="shares its weight"):
        merge(tied, head)
    with pytest.raises(TrainingError, match="trained on different base weights"):
        concatenate([adapter, adapted(Stack(nano("llama", seed=1)))[1].adapter()])
    with pytest.raises(TrainingError, match="give one weight for each"):
        concatenate([adapter], [1.0, 2.0])
    with pytest.raises(TrainingError, match="0 adapters"):
        concatenate([])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}),
     ("init_lora_weights", "pissa"), ("target_parameters", ["experts.down_proj"])],
)  # fmt: skip
def test_an_adapter_that_is_more_than_plain_lora_is_refused(setting: str, value: Any, tmp_path: Path) -> None:
    folder = adapted(Stack(nano("llama")))[1].adapter().write(tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(CheckpointError, match=f"{setting} is .*: only plain LoRA"):
        Adapter.open(folder)


def test_damaged_and_missing_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    adapter = adapted(Stack(nano("llama")))[1].adapter()
    folder = adapter.write(tmp_path / "adapter")
    with pytest.raises(ExportError, match="exists"):
        adapter.write(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    for broken in (folder, tmp_path / "nothing"):
        with pytest.raises(LamellaError) as error:
            Adapter.open(broken)
        assert "\n" not in str(error.value)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="not the folder of a LoRA adapter"):
        Adapter.open(folder)
