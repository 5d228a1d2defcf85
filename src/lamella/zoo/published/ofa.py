"""OFA in the layout of the authors' port to transformers.

    OFA (Wang et al., 2022, arXiv 2202.03052)    github.com/OFA-Sys/OFA, branch feature/add_transformers

A folder has ``config.json``, the weights, ``vocab.json`` and ``merges.txt``.

The published modules are those of :mod:`lamella.stack.ofa`, under other names for the tables of relative positions,
which are lists beside the layers, the scales of heads, the position keys of cross-attention, and the ResNet, which has
torchvision's names. The modules of the decoder that generate images as codes are left out. In OFA's data, prompts and
answers begin with a space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lamella.errors import CheckpointError
from lamella.plan import checkpoint
from lamella.zoo.published.layout import IMAGE, PublishedLayout

PATCH = 16  # pixels on a side, by the strides of the ResNet
CODES, BINS = 8192, 1000  # tokens of image codes and of coordinates, which are not in vocab.json
DEPTHS = {  # of the three stages that OFA keeps
    "resnet18": (2, 2, 2),
    "resnet50": (3, 4, 6),
    "resnet101": (3, 4, 23),
    "resnet152": (3, 8, 36),
}
SIDES = {256: 256, 512: 256, 768: 384, 1024: 480, 1280: 480}  # of images in pixels by hidden size, as pretrained
REQUIRED = {  # settings that all published checkpoints share, and that the network has built in
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
    "normformer": True,
    "layernorm_embedding": True,
    "patch_layernorm_embedding": True,
    "add_type_embedding": True,
    "share_decoder_input_output_embed": True,
    "entangle_position_embedding": False,
    "scale_embedding": False,
    "attn_scale_factor": 2.0,
}
SETTINGS = (
    *("vocab_size", "d_model", "max_position_embeddings", "token_bucket_size", "image_bucket_size"),
    *(f"{side}_{size}" for side in ("encoder", "decoder") for size in ("layers", "ffn_dim", "attention_heads")),
    *("activation_function", "dropout", "attention_dropout", "activation_dropout", "init_std"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"),
)

RESNET = r"^encoder\.embed_images\."
OURS = "model.encoder.embed_images."
PARTS = {"conv": "convolution", "bn": "normalization"}
NAMES: dict[str, str | None] = {
    r"_rp_bucket$|\.image_position_idx$": None,  # computed
    r"^decoder\.(embed_tokens|output_projection)\.": None,  # the encoder's embedding
    r"^decoder\.(embed_image_positions|image_pos_ln|image_rel_pos_table_list|code_layernorm_embedding)\.": None,
    r"^(en|de)coder\.token_rel_pos_table_list\.(\d+)\.": r"model.\1coder.layers.\2.relative.0.",
    r"^encoder\.image_rel_pos_table_list\.(\d+)\.": r"model.encoder.layers.\1.relative.1.",
    r"^(.*)_attn\.c_attn$": r"model.\1_attn.out_proj.c_attn",
    r"^decoder\.cross_pos_k_linear\.": "model.encoder.cross_pos_k_linear.",
    **{rf"{RESNET}{theirs}1\.": f"{OURS}embedder.embedder.{ours}." for theirs, ours in PARTS.items()},
    **{
        rf"{RESNET}layer{stage + 1}\.(\d+)\.{theirs}{part + 1}\.": (
            rf"{OURS}encoder.stages.{stage}.layers.\1.layer.{part}.{ours}."
        )
        for stage in range(3)
        for part in range(3)
        for theirs, ours in PARTS.items()
    },
    **{
        rf"{RESNET}layer{stage + 1}\.(\d+)\.downsample\.{part}\.": (
            rf"{OURS}encoder.stages.{stage}.layers.\1.shortcut.{ours}."
        )
        for stage in range(3)
        for part, ours in enumerate(PARTS.values())
    },
    r"^(en|de)coder\.": r"model.\1coder.",
}


def config_of(place: Path) -> Any:
    """Return the config of the model in a folder.

    Args:
        place: the folder.

    Raises:
        CheckpointError: for settings that no published checkpoint has.
    """
    from lamella.stack.ofa_config import OFAConfig

    found = checkpoint.read_json(place / "config.json")
    kind, width = found.get("resnet_type"), found["d_model"]
    for name, known in REQUIRED.items():
        if found.get(name, known) != known:
            raise CheckpointError(f"{place}: {name} {found[name]} is not supported: published checkpoints have {known}")
    if kind not in DEPTHS:
        raise CheckpointError(f"{place}: resnet_type '{kind}' is not supported: it is one of {', '.join(DEPTHS)}")
    if "image_size" not in found and width not in SIDES:
        raise CheckpointError(f"{place}: no published model has d_model {width}: add image_size to its config.json")
    vision = transformers.ResNetConfig(hidden_sizes=[256, 512, 1024], depths=list(DEPTHS[kind]))
    return OFAConfig(
        vision_config=vision,
        image_size=found.get("image_size") or SIDES[width],
        image_token_index=open_tokens(place).convert_tokens_to_ids(IMAGE),
        dtype=found.get("torch_dtype", "float32"),
        **{name: found[name] for name in SETTINGS if name in found},
    )


def open_tokens(place: Path) -> Any:
    """Return the tokenizer of a folder, BART's with the tokens of image codes and coordinates and that of an image.

    Args:
        place: the folder.
    """
    tokenizer: Any = transformers.BartTokenizer.from_pretrained(place)
    tokenizer.add_tokens([*(f"<code_{i}>" for i in range(CODES)), *(f"<bin_{i}>" for i in range(BINS))])
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer


def open_processing(place: Path) -> Any:
    """Return the processor of a folder, which scales images to squares.

    Args:
        place: the folder.
    """
    side = config_of(place).image_size
    images = transformers.ViTImageProcessor(
        size={"height": side, "width": side}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.LlavaProcessor(
        images,
        open_tokens(place),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
    )


LAYOUTS = {"ofa": PublishedLayout(NAMES, config_of, open_tokens, open_processing)}
