"""Published layouts: LLaDA-V and LaViDa open from their own configs and names, and read images as their code does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

import lamella
from lamella.data import MARK, ImageTextRow, Processing
from lamella.errors import CheckpointError
from lamella.runtime import Sampler, denoise
from lamella.stack.diffusion_vlm import LlavaDiffusion
from lamella.zoo.opening import open_processor
from lamella.zoo.published import IMAGE, SIGLIP, config_of, grids, renamed
from lamella.zoo.worlds.words import word_tokenizer

TILE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TILE |= {"image_size": 32, "patch_size": 8}
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAVA = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad", "mm_hidden_size": 32}
LLAVA |= {"vision_config": TILE}
BOUNDS = "[(32, 64), (64, 32), (64, 64), (96, 32), (32, 96)]"
CONFIGS: dict[str, dict[str, Any]] = {
    "llada-v": SIZES
    | LLAVA
    | {"model_type": "llava_llada", "mm_vision_tower": "model/siglip2-so400m-patch14-384", "num_key_value_heads": 4}
    | {"image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": "(1x1),...,(3x3)"},
    "lavida-llada": LLAVA
    | {"d_model": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 96, "block_type": "llama"}
    | {"model_type": "llava_llada", "mm_vision_tower": "google/siglip-so400m-patch14-384"}
    | {"image_aspect_ratio": "anyres", "image_grid_pinpoints": BOUNDS},
    "lavida-dream": SIZES
    | LLAVA
    | {"model_type": "llava_dream", "mm_vision_tower": "google/siglip-so400m-patch14-384", "num_key_value_heads": 2}
    | {"image_aspect_ratio": "anyres", "image_grid_pinpoints": BOUNDS},
}
# Names in the published files, and in Lamella's class: written out here, independently of the patterns.
LLADA_V = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
OUTER = {"embed_tokens": "wte", "norm": "ln_f"}


def published(name: str, kind: str) -> str:
    """The name in the published file of a tensor of Lamella's class."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_tower.')}"
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        if name.startswith(f"multi_modal_projector.{layer}."):
            return f"model.mm_projector.{number}.{name.rsplit('.', 1)[1]}"
    if name == "image_newline":
        return "model.image_newline"
    name = name.removeprefix("language_model.")
    if kind == "lavida-dream":
        return name
    name = name.removeprefix("model.transformer.")
    if kind == "lavida-llada":
        return f"model.transformer.{name}"
    block = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block:
        theirs = next(theirs for theirs, ours in LLADA_V.items() if ours == block[2])
        return f"model.layers.{block[1]}.{theirs}.{block[3]}"
    if name.startswith("ff_out."):
        return f"lm_head.{name.removeprefix('ff_out.')}"
    module, what = name.split(".")
    return f"model.{next(theirs for theirs, ours in OUTER.items() if ours == module)}.{what}"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return written(request.param, tmp_path / request.param)


