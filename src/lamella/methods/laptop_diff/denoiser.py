"""The input: a model that predicts noise, in a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lamella.data import Captioned
from lamella.errors import ArchitectureError
from lamella.extras import require
from lamella.methods.laptop_diff import digits
from lamella.plan import fingerprint
from lamella.signature import Fixture
from lamella.stack import Blocks
from lamella.zoo import Pipeline, default_device, open_model
from lamella.zoo.pipelines import NETWORKS
from lamella.zoo.views import View


@dataclass(frozen=True, eq=False)
class Denoiser(View):
    """A network that predicts noise, with the pipeline that it is part of.

    Attributes:
        pipeline: of diffusers.
        name: what to call it.
    """

    source_help = "the folder of a diffusers pipeline, with a UNet or a DiT; or digits, a small one that is built in"
    noun = "pipeline of diffusers"
    libraries = ("diffusers",)
    names = digits.NAMES
    example = Fixture(digits.UNTRAINED)

    pipeline: Any
    name: str

    @classmethod
    def built_in(cls, name: str) -> Denoiser:
        """A UNet, ``digits``, which is trained on scikit-learn's digits when it is first asked for (some minutes), or
        ``untrained``, the same one before."""
        return cls(digits.pipeline(name).to(default_device()), name)

    @classmethod
    def of(cls, model: Any) -> Denoiser:
        """A pipeline.

        Raises:
            ArchitectureError: for a network without its pipeline.
        """
        opened = open_model(model)
        if not isinstance(opened, Pipeline):
            raise ArchitectureError(f"{opened.name} is a network without the pipeline that it is part of")
        return cls(opened.model, opened.name)

    @cached_property
    def part(self) -> str:
        """What the pipeline calls its network."""
        found = next((part for part in NETWORKS if part in self.pipeline.components), None)
        if found is None:
            kind = type(self.pipeline).__name__
            raise ArchitectureError(f"{self.name}: a {kind} has no {' or '.join(NETWORKS)}: give one that has")
        return found

    @property
    def network(self) -> Any:
        """The network itself, in evaluation mode."""
        return getattr(self.pipeline, self.part)

    @cached_property
    def blocks(self) -> Blocks:
        """Its blocks."""
        return Blocks(self.network, self.name)

    @cached_property
    def noising(self) -> Any:
        """What adds noise as in training: the betas of the pipeline's scheduler, over all of its timesteps."""
        diffusers = require("diffusers", "vision", "noise")
        return diffusers.DDPMScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return int(self.noising.config.num_train_timesteps)

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        parameters = sum(each.numel() for each in self.network.parameters())
        kind = type(self.network).__name__
        digest = fingerprint.state(self.network)
        return {"name": self.name, "family": kind, "parameters": parameters, "sha256": digest}

    # What it is given

    def encoders(self) -> dict[str, str]:
        """A digest of each part of the pipeline beside its network, such as its autoencoder and its text encoders."""
        parts = {name: each for name, each in self.pipeline.components.items() if isinstance(each, torch.nn.Module)}
        return {name: fingerprint.state(each) for name, each in parts.items() if name != self.part}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network reads."""
        size = self.network.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @torch.no_grad()
    def clean(self, pictures: Sequence[Captioned]) -> Tensor:
        """Pictures as the network knows them, without noise: x_0 [pictures, channels, height, width].

        They are scaled, cropped to the middle, and encoded where the pipeline works on latents.
        """
        transforms = require("torchvision.transforms.v2", "vision", "scaling pictures")
        vae = getattr(self.pipeline, "vae", None)
        times = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = (times * each for each in self.size)
        fit = transforms.Compose([transforms.Resize(min(height, width)), transforms.CenterCrop((height, width))])
        rows = [torch.from_numpy(each.image).permute(2, 0, 1) for each in pictures]
        pixels = torch.stack([each if each.shape[1:] == (height, width) else fit(each) for each in rows]) / 127.5 - 1
        if vae is None:
            return pixels.mean(dim=1, keepdim=True) if self.network.config.in_channels == 1 else pixels
        latents = [vae.encode(each[None].to(vae.device, vae.dtype)).latent_dist.mode().float().cpu() for each in pixels]
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (torch.cat(latents) - shift) * vae.config.scaling_factor

    @torch.no_grad()
    def conditions(self, pictures: Sequence[Captioned]) -> dict[str, Tensor]:
        """What the network is told of pictures beside noise and time, by name: a row for each.

        Raises:
            ArchitectureError: for pictures without classes where the network needs them, or with more than it knows.
        """
        config = self.network.config
        known = getattr(config, "num_class_embeds", None) or getattr(config, "num_embeds_ada_norm", None)
        if known or self.part == "transformer":
            labels = [each.label for each in pictures if each.label is not None]
            if len(labels) < len(pictures):
                raise ArchitectureError(
                    f"{self.name} is told classes, and these pictures have none: give a folder with a folder for each "
                    "class, or digits"
                )
            if known and max(labels) >= known:
                raise ArchitectureError(
                    f"{self.name} knows {known} classes, and these pictures have {max(labels) + 1}: give its own"
                )
            return {"class_labels": torch.tensor(labels)}
        if not hasattr(self.pipeline, "encode_prompt"):
            return {}
        texts = [each.text for each in pictures]
        how = {"device": self.network.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        said = self.pipeline.encode_prompt(texts, **how)
        found = {"encoder_hidden_states": said[0]}
        if len(said) == 4:  # as SDXL has it: the text as a whole, and how the picture was cut
            vae = self.pipeline.vae
            height, width = (2 ** (len(vae.config.block_out_channels) - 1) * each for each in self.size)
            times = torch.tensor([[height, width, 0, 0, height, width]], dtype=said[0].dtype)
            found |= {"text_embeds": said[2], "time_ids": times.expand(len(texts), -1)}
        return {name: each.cpu() for name, each in found.items()}

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """What a network, this one or a changed one, says of noisy pictures [batch, channels, height, width]."""
        told: dict[str, Any] = dict(conditions)
        added = {name: told.pop(name) for name in ("text_embeds", "time_ids") if name in told}
        if added:
            told["added_cond_kwargs"] = added
        said: Tensor = network(noisy, timestep=timesteps, **told, return_dict=False)[0]
        return said[:, : noisy.shape[1]]  # what more there is is a variance

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network should say: the noise, or what else its scheduler's ``prediction_type`` is."""
        kind = self.noising.config.prediction_type
        if kind == "epsilon":
            return noise
        velocity: Tensor = self.noising.get_velocity(clean, noise, timesteps)
        return clean if kind == "sample" else velocity

    def with_network(self, network: Any, name: str = "") -> Denoiser:
        """The same with another network in the place of its own."""
        components = {**self.pipeline.components, self.part: network}
        scalars = {name: self.pipeline.config[name] for name in self.pipeline.config if not name.startswith("_")}
        made = type(self.pipeline)(**(scalars | components))
        made.set_progress_bar_config(disable=True)
        return Denoiser(made, name or self.name)
