"""Small vision-language models for the synthetic shapes: transformers classes with their processors.

An image of 32 x 32 pixels in patches of 4 has 64 positions, except in Idefics3, which merges four into one, and
Florence-2, whose tower downsamples it to 64 positions and a global one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from lamella.errors import ArchitectureError
from lamella.zoo.worlds import SIZE, word_tokenizer

PATCH = 4  # pixels on a side
WIDTH = 128
LAYERS = 6  # of an encoder, and of its decoder
COLOURS: dict[str, Any] = {
    "image_mean": [0.12] * 3,
    "image_std": [0.25] * 3,
}  # the dark background is normalised to about 0
SPREAD = {
    "initializer_range": 0.06
}  # of weights: with 0.02, as in wide models, hundreds of steps pass before images are used
POSITION_SCALE = 0.6  # amplitude of sines and cosines; embeddings of an object's patches have about 0.8
Made = tuple[Any, Any]  # a model and its processor


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Return the text model's config, with the names of Llama's config."""
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 448,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **SPREAD,
        **_token_ids(tokenizer),
        **changes,
    }


def _token_ids(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _tower(size: int, **changes: Any) -> dict[str, Any]:
    """Return a vision tower of 2 layers, with the names of CLIP's and SigLIP's configs."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": PATCH,
        **SPREAD,
        **changes,
    }


def _llava(size: int, patch: int = PATCH, **changes: Any) -> Made:
    """LLaVA: a CLIP tower of 2 layers, an MLP, and a Llama of 8 layers: about 2.4 million weights."""
    tokenizer = word_tokenizer()
    config = transformers.LlavaConfig(
        vision_config=_tower(size, model_type="clip_vision_model", patch_size=patch),
        text_config=_text(tokenizer, **changes),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(size // patch) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **COLOURS
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",  # without the class token
        num_additional_image_tokens=1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _qwen(kind: str, size: int, text: dict[str, Any], vision: dict[str, Any], tokenizer: Any) -> Made:
    """Return a model of the Qwen-VL family: images of any size, positions on three axes."""
    config = getattr(transformers, f"{kind}Config")(
        vision_config={"patch_size": PATCH, "spatial_merge_size": 1, "temporal_patch_size": 1, **SPREAD, **vision},
        text_config=text,
        tie_word_embeddings=True,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in MARKED},
    )
    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": size * size}
    patches: dict[str, Any] = {
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "merge_size": vision.get("spatial_merge_size", 1),
        "size": pixels,
        **COLOURS,
    }
    line = "Qwen3VL" if kind.startswith("Qwen3") else "Qwen2VL"
    processor = getattr(transformers, f"{line}Processor")(
        transformers.Qwen2VLImageProcessor(**patches),
        tokenizer,
        getattr(transformers, f"{line}VideoProcessor")(**patches),
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), processor


MARKED = ("image_token", "video_token", "vision_start_token", "vision_end_token")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}


def _qwen2_vl(size: int, **changes: Any) -> Made:
    """Qwen2-VL."""
    tokenizer = word_tokenizer()
    text = _text(tokenizer, rope_parameters=MROPE, **changes)
    del text["model_type"]
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 4}
    return _qwen("Qwen2VL", size, text, vision, tokenizer)


def _qwen3_vl_moe(size: int, spatial_merge_size: int = 1, **changes: Any) -> Made:
    """Qwen3-VL-MoE: 6 layers of 8 experts of width 256, of which a token uses 4: about 5.4 million weights.

    Nothing is added to the hidden states between layers (no deepstack): the text reads an image only through its
    tokens, each of a square of ``spatial_merge_size`` patches on a side.
    """
    tokenizer = word_tokenizer()
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "router_aux_loss_coef": 0.01,
        "num_hidden_layers": 6,
        "head_dim": WIDTH // 4,
        "rope_parameters": {**MROPE, "mrope_interleaved": True},
    }
    text = _text(tokenizer, **experts | changes)
    del text["model_type"]
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": (size // PATCH) ** 2,
        "spatial_merge_size": spatial_merge_size,
        "deepstack_visual_indexes": [],
    }
    return _qwen("Qwen3VLMoe", size, text, vision, tokenizer)


def _idefics3(size: int, **changes: Any) -> Made:
    """Idefics3, the architecture of SmolVLM: a SigLIP tower, with four positions merged into one."""
    tokenizer = word_tokenizer()
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": size}, max_image_size={"longest_edge": size}, do_image_splitting=False, **COLOURS
        ),
        tokenizer,
        image_seq_len=(size // PATCH) ** 2 // 4,
    )
    config = transformers.Idefics3Config(
        vision_config=_tower(size),
        text_config=_text(tokenizer, **changes),  # with the special tokens that the processor has added
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _diffusion(text: str, size: int, patch: int = PATCH, **changes: Any) -> Made:
    """LLaVA's tower with a text model of 6 layers that predicts masked tokens: about 2 million weights."""
    from lamella.stack.diffusion_config import DreamConfig, LLaDAConfig, LlavaDiffusionConfig
    from lamella.stack.diffusion_vlm import LlavaDiffusion

    reference, processor = _llava(size, patch)
    tokenizer = processor.tokenizer
    shape = _text(tokenizer, **{"num_hidden_layers": 6, "mask_token_id": tokenizer.mask_token_id, **changes})
    del shape["model_type"]
    if text == "llada":
        own: Any = LLaDAConfig(**shape | {"tie_word_embeddings": False}, rope_theta=10000.0, include_qkv_bias=True)
    else:
        own = DreamConfig(**shape)
    config = LlavaDiffusionConfig(
        vision_config=reference.config.vision_config.to_dict(),
        text_config=own.to_dict(),
        **{
            name: getattr(reference.config, name)
            for name in ("image_token_index", "image_seq_length", "vision_feature_layer")
        },
    )
    return LlavaDiffusion(config), processor


def _patch_seq2seq(text: str, size: int, patch: int = PATCH, **changes: Any) -> Made:
    """An encoder-decoder like OFA, of 6 and 6 layers: about 2.6 million weights."""
    from lamella.stack.patch_seq2seq import PatchSeq2Seq, PatchSeq2SeqConfig

    tokenizer = word_tokenizer()
    config = PatchSeq2SeqConfig(
        text_config=_seq2seq(text, tokenizer, **changes),
        image_size=size,
        patch_size=patch,
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=text != "t5",  # whose embeddings are too large for the output projection
        initializer_range=SPREAD["initializer_range"],
    )
    square = {"height": size, "width": size}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, **COLOURS)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return PatchSeq2Seq(config), processor


