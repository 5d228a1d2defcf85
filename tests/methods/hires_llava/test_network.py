"""A model that reads slices: what it is before training, beside LLaVA, in batches, in generation, and on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import lamella
from lamella.data import ImageTextRow, Processing
from lamella.errors import ArchitectureError, MethodError
from lamella.methods.hires_llava import HiResLlava, with_slices
from lamella.methods.hires_llava.slicing import TileLayout
from lamella.stack import open_model
from lamella.train import response_loss
from lamella.zoo import open_processor
from lamella.zoo.nano import nano
from lamella.zoo.vlm import shapes_vlm

SIZES = ((64, 64), (32, 32), (50, 90), (20, 120))


@pytest.fixture(scope="module")
def llava() -> Any:
    return shapes_vlm("llava", num_hidden_layers=2)


def pictures(seed: int = 0) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed)
    return [drawn.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def rows() -> list[ImageTextRow]:
    said = ("what is in the picture?", "how many things are there?", "where?", "what is in the picture?")
    return [
        ImageTextRow(
            (each,), ({"role": "user", "content": f"<image>\n{text}"}, {"role": "assistant", "content": "two"})
        )
        for each, text in zip(pictures(), said, strict=True)
    ]


def disturbed(model: HiResLlava, seed: int = 0) -> HiResLlava:
    """With its new networks as if they were trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, each in model.named_parameters():
        if any(part in name for part in ("slice_restore", "sampler")):
            each.data += 0.1 * torch.randn(each.shape, generator=generator)
    return model


def test_fresh_adapters_leave_the_tower_as_it_is_to_the_bit(llava: Any) -> None:
    model, processor = with_slices(*llava, restored=[0, 1])
    made = processor.image_processor([Image.fromarray(each) for each in pictures()], return_tensors="pt")
    grids = tuple(model.model.slicing.known(*size) for size in made["image_sizes"].tolist())
    slices = TileLayout(model.model.slicing, grids)
    counts = [after - before for before, after in zip(slices.starts, slices.starts[1:], strict=False)]
    tiles = torch.cat([each[:count] for each, count in zip(made["pixel_values"], counts, strict=True)])
    states = llava[0].model.vision_tower(tiles, output_hidden_states=True).hidden_states[-1][:, 1:]
    assert torch.equal(model.model.features(tiles, slices).flatten(1, 2), states)
    trained = disturbed(model).model.features(tiles, slices).flatten(1, 2)
    assert torch.equal(trained[slices.views], states[slices.views]) and not torch.equal(trained, states)


def test_an_image_of_one_slice_without_a_sampler_is_read_as_llava_reads_it(llava: Any) -> None:
    """The view, or the one slice, is LLaVA's whole image; beside it stands what ends its rows."""
    model, processor = with_slices(*llava, restored=[0], sampler="all")
    picture = Image.fromarray(pictures()[1])
    made = processor.image_processor([picture], return_tensors="pt")
    (read,) = model.model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output
    pixels = llava[1].image_processor([picture], return_tensors="pt")["pixel_values"]
    (whole,) = llava[0].get_image_features(pixels).pooler_output
    across = model.model.slicing.across
    torch.testing.assert_close(read[: across**2], whole, rtol=1e-5, atol=1e-5)
    rows = read[across**2 + 1 :].unflatten(0, (across, across + 1))
    torch.testing.assert_close(rows[:, :-1].flatten(0, 1), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[:, -1], model.model.row_end.expand(across, -1))


