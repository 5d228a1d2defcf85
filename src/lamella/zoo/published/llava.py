"""LLaDA-V and LaViDa, masked-diffusion models that read images.

Both are made with the code of LLaVA-NeXT: one flat config for the language model and what reads images, and the tensor
names of its classes. Here their config becomes that of :class:`lamella.stack.diffusion_vlm.LlavaDiffusion`, the names
are mapped while the weights are read, and the processor is LLaVA-OneVision's, which cuts images into the same tiles.

    LLaDA-V (You et al., 2025, arXiv 2505.16933)    github.com/ML-GSAI/LLaDA-V
    LaViDa (Li et al., 2025, arXiv 2505.16839)      github.com/jacklishufan/LaViDa
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from lamella.errors import CheckpointError
from lamella.plan import checkpoint
from lamella.zoo.published.layout import IMAGE, PublishedLayout

TEXTS = {"llava_llada": "llada", "llava_dream": "Dream"}  # model type of the language model
SIGLIP = {  # google/siglip-so400m-patch14-384 and siglip2-so400m-patch14-384 without the last layer and the head
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
TOWERS = ("siglip-so400m-patch14-384", "siglip2-so400m-patch14-384")
UNLIMITED = 10**6  # tiles, where the processor needs a number
POOLING = 2  # of LaViDa, whose config does not say so: the authors set it by an environment variable

INSIDE = "model.language_model.model."
IMAGES = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
}
LLADA = {  # LLaDA-V names LLaDA's modules as Llama's, LaViDa keeps their names
    r"^model\.layers\.(\d+)\.self_attn\.o_proj\.": rf"{INSIDE}transformer.blocks.\1.attn_out.",
    r"^model\.layers\.(\d+)\.self_attn\.": rf"{INSIDE}transformer.blocks.\1.",
    r"^model\.layers\.(\d+)\.mlp\.gate_proj\.": rf"{INSIDE}transformer.blocks.\1.ff_proj.",
    r"^model\.layers\.(\d+)\.mlp\.down_proj\.": rf"{INSIDE}transformer.blocks.\1.ff_out.",
    r"^model\.layers\.(\d+)\.mlp\.": rf"{INSIDE}transformer.blocks.\1.",
    r"^model\.layers\.(\d+)\.input_layernorm\.": rf"{INSIDE}transformer.blocks.\1.attn_norm.",
    r"^model\.layers\.(\d+)\.post_attention_layernorm\.": rf"{INSIDE}transformer.blocks.\1.ff_norm.",
    r"^model\.embed_tokens\.": f"{INSIDE}transformer.wte.",
    r"^model\.norm\.": f"{INSIDE}transformer.ln_f.",
    r"^lm_head\.": f"{INSIDE}transformer.ff_out.",
    r"^model\.transformer\.": f"{INSIDE}transformer.",
}
DREAM = {
    r"^model\.(layers|embed_tokens|norm)\.": rf"{INSIDE}\1.",
    r"^lm_head\.": "model.language_model.lm_head.",
}


def config_of(place: Path) -> Any:
    """Return the config of the model in a folder.

    Args:
        place: the folder.

    Raises:
        CheckpointError: for settings that no published checkpoint has.
    """
    from lamella.stack.diffusion_config import LlavaDiffusionConfig

    found = checkpoint.read_json(place / "config.json")
    kind, tower = TEXTS[found["model_type"]], str(found.get("mm_vision_tower", "")).rsplit("/", 1)[-1]
    expected = {
        "mm_projector_type": (found.get("mm_projector_type"), "mlp2x_gelu"),
        "mm_patch_merge_type": (found.get("mm_patch_merge_type"), "spatial_unpad"),
        "mm_vision_tower": (tower, " or ".join(TOWERS)),
    }
    for name, (value, known) in expected.items():
        if value not in known.split(" or "):
            raise CheckpointError(f"{place}: {name} '{value}' is not supported: published checkpoints have {known}")
    vision = SIGLIP | found.get("vision_config", {})
    ratio = str(found.get("image_aspect_ratio", "anyres"))
    limit = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if limit is None and ratio != "anyres":
        raise CheckpointError(f"{place}: image_aspect_ratio '{ratio}' is not supported: give anyres or anyres_max_N")
    return LlavaDiffusionConfig(
        vision_config=vision,
        text_config={name: value for name, value in found.items() if not name.startswith("mm_")} | {"model_type": kind},
        image_token_index=open_tokens(place).convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grids(found["image_grid_pinpoints"], vision["image_size"]),
        max_tiles=None if limit is None else int(limit[1]),
        image_pooling=POOLING if limit is None else 1,
        tie_word_embeddings=False,
    )


def grids(pinpoints: str | list[Any], size: int) -> list[list[int]]:
    """Return the sizes in pixels [height, width] of grids of tiles.

    Args:
        pinpoints: widths and heights as a list or its text; or a range such as ``(1x1),...,(6x6)``, in tiles.
        size: height and width of a tile.

    Raises:
        CheckpointError: for anything else.
    """
    if isinstance(pinpoints, str) and "x" in pinpoints:
        ends = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,2})x(\d{1,2})\)", pinpoints)]
        if not ends:
            raise CheckpointError(f"image_grid_pinpoints {pinpoints}: give a range of tiles such as (1x1),...,(6x6)")
        (low, left), (high, right) = ends[0], ends[-1]
        tiles = [(a, b) for a in range(low, high + 1) for b in range(left, right + 1)]
        return [[size * b, size * a] for a, b in tiles]
    try:
        found = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        return [[int(height), int(width)] for width, height in found]
    except (ValueError, TypeError, SyntaxError) as error:
        raise CheckpointError(f"image_grid_pinpoints {pinpoints}: give pairs of width and height") from error


def open_tokens(place: Path) -> Any:
    """Return the tokenizer of a folder, with the placeholder of an image.

    Args:
        place: the folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, config=transformers.PreTrainedConfig())
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


def open_processing(place: Path) -> Any:
    """Return the processor of a folder.

    Args:
        place: the folder.
    """
    config = config_of(place)
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": size, "width": size},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    most = UNLIMITED if config.max_tiles is None else config.max_tiles
    tokenizer = open_tokens(place)
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size={"height": size, "width": size}),
        num_image_tokens=(-(-side // config.image_pooling)) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
        image_token=IMAGE,
        video_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )


LAYOUTS = {
    "llava_llada": PublishedLayout(IMAGES | LLADA, config_of, open_tokens, open_processing),
    "llava_dream": PublishedLayout(IMAGES | DREAM, config_of, open_tokens, open_processing),
}
