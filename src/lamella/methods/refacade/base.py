"""The input: a frozen video transformer that predicts the velocity of a flow, with what encodes pictures for it.

    z_t = (1 - t) z_0 + t eps,   v = eps - z_0           so z_0 = z_t - t v

It reads frames in a row, of which the first may be a reference that has no noise. Without an autoencoder the frames are
pixels.
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
WORDS = 512  # tokens of a text that Wan reads
TIMES = 1000  # what a network calls t = 1
AREA = 480 * 832  # pixels of a frame, at most, where there is an autoencoder


@dataclass(frozen=True, eq=False)
class Base(View):
    """A video transformer that stays as it is.

    Attributes:
        network: a ``WanTransformer3DModel``.
        vae: an ``AutoencoderKLWan``; None where frames are pixels.
        name: what to call it.
        folder: where a text encoder may lie.
        vace: weights of control blocks that a VACE model has beside, by name.
        vace_layers: that these are for.
    """

    metavar = "BASE"
    source_help = (
        "the folder of a Wan pipeline of diffusers (transformer, vae, perhaps text_encoder and tokenizer), or nano, a "
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
        """``nano``, trained on textured objects when it is first asked for, or ``untrained``, the same one before."""
        network = nano.network(name, lambda found: cls(found, None, UNTRAINED))
        return cls(network.to(default_device()), None, name)

    @classmethod
    def of(cls, model: Any) -> Base:
        """The video transformer of a pipeline, with its autoencoder; or the transformer alone.

        Raises:
            CheckpointError: for one of other classes, or that reads other channels than there are.
        """
        opened = open_model(model)
        vae = None
        if isinstance(opened, Pipeline):  # whose text encoder stays where it is until there is a text
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
            network, vace = without_control(network)
        channels = vae.requires_grad_(False).config.z_dim if vae is not None else 3
        if network.config.in_channels != channels or network.config.out_channels != channels:
            there = "its autoencoder has" if vae is not None else "without an autoencoder there are"
            raise CheckpointError(
                f"the transformer reads {network.config.in_channels} channels, and {there} {channels}: give a "
                "text-to-video or VACE pipeline with its vae"
            )
        return cls(network, vae, opened.name, opened.path, vace, vace_layers)

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        size = sum(each.numel() for each in self.network.parameters())
        return {"name": self.name, "layers": self.depth, "parameters": size, "sha256": self.digest}

    @cached_property
    def digest(self) -> str:
        """Of all its weights."""
        return tensors(self.network)

    @cached_property
    def encoder_digest(self) -> str:
        """Of the weights of its autoencoder; empty where there is none."""
        return "" if self.vae is None else tensors(self.vae)

    # Its sizes

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return len(self.network.blocks)

    @property
    def channels(self) -> int:
        """C, of a latent."""
        return int(self.network.config.in_channels)

    @property
    def spatial(self) -> int:
        """s, pixels of a latent's side."""
        return 1 if self.vae is None else int(self.vae.config.scale_factor_spatial)

    @property
    def temporal(self) -> int:
        """Frames of a latent, all but the first, which stands alone."""
        return 1 if self.vae is None else int(self.vae.config.scale_factor_temporal)

    @property
    def token(self) -> int:
        """Pixels of a token's side."""
        return self.spatial * max(self.network.config.patch_size[1:])

    @property
    def area(self) -> int:
        """Pixels of a frame, at most."""
        return SIDE**2 if self.vae is None else AREA

    @property
    def control_channels(self) -> tuple[int, int]:
        """Of c and of c_r: 96 and 80 of Wan."""
        return 2 * self.channels + self.spatial**2, self.channels + self.spatial**2

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The size in which frames are worked on: of whole tokens, and no larger than what it is made for.

        Raises:
            MethodError: for frames smaller than a token.
        """
        times = min(1.0, math.sqrt(self.area / (height * width)))
        size = tuple(int(times * side) // self.token * self.token for side in (height, width))
        if not all(size):
            raise MethodError(
                f"{height} x {width} pixels: {self.name} works in tokens of {self.token} x {self.token}, up to "
                f"{self.area:,} pixels: give a larger picture, or one less narrow"
            )
        return size[0], size[1]

    def check_size(self, height: int, width: int) -> None:
        """Check that frames are of whole tokens.

        Raises:
            MethodError: when they are not.
        """
        if height % self.token or width % self.token or not height * width:
            raise MethodError(f"{height} x {width} pixels: give multiples of {self.token}, the side of a token")

    # What it is given and says

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames from -1 to 1 [frames, 3, height, width] as latents [C, F', height / s, width / s]."""
        x = frames.movedim(1, 0).to(self.network.device)  # [3, frames, height, width]
        if self.vae is None:
            return x.float()
        z = self.vae.encode(x[None].to(self.vae.dtype)).latent_dist.mode()[0].float()
        mean, deviation = self._scales(z)
        return (z - mean) / deviation

    def white(self, like: Tensor) -> Tensor:
        """A white frame for each row of latents [rows, C, 1, h, w]."""
        height, width = like.shape[-2:]
        kept = self.__dict__.setdefault("_white", {})
        if (height, width) not in kept:
            kept[height, width] = self.encode(torch.full((1, 3, self.spatial * height, self.spatial * width), WHITE))
        return kept[height, width].expand(len(like), -1, -1, -1, -1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Back; [frames, 3, height, width] from -1 to 1."""
        if self.vae is not None:
            mean, deviation = self._scales(z)
            z = self.vae.decode((z * deviation + mean)[None].to(self.vae.dtype), return_dict=False)[0][0].float()
        return z.movedim(1, 0).clamp(-1, 1).cpu()

    def _scales(self, z: Tensor) -> tuple[Tensor, Tensor]:
        both = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, deviation = (torch.tensor(each).view(-1, 1, 1, 1).to(z) for each in both)
        return mean, deviation

    def text(self, prompt: str = "") -> Tensor:
        """What the network reads of a text [1, tokens, width]: zeros where there is no text encoder.

        Raises:
            MethodError: for a text that nothing can encode.
        """
        width = self.network.config.text_dim
        kept = self.__dict__.setdefault("_texts", {})
        if prompt not in kept:
            if self.folder is not None and all((self.folder / part).is_dir() for part in TEXT):
                kept[prompt] = encoded(self.folder, prompt).to(self.network.device)
            elif prompt:
                raise MethodError(f"{self.name} has no text encoder, so it reads no text: leave it out")
            else:
                kept[prompt] = torch.zeros(1, 1 if self.vae is None else WORDS, width, device=self.network.device)
        return kept[prompt].to(self.network.dtype)

    def velocity(self, z: Tensor, t: Tensor, reference: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """v of noisy latents [batch, C, F', h, w] at times from 0 to 1 [batch].

        Args:
            reference: a frame without noise that is seen before them [batch, C, 1, h, w].
            text: what is read, [1, tokens, width]; the empty prompt when left out.
        """
        text = self.text() if text is None else text
        frames = z if reference is None else torch.cat([reference, z], dim=2)
        told = {"timestep": TIMES * t, "encoder_hidden_states": text.expand(len(z), -1, -1)}
        said: Tensor = self.network(frames.to(self.network.dtype), **told, return_dict=False)[0]
        return said[:, :, frames.shape[2] - z.shape[2] :].float()


def without_control(network: Any) -> tuple[Any, dict[str, Tensor]]:
    """A VACE network's main blocks as a network of their own, with the same tensors; and its control blocks."""
    import diffusers

    own = {name: value for name, value in network.config.items() if not name.startswith(("_", "vace"))}
    with torch.device("meta"):
        main = diffusers.WanTransformer3DModel.from_config(own)
    main.rope = network.rope
    weights = network.state_dict()
    main.load_state_dict({name: each for name, each in weights.items() if not name.startswith("vace")}, assign=True)
    control = {name: each for name, each in weights.items() if name.startswith("vace_blocks")}
    return main.requires_grad_(False).eval(), control


def encoded(folder: Path, prompt: str) -> Tensor:
    """What a Wan pipeline's text encoder says of a prompt, zeros behind it [1, tokens, width]."""
    pipeline = Pipeline(path=folder)
    encoder, tokenizer = pipeline.part(TEXT[0], ("UMT5EncoderModel",)), pipeline.part(TEXT[1])
    said = tokenizer([prompt], padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden: Tensor = encoder(said.input_ids, said.attention_mask).last_hidden_state
    return hidden * said.attention_mask[..., None]