def _seq2seq(kind: str, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Return the config of a text encoder-decoder, with the names of BART's config or of T5's."""
    ends = {**_token_ids(tokenizer), "decoder_start_token_id": tokenizer.bos_token_id, "vocab_size": len(tokenizer)}
    if kind == "t5":
        sizes = {"d_model": WIDTH, "d_kv": WIDTH // 4, "d_ff": 4 * WIDTH, "num_heads": 4}
        layers = {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "dropout_rate": 0.0}
        return {"model_type": "t5", **sizes, **layers, **ends, **changes}
    of_each = {"layers": LAYERS, "ffn_dim": 4 * WIDTH, "attention_heads": 4}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in of_each.items()}
    more = {"d_model": WIDTH, "max_position_embeddings": 1024, "dropout": 0.0, "init_std": SPREAD["initializer_range"]}
    return {"model_type": kind, **sizes, **more, **ends, "forced_eos_token_id": None, **changes}


def _florence2(size: int, **changes: Any) -> Made:
    """Florence-2: a tower of two stages that downsamples an image eight times, and a BART of 6 and 6 layers."""
    tokenizer = word_tokenizer()
    width = [WIDTH // 2, WIDTH]
    config = transformers.Florence2Config(
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [2, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": width,
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 8,
            "projection_dim": WIDTH,
            "max_position_embeddings": size // 4,
            "drop_path_rate": 0.0,
            **SPREAD,
        },
        text_config=_seq2seq("bart", tokenizer, **changes),
        image_token_id=tokenizer.image_token_id,
    )
    square = {"height": size, "width": size}
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size=square, image_seq_length=(size // 4) ** 2 + 1, **COLOURS
    )
    return transformers.Florence2ForConditionalGeneration(config), transformers.Florence2Processor(images, tokenizer)


SHAPES_VLM: dict[str, Callable[..., Made]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "idefics3": _idefics3,
}


SHAPES_SEQ2SEQ: dict[str, Callable[..., Made]] = {  # encode the prompt and decode the answer
    "patch_bart": partial(_patch_seq2seq, "bart"),
    "patch_mbart": partial(_patch_seq2seq, "mbart"),
    "patch_t5": partial(_patch_seq2seq, "t5"),
    "florence2": _florence2,
}


SHAPES_DIFFUSION: dict[str, Callable[..., Made]] = {  # predict masked tokens
    "llava_llada": partial(_diffusion, "llada"),
    "llava_dream": partial(_diffusion, "Dream"),
}


def shapes_vlm(kind: str, seed: int = 0, size: int = SIZE, **changes: Any) -> Made:
    """Return a model for the synthetic shapes with random weights, in eval mode, and its processor.

    Args:
        kind: a key of :data:`SHAPES_VLM`, :data:`SHAPES_SEQ2SEQ` or :data:`SHAPES_DIFFUSION`.
        seed: of the weights.
        size: image size in pixels: 64 makes 256 positions.
        changes: of its text config, such as ``num_hidden_layers=2``; with ``spatial_merge_size=2``, Qwen3-VL-MoE merges
            four patches into one token, as published models do; with ``patch=8``, LLaVA, the diffusion models and the
            encoder-decoders of patches have a token for each cell of the grid.

    Raises:
        ArchitectureError: for another kind.
    """
    known = SHAPES_VLM | SHAPES_SEQ2SEQ | SHAPES_DIFFUSION
    if kind not in known:
        raise ArchitectureError(f"no small '{kind}' for shapes; there are: {', '.join(known)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = known[kind](size, **changes)
    _initialise_positions(model, size // changes.get("patch", PATCH))
    return model.eval(), processor


@torch.no_grad()
def _initialise_positions(model: Any, side: int) -> None:
    """Initialise a tower's position embeddings of patches with sines and cosines of row and column.

    From a random initialisation, models learn to name a cell by counting, but never to locate a named object.
    """
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding):
            quarter = table.weight.shape[1] // 4
            angles = torch.arange(side)[:, None] * 1e4 ** -(torch.arange(quarter) / quarter)
            waves = POSITION_SCALE * torch.cat([angles.sin(), angles.cos()], dim=1)
            if name.endswith(("position_embedding", "pos_embed")):
                grid = torch.cat([waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)], dim=2)
                table.weight[-side * side :] = grid.flatten(0, 1)  # the remaining row is the class token's
            elif name.endswith(("front.row", "front.column")):  # the same in two tables, which are summed
                first, second = (waves, 0 * waves) if name.endswith("row") else (0 * waves, waves)
                table.weight.copy_(torch.cat([first, second], dim=1))
