"""The base: a frozen video transformer that predicts the velocity of a flow, with the autoencoder of its latents.

    z_t = (1 - t) z_0 + t eps,   v = eps - z_0           so z_0 = z_t - t v

Its input is a sequence of frames, the first of which may be a noise-free reference. Without an autoencoder the frames
are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.errors import CheckpointError, MethodError
from lamella.methods.refacade import nano
from lamella.methods.refacade.jigsaw import WHITE
from lamella.methods.refacade.nano import SIDE, TRAINED, UNTRAINED
from lamella.plan.fingerprint import tensors
from lamella.signature import Fixture
from lamella.zoo import Pipeline, default_device, open_model
from lamella.zoo.views import View

WAN, VACE, VAE = "WanTransformer3DModel", "WanVACETransformer3DModel", "AutoencoderKLWan"
TEXT = ("text_encoder", "tokenizer")
WORDS = 512  # tokens of a prompt of Wan
TIMES = 1000  # timestep of the network at t = 1
AREA = 480 * 832  # maximum number of pixels of a frame with an autoencoder


@dataclass(frozen=True, eq=False)
class Base(View):
    """A frozen video transformer.

    Attributes:
        network: a ``WanTransformer3DModel``.
        vae: an ``AutoencoderKLWan``; None if frames are pixels.
        name: its name.
        folder: folder of the pipeline, which may have a text encoder.
        vace: weights of the control blocks of a VACE model, by name.
        vace_layers: indices of the layers that these control.
    """

    metavar = "BASE"
    source_help = (
        "the folder of a Wan pipeline of diffusers (transformer, vae, maybe text_encoder and tokenizer), or nano, a "
        "small one that is built in"
    )
    noun = "video transformer of Wan"
    libraries = ("diffusers",)
    classes = (WAN, VACE)
    dtype = "auto"
    names = (TRAINED, UNTRAINED)
    default = TRAINED
    example = Fixture(UNTRAINED)

    network: Any
    vae: Any
    name: str
    folder: Path | None = None
    vace: Mapping[str, Tensor] = field(default_factory=dict)
    vace_layers: tuple[int, ...] = ()

    @classmethod
    def built_in(cls, name: str) -> Base:
        """Return ``nano``, trained on textured objects on first use, or ``untrained``, the untrained network."""
        network = nano.network(name, lambda found: cls(found, None, UNTRAINED))
        return cls(network.to(default_device()), None, name)

    @classmethod
    def of(cls, model: Any) -> Base:
        """Return the video transformer of a pipeline with its autoencoder, or the transformer alone.

        Raises:
            CheckpointError: for one of another class, or with another number of input channels.
        """
        opened = open_model(model)
        vae = None
        if isinstance(opened, Pipeline):  # the text encoder is loaded with the first prompt
            network = opened.part("transformer", cls.classes)
            vae = opened.part("vae", (VAE,)) if opened.has("vae") else None
        else:
            network = opened.model
        kind = type(network).__name__
        if kind not in cls.classes:
            raise CheckpointError(f"a {kind} is not {' or '.join(cls.classes)}")
        vace: dict[str, Tensor] = {}
        vace_layers: tuple[int, ...] = ()
        network.requires_grad_(False)
        if kind == VACE:
            vace_layers = tuple(network.config.vace_layers)
            network, vace = split_control(network)
        channels = vae.requires_grad_(False).config.z_dim if vae is not None else 3
        if network.config.in_channels != channels or network.config.out_channels != channels:
            source = "its autoencoder has" if vae is not None else "without an autoencoder there are"
            raise CheckpointError(
                f"the transformer has {network.config.in_channels} input channels, and {source} {channels}: give a "
                "text-to-video or VACE pipeline with its vae"
            )
        return cls(network, vae, opened.name, opened.path, vace, vace_layers)

    def describe(self) -> dict[str, Any]:
        """Return its metadata for the provenance."""
        size = sum(each.numel() for each in self.network.parameters())
        return {"name": self.name, "layers": self.depth, "parameters": size, "sha256": self.digest}

    @cached_property
    def digest(self) -> str:
        """The digest of all its weights."""
        return tensors(self.network)

    @cached_property
    def encoder_digest(self) -> str:
        """The digest of the weights of its autoencoder; empty if there is none."""
        return "" if self.vae is None else tensors(self.vae)

    # Sizes

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.network.blocks)

    @property
    def channels(self) -> int:
        """C, the number of channels of a latent."""
        return int(self.network.config.in_channels)

    @property
    def spatial(self) -> int:
        """s, the side in pixels of a latent position."""
        return 1 if self.vae is None else int(self.vae.config.scale_factor_spatial)

    @property
    def temporal(self) -> int:
        """The number of frames per latent frame, except for the first, which is encoded alone."""
        return 1 if self.vae is None else int(self.vae.config.scale_factor_temporal)

    @property
    def token(self) -> int:
        """The side of a token in pixels."""
        return self.spatial * max(self.network.config.patch_size[1:])

    @property
    def area(self) -> int:
        """The maximum number of pixels of a frame."""
        return SIDE**2 if self.vae is None else AREA

    @property
    def control_channels(self) -> tuple[int, int]:
        """The numbers of channels of c and of c_r: 96 and 80 for Wan."""
        return 2 * self.channels + self.spatial**2, self.channels + self.spatial**2

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Return the size at which frames are processed: a multiple of the token size, up to the maximum area.

        Args:
            height: height of the frames in pixels.
            width: width of the frames in pixels.

        Returns:
            Height and width in pixels, close to the original aspect ratio.

        Raises:
            MethodError: for frames smaller than a token.
        """
        times = min(1.0, math.sqrt(self.area / (height * width)))
        size = tuple(int(times * side) // self.token * self.token for side in (height, width))
        if not all(size):
            raise MethodError(
                f"{height} x {width} pixels: {self.name} has tokens of {self.token} x {self.token}, up to "
                f"{self.area:,} pixels: give a larger image, or one less narrow"
            )
        return size[0], size[1]

    def check_size(self, height: int, width: int) -> None:
        """Check that the sides of frames are multiples of the token size.

        Args:
            height: height of the frames in pixels.
            width: width of the frames in pixels.

        Raises:
            MethodError: when they are not.
        """
        if height % self.token or width % self.token or not height * width:
            raise MethodError(f"{height} x {width} pixels: give multiples of {self.token}, the side of a token")

    # Inputs and outputs

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames in [-1, 1] [frames, 3, height, width] to latents [C, F', height / s, width / s]."""
        x = frames.movedim(1, 0).to(self.network.device)  # [3, frames, height, width]
        if self.vae is None:
            return x.float()
        z = self.vae.encode(x[None].to(self.vae.dtype)).latent_dist.mode()[0].float()
        mean, deviation = self._scales(z)
        return (z - mean) / deviation

    def white(self, like: Tensor) -> Tensor:
        """Return a white latent frame for each row of latents [rows, C, 1, h, w]."""
        height, width = like.shape[-2:]
        cache = self.__dict__.setdefault("_white", {})
        if (height, width) not in cache:
            cache[height, width] = self.encode(torch.full((1, 3, self.spatial * height, self.spatial * width), WHITE))
        return cache[height, width].expand(len(like), -1, -1, -1, -1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to frames in [-1, 1] [frames, 3, height, width]."""
        if self.vae is not None:
            mean, deviation = self._scales(z)
            z = self.vae.decode((z * deviation + mean)[None].to(self.vae.dtype), return_dict=False)[0][0].float()
        return z.movedim(1, 0).clamp(-1, 1).cpu()

    def _scales(self, z: Tensor) -> tuple[Tensor, Tensor]:
        both = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, deviation = (torch.tensor(each).view(-1, 1, 1, 1).to(z) for each in both)
        return mean, deviation

    def text(self, prompt: str = "") -> Tensor:
        """Return the embedding of a prompt [1, tokens, width]: zeros without a text encoder.

        Raises:
            MethodError: for a prompt without a text encoder.
        """
        width = self.network.config.text_dim
        cache = self.__dict__.setdefault("_texts", {})
        if prompt not in cache:
            if self.folder is not None and all((self.folder / part).is_dir() for part in TEXT):
                cache[prompt] = encode_prompt(self.folder, prompt).to(self.network.device)
            elif prompt:
                raise MethodError(f"{self.name} has no text encoder, so it takes no prompt: omit it")
            else:
                cache[prompt] = torch.zeros(1, 1 if self.vae is None else WORDS, width, device=self.network.device)
        return cache[prompt].to(self.network.dtype)

    def velocity(self, z: Tensor, t: Tensor, reference: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Return v of noisy latents [batch, C, F', h, w] at times in [0, 1] [batch].

        Args:
            z: the noisy latents.
            t: the times.
            reference: a noise-free frame before them [batch, C, 1, h, w].
            text: prompt embedding [1, tokens, width]; defaults to the empty prompt.
        """
        text = self.text() if text is None else text
        frames = z if reference is None else torch.cat([reference, z], dim=2)
        inputs = {"timestep": TIMES * t, "encoder_hidden_states": text.expand(len(z), -1, -1)}
        output: Tensor = self.network(frames.to(self.network.dtype), **inputs, return_dict=False)[0]
        return output[:, :, frames.shape[2] - z.shape[2] :].float()


def split_control(network: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a VACE network into its main blocks, as a network that shares its tensors, and its control blocks."""
    import diffusers

    own = {name: value for name, value in network.config.items() if not name.startswith(("_", "vace"))}
    with torch.device("meta"):
        main = diffusers.WanTransformer3DModel.from_config(own)
    main.rope = network.rope
    weights = network.state_dict()
    main.load_state_dict({name: each for name, each in weights.items() if not name.startswith("vace")}, assign=True)
    control = {name: each for name, each in weights.items() if name.startswith("vace_blocks")}
    return main.requires_grad_(False).eval(), control


def encode_prompt(folder: Path, prompt: str) -> Tensor:
    """Encode a prompt with the text encoder of a Wan pipeline, padded with zeros [1, tokens, width].

    Args:
        folder: folder of the pipeline.
        prompt: the prompt.
    """
    pipeline = Pipeline(path=folder)
    encoder, tokenizer = pipeline.part(TEXT[0], ("UMT5EncoderModel",)), pipeline.part(TEXT[1])
    tokens = tokenizer([prompt], padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden: Tensor = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None]
