"""Masked diffusion models that read images: opened from a folder, compared with their language model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lamella
from lamella.data import MARK, ImageTextRow, Processing
from lamella.errors import ArchitectureError
from lamella.runtime import Sampler, denoise
from lamella.stack.diffusion_config import LlavaDiffusionConfig
from lamella.stack.diffusion_vlm import LlavaDiffusion
from lamella.zoo.opening import open_processor
from lamella.zoo.vlm import shapes_vlm

KINDS = {"llava_llada": "llada", "llava_dream": "Dream"}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for each in shapes_vlm(request.param, num_hidden_layers=2):
        each.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def rows(images: int, texts: int) -> list[ImageTextRow]:
    drawn = np.random.default_rng(0)
    reply = {"role": "assistant", "content": "red"}
    asked = [({"role": "user", "content": f"{MARK} what colour is the circle?"}, reply)] * images
    asked += [({"role": "user", "content": "how many shapes are there?"}, reply)] * texts
    pictures = [drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(images)]
    return [ImageTextRow((pictures[at],) if at < images else (), each) for at, each in enumerate(asked)]


def test_a_folder_opens_with_two_stacks_and_says_what_its_language_model_says(folder: Path) -> None:
    model = lamella.open(folder)
    assert isinstance(model.model, LlavaDiffusion) and list(model.stacks) == ["vision", "text"]
    text = model.stacks["text"]
    assert text.architecture.name == KINDS[folder.name] and text.architecture.objective == "masked tokens"
    batch = Processing(open_processor(folder)).prompts(rows(2, 1))
    inner = model.model.model
    states = inner.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
    h = inner.language_model.get_input_embeddings()(batch["input_ids"])
    h[batch["input_ids"] == model.model.config.image_token_id] = inner.multi_modal_projector(states).flatten(0, 1)
    wanted = inner.language_model(inputs_embeds=h, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model.model(**batch).logits, wanted)
    context = text.context(batch)
    assert torch.equal(text.head(text.run(context.h, 0, 2, context)), wanted)
    assert context.modalities["image"].sum(dim=1).tolist() == [64, 64, 0]


def test_more_or_fewer_images_than_placeholders_are_refused(folder: Path) -> None:
    model = lamella.open(folder).model
    batch = Processing(open_processor(folder)).prompts(rows(2, 0))
    for pixels in (None, batch["pixel_values"][:1]):
        with pytest.raises(ArchitectureError, match="128 placeholder positions for images") as error:
            denoise(model, batch["input_ids"], batch["attention_mask"], Sampler(length=2), pixel_values=pixels)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("cache", ["none", "prompt"])
def test_a_batch_with_and_without_images_is_its_rows_alone_and_the_model_stays_as_it_is(
    folder: Path, cache: str
) -> None:
    model = lamella.open(folder).model.double()
    processing, sampler = Processing(open_processor(folder)), Sampler(length=4, steps=2, cache=cache)  # type: ignore[arg-type]
    before = {name: sorted(each.__dict__) for name, each in model.named_modules()}
    asked = rows(1, 1)

    def answers(some: list[ImageTextRow]) -> torch.Tensor:
        batch = processing.prompts(some)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].double()
        return denoise(model, sampler=sampler, **batch)[:, -4:]

    assert torch.equal(answers(asked), torch.cat([answers([each]) for each in asked]))
    assert {name: sorted(each.__dict__) for name, each in model.named_modules()} == before


def test_a_language_model_that_predicts_the_next_token_is_refused() -> None:
    text = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaDiffusionConfig(text_config=text.to_dict())
    with pytest.raises(ArchitectureError, match="a llama does not predict masked tokens"):
        LlavaDiffusion(config)
