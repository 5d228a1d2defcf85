"""Small pipelines of the real classes, with random weights: of digits, of classes, and of text as Stable Diffusion."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
import transformers

from lamella.data import CaptionedImages, InputContext
from lamella.methods.laptop_diff import Denoiser, Tuples

COMMON = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1, "block_out_channels": (8, 16)}
LATENT = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "latent_channels": 4,
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def loud(network: Any) -> Any:
    """Nothing is silent from the start, as layers of a transformer are whose gates begin at zero."""
    torch.manual_seed(1)
    for each in network.parameters():
        each.data.add_(0.05 * torch.randn(each.shape))
    return network.eval()


def vae() -> Any:
    return loud(diffusers.AutoencoderKL(**LATENT))


def with_text() -> Any:
    """Stable Diffusion's parts: a text encoder, an autoencoder, and a UNet with two transformer layers in a block."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters), *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    told = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(words)}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(max_position_embeddings=16, **sizes, **told)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        transformer_layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **COMMON,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=loud(unet),
        scheduler=diffusers.PNDMScheduler(num_train_timesteps=100, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def of_classes() -> Any:
    """A diffusion transformer, which is told classes and predicts a variance, too."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100)
    return diffusers.DiTPipeline(transformer=loud(network), vae=vae(), scheduler=scheduler)


MADE = {"text": with_text, "classes": of_classes}


@cache
def denoiser(name: str) -> Denoiser:
    """One of the pipelines, opened; nobody changes it."""
    torch.manual_seed(0)  # its weights do not depend on the tests before
    return Denoiser(MADE[name](), name) if name in MADE else Denoiser.open(name)


@cache
def digits(count: int = 24) -> CaptionedImages:
    return CaptionedImages.open("digits", InputContext(), count=count)


@cache
def tuples(name: str, count: int = 6) -> Tuples:
    return Tuples.of(denoiser(name), digits(), count)