def written(kind: str, folder: Path) -> Path:
    """A folder in a published layout, with random weights."""
    folder.mkdir()
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    config = CONFIGS[kind] | {"vocab_size": len(tokenizer) + 8, "mask_token_id": tokenizer.mask_token_id}
    config |= {"auto_map": {"AutoModel": "modeling.Model"}, "architectures": ["LlavaLLaDAModelLM"], "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = LlavaDiffusion(config_of(folder))
    tensors = {published(name, kind): value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def row(height: int, width: int) -> ImageTextRow:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    question = {"role": "user", "content": f"{MARK} what colour is the circle?"}
    return ImageTextRow((image,), (question, {"role": "assistant", "content": "red"}))


def as_published(model: Any, tiles: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The positions of an image, step by step as in the published code (llava_arch.py)."""
    inner, config = model.model, model.config
    states = inner.vision_tower(tiles, output_hidden_states=True).hidden_states[-1]
    features = inner.multi_modal_projector(states)
    if config.image_pooling > 1:  # get_2dPool, bilinear
        side = int(math.sqrt(features.shape[1]))
        views = features.view(len(features), side, side, -1).permute(0, 3, 1, 2)
        views = interpolate(views, size=[math.ceil(side / 2)] * 2, mode="bilinear")
        features = views.permute(0, 2, 3, 1).reshape(len(features), -1, features.shape[-1])
    base, rest = features[0], features[1:]
    unit = int(math.sqrt(len(base)))
    shapes = [(w // 32, h // 32) for h, w in config.image_grid_pinpoints]  # in tiles, width first

    def fits(shape: tuple[int, int]) -> tuple[float, float]:
        scale = min(shape[0] * 32 / width, shape[1] * 32 / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, -(shape[0] * shape[1] * 32 * 32 - used)

    columns, rows = max(shapes, key=fits)
    assert columns * rows == len(rest)
    grid = rest.view(rows, columns, unit, unit, -1).permute(4, 0, 2, 1, 3).contiguous()
    grid = grid.flatten(1, 2).flatten(2, 3)
    now_height, now_width = grid.shape[1:]
    if width / height > now_width / now_height:  # unpad_image
        padding = (now_height - int(height * (now_width / width))) // 2
        grid = grid[:, padding : now_height - padding]
    else:
        padding = (now_width - int(width * (now_height / height))) // 2
        grid = grid[:, :, padding : now_width - padding]
    _, h, w = grid.shape
    times = math.sqrt(h * w / (4 * unit**2)) if config.max_tiles == 4 else 0
    if times > 1.1:
        grid = interpolate(grid[None], [int(h // times), int(w // times)], mode="bilinear")[0]
    newline = inner.image_newline[:, None, None].expand(*grid.shape[:-1], 1)
    grid = torch.cat((grid, newline), dim=-1).flatten(1, 2).transpose(0, 1)
    return torch.cat((base, grid), dim=0)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (30, 30), (90, 40), (96, 96), (64, 64)])
def test_a_model_reads_images_as_the_published_code_does(folder: Path, height: int, width: int) -> None:
    model = lamella.open(folder)
    assert isinstance(model.model, LlavaDiffusion) and list(model.stacks) == ["vision", "text"]
    batch = Processing(open_processor(folder)).prompts([row(height, width)])
    inner = model.model.model
    wanted = as_published(model.model, batch["pixel_values"][0], height, width)
    marks = batch["input_ids"] == model.model.config.image_token_id
    assert marks.sum() == len(wanted)
    h = inner.language_model.get_input_embeddings()(batch["input_ids"])
    h[marks] = wanted
    logits = inner.language_model(inputs_embeds=h, attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(model.model(**batch).logits, logits, atol=1e-5)


def test_a_batch_denoises_and_the_model_is_saved_under_its_own_names(folder: Path, tmp_path: Path) -> None:
    model = lamella.open(folder).model
    processing = Processing(open_processor(folder))
    batch = processing.prompts([row(40, 90), row(64, 64)])
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    sampler = Sampler(length=4, steps=2)
    together = denoise(model, ids, mask, sampler, **batch)[:, -4:]
    for number, size in enumerate([(40, 90), (64, 64)]):
        one = processing.prompts([row(*size)])
        own = denoise(model, one.pop("input_ids"), one.pop("attention_mask"), sampler, **one)[:, -4:]
        assert torch.equal(own[0], together[number])
    model.save_pretrained(tmp_path / "saved")
    processing.processor.save_pretrained(tmp_path / "saved")
    again = lamella.open(tmp_path / "saved").model
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_all_names_of_the_published_llada_v_are_matched() -> None:
    config = LlavaDiffusion.config_class(
        vision_config=SIGLIP,
        text_config={"model_type": "llada", "hidden_size": 4096, "num_hidden_layers": 32, "mlp_hidden_size": 12288},
        image_grid_pinpoints=grids("(1x1),...,(6x6)", 384),
    )
    with torch.device("meta"):
        model = LlavaDiffusion(config)
    language = {name: each for name, each in model.state_dict().items() if "language_model" in name}
    # The index of the language model that LLaDA-V starts from: 291 tensors, 16,031,162,368 bytes in bfloat16.
    assert len(language) == 32 * 9 + 3
    assert sum(2 * each.numel() for each in language.values()) == 16_031_162_368
    names = {f"model.layers.{layer}.{theirs}.weight" for layer in range(32) for theirs in LLADA_V}
    names |= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert {published(name, "llada-v") for name in language} == names


def test_every_published_name_is_mapped(folder: Path) -> None:
    names = set(LlavaDiffusion(config_of(folder)).state_dict())
    kind = CONFIGS[folder.name]["model_type"]
    assert {renamed(published(each, folder.name), kind) for each in names} == names


def test_grids_are_those_of_the_published_configs() -> None:
    assert grids("[(384, 768), (768, 384)]", 384) == [[768, 384], [384, 768]]
    every = grids("(1x1),...,(6x6)", 384)
    assert len(every) == 36 and every[0] == [384, 384] and every[-1] == [2304, 2304]
    with pytest.raises(CheckpointError, match="pairs of width and height"):
        grids("__import__('os')", 384)
    with pytest.raises(CheckpointError, match="a range of tiles"):
        grids("(99999x99999)", 384)


@pytest.mark.parametrize("name", ["mm_projector_type", "mm_vision_tower", "mm_patch_merge_type", "image_aspect_ratio"])
def test_other_settings_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = written("llada-v", tmp_path / "llada-v")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: "other"}))
    with pytest.raises(CheckpointError, match=name) as error:
        lamella.open(folder)
    assert "\n" not in str(error.value)
    assert IMAGE not in str(error.value)