@pytest.mark.parametrize("settings", [
    {"restored": [0, 1]}, {"restored": [1], "view": "sampled", "order": "slices"}, {"view": "none", "scope": "slice"},
    {"overlap": 16}, {"sampler": "pool", "window": 4}, {"sampler": "learnt"}, {"sampler": "shuffle"},
    {"sampler": "convolution"}, {"restored": [0], "confined": True}, {"restored": [0], "branches": "local"},
])  # fmt: skip
def test_rows_of_mixed_sizes_are_what_they_are_alone(llava: Any, settings: dict[str, Any]) -> None:
    model, processor = with_slices(*llava, **settings)
    processing, every = Processing(processor), rows()
    disturbed(model)
    batch = processing.batch(every)
    inputs = {name: each for name, each in batch.items() if name not in ("labels", "prompt_lengths")}
    together = model(**inputs).logits
    for place, row in enumerate(every):
        one = {n: e for n, e in processing.batch([row]).items() if n not in ("labels", "prompt_lengths")}
        alone = model(**one).logits[0]
        torch.testing.assert_close(together[place, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_writes_what_whole_passes_say(llava: Any) -> None:
    model, processor = with_slices(*llava, restored=[0, 1])
    disturbed(model)
    prompts = Processing(processor).prompts(rows())
    written = model.generate(**prompts, max_new_tokens=5, do_sample=False)[:, -5:]
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for step in range(5):
        whole = model(**{**prompts, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits[:, -1]
        assert torch.equal(whole.argmax(-1), written[:, step])
        ids = torch.cat([ids, written[:, step : step + 1]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def test_a_tower_without_a_class_token_is_sliced_too(llava: Any, tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4, **tower},
        text_config=llava[0].config.text_config.to_dict(),
        image_token_index=llava[0].config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    reads = transformers.LlavaProcessor(images, llava[1].tokenizer, 4, "full")
    plain = transformers.LlavaForConditionalGeneration(config).eval()
    model, processor = with_slices(plain, reads, restored=[1])
    tiles = torch.randn(4, 3, 32, 32)
    states = plain.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-1]
    fresh = model.model.features(tiles, TileLayout(model.model.slicing, (model.model.slicing.known(32, 96),)))
    assert torch.equal(fresh.flatten(1, 2), states)
    disturbed(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = lamella.open(tmp_path)
    batch = {n: e for n, e in Processing(processor).batch(rows()).items() if n not in ("labels", "prompt_lengths")}
    assert list(opened.stacks) == ["vision", "text"] and len(opened.stacks["vision"]) == 3
    assert torch.equal(opened.model(**batch).logits, model(**batch).logits)


def test_it_runs_in_half_precision(llava: Any) -> None:
    model, processor = with_slices(copy.deepcopy(llava[0]).bfloat16(), llava[1], restored=[0])
    assert {each.dtype for each in disturbed(model).parameters()} == {torch.bfloat16}
    batch = {n: e for n, e in Processing(processor).batch(rows()).items() if n not in ("labels", "prompt_lengths")}
    whole = model(**batch).logits
    assert whole.dtype == torch.bfloat16 and torch.isfinite(whole).all()


def test_beams_are_those_of_each_row_alone(llava: Any) -> None:
    model, processor = with_slices(*llava, restored=[0])
    processing = Processing(processor)
    how = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = model.generate(**processing.prompts(rows()), **how)[:, -4:]
    for place, row in enumerate(rows()):
        assert torch.equal(model.generate(**processing.prompts([row]), **how)[0, -4:], together[place])


def test_what_is_written_is_opened_with_its_processor(llava: Any, tmp_path: Path) -> None:
    model, processor = with_slices(*llava, restored=[1], most_slices=4, window=4, order="slices", seed=3)
    disturbed(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = lamella.open(tmp_path)
    assert isinstance(opened.model, HiResLlava) and list(opened.stacks) == ["vision", "text"]
    again = Processing(open_processor(tmp_path))
    for name, each in Processing(processor).batch(rows()).items():
        assert torch.equal(again.batch(rows())[name], each)
    batch = {n: e for n, e in again.batch(rows()).items() if n not in ("labels", "prompt_lengths")}
    assert torch.equal(opened.model(**batch).logits, model(**batch).logits)


def test_engines_with_another_llava_do_not_take_it_for_one(llava: Any, tmp_path: Path) -> None:
    with_slices(*llava, restored=[1])[0].save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "hires_llava" and written["architectures"] == ["HiResLlava"]


def test_gradient_checkpointing_changes_no_gradient(llava: Any) -> None:
    """Layers with adapters get the layout of their tiles again when they are computed again."""
    model, processor = with_slices(*llava, restored=[0, 1])
    batch = Processing(processor).batch(rows())
    disturbed(model).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        response_loss(model, batch).backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    plain = gradients()
    ran, calls = model.model.layers[0].slice_restore.forward, []
    model.model.layers[0].slice_restore.forward = lambda h, slices: (calls.append(1), ran(h, slices))[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(calls) == 2  # once more in the backward pass
    assert plain.keys() == again.keys() and any("slice_restore" in name for name in plain)
    assert all(torch.equal(each, again[name]) for name, each in plain.items())


def test_a_view_runs_its_own_layers(llava: Any) -> None:
    model, processor = with_slices(*llava, restored=[0])
    opened = open_model(disturbed(model))
    view = lamella.apply(opened, lamella.Plan(model=lamella.plan.ModelReference.of(opened)))
    batch = {n: e for n, e in Processing(processor).batch(rows()).items() if n not in ("labels", "prompt_lengths")}
    before = model(**batch).logits
    assert torch.equal(view(**batch).logits, before)
    view.model.layers[0].slice_restore.local.gate = torch.nn.Parameter(torch.full((128,), 9.0))
    assert not torch.equal(view(**batch).logits, before) and torch.equal(model(**batch).logits, before)


def test_a_dropped_layer_takes_its_adapter_along(llava: Any, tmp_path: Path) -> None:
    model, processor = with_slices(*llava, restored=[0, 1])
    disturbed(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = lamella.open(tmp_path)
    plan = lamella.Plan(model=lamella.plan.ModelReference.of(opened), drop=["vision.layers.1.attn"])
    batch = {n: e for n, e in Processing(processor).batch(rows()).items() if n not in ("labels", "prompt_lengths")}
    cut = lamella.apply(opened, plan)(**batch).logits
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, *_, **__: hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
    torch.testing.assert_close(cut, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_given_model_stays_as_it_is_and_seeds_decide(llava: Any) -> None:
    before = {name: each.clone() for name, each in llava[0].state_dict().items()}
    one, two, other = (with_slices(*llava, restored=[0], seed=seed)[0] for seed in (0, 0, 1))
    disturbed(one)
    assert all(torch.equal(before[name], each) for name, each in llava[0].state_dict().items())
    gates = [each.model.layers[0].slice_restore.local.mix.weight for each in (two, other)]
    assert not torch.equal(*gates)
    assert torch.equal(two.model.row_end, with_slices(*llava, restored=[0])[0].model.row_end)


def test_a_model_that_reads_slices_keeps_what_still_fits(llava: Any) -> None:
    model, processor = with_slices(*llava, restored=[0])
    again, _ = with_slices(disturbed(model), processor, restored=[0, 1])
    kept = again.model.layers[0].slice_restore.local.mix.weight
    assert torch.equal(kept, model.model.layers[0].slice_restore.local.mix.weight)


def test_what_cannot_be_is_refused_in_one_line(llava: Any) -> None:
    with pytest.raises(MethodError, match="layers must be different and between 0 and 1"):
        with_slices(*llava, restored=[2])
    with pytest.raises(MethodError, match="overlapping slices cannot be mixed"):
        with_slices(*llava, restored=[0], overlap=8)
    with pytest.raises(MethodError, match="no sampler 'best'"):
        with_slices(*llava, sampler="best")
    with pytest.raises(MethodError, match="cannot be divided into windows"):
        with_slices(*llava, window=3)
    with pytest.raises(ArchitectureError, match="models of LLaVA's class"):
        with_slices(nano("llama"), llava[1])
    model, processor = with_slices(*llava)
    with pytest.raises(MethodError, match="most_slices is fixed by the model"):
        processor.image_processor(Image.fromarray(pictures()[0]), most_slices=1)
    plain = llava[1](text=["<image> where?"], images=[Image.fromarray(pictures()[1])], return_tensors="pt")
    with pytest.raises(ArchitectureError, match="use the processor saved with"):
        model(**plain)
