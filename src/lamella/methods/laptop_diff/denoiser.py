"""The input: a noise prediction network in a diffusers pipeline."""

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

CAPTIONS = 16  # captions that the text encoders read at once


@dataclass(frozen=True, eq=False)
class Denoiser(View):
    """A noise prediction network, with its pipeline.

    Attributes:
        pipeline: diffusers pipeline.
        name: name for messages.
    """

    source_help = "the folder of a diffusers pipeline, with a UNet or a DiT; or digits, a small built-in one"
    noun = "pipeline of diffusers"
    libraries = ("diffusers",)
    names = digits.NAMES
    example = Fixture(digits.UNTRAINED)

    pipeline: Any
    name: str

    @classmethod
    def built_in(cls, name: str) -> Denoiser:
        """A built-in UNet: ``digits``, trained on scikit-learn's digits on first use, or ``untrained``."""
        return cls(digits.pipeline(name).to(default_device()), name)

    @classmethod
    def of(cls, model: Any) -> Denoiser:
        """Open a pipeline.

        Raises:
            ArchitectureError: for a network without its pipeline.
        """
        opened = open_model(model)
        if not isinstance(opened, Pipeline):
            raise ArchitectureError(f"{opened.name} is a network without a pipeline: give the folder of the pipeline")
        return cls(opened.model, opened.name)

    @cached_property
    def part(self) -> str:
        """Name of the network in the pipeline."""
        found = next((part for part in NETWORKS if part in self.pipeline.components), None)
        if found is None:
            kind = type(self.pipeline).__name__
            raise ArchitectureError(
                f"{self.name}: a {kind} has no {' or '.join(NETWORKS)}: give a pipeline that has one"
            )
        return found

    @property
    def network(self) -> Any:
        """The network, in evaluation mode."""
        return getattr(self.pipeline, self.part)

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of the network."""
        return Blocks(self.network, self.name)

    @cached_property
    def noising(self) -> Any:
        """Noise scheduler of training: the betas of the pipeline's scheduler, over all of its timesteps."""
        diffusers = require("diffusers", "vision", "noise")
        return diffusers.DDPMScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return int(self.noising.config.num_train_timesteps)

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        parameters = sum(each.numel() for each in self.network.parameters())
        kind = type(self.network).__name__
        digest = fingerprint.state(self.network)
        return {"name": self.name, "family": kind, "parameters": parameters, "sha256": digest}

    # Inputs of the network

    def encoders(self) -> dict[str, str]:
        """Digests of the pipeline's other modules, such as its autoencoder and its text encoders."""
        parts = {name: each for name, each in self.pipeline.components.items() if isinstance(each, torch.nn.Module)}
        return {name: fingerprint.state(each) for name, each in parts.items() if name != self.part}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        size = self.network.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @torch.no_grad()
    def clean(self, images: Sequence[Captioned]) -> Tensor:
        """Convert images into clean inputs of the network: x_0 [images, channels, height, width].

        They are resized, centre-cropped, and encoded if the pipeline works on latents.
        """
        transforms = require("torchvision.transforms.v2", "vision", "scaling images")
        vae = getattr(self.pipeline, "vae", None)
        times = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = (times * each for each in self.size)
        fit = transforms.Compose([transforms.Resize(min(height, width)), transforms.CenterCrop((height, width))])

        def pixels(each: Captioned) -> Tensor:  # [3, height, width]
            row = torch.from_numpy(each.image).permute(2, 0, 1)
            return (row if row.shape[1:] == (height, width) else fit(row)) / 127.5 - 1

        if vae is None:
            rows = torch.stack([pixels(each) for each in images])
            return rows.mean(dim=1, keepdim=True) if self.network.config.in_channels == 1 else rows
        inputs = (pixels(each)[None].to(vae.device, vae.dtype) for each in images)  # large ones, so one at a time
        latents = [vae.encode(each).latent_dist.mode().float().cpu() for each in inputs]
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (torch.cat(latents) - shift) * vae.config.scaling_factor

    @torch.no_grad()
    def conditions(self, images: Sequence[Captioned]) -> dict[str, Tensor]:
        """Compute the conditioning inputs of images, by name, with one row per image.

        Raises:
            ArchitectureError: for images without classes if the network needs them, or with unknown classes.
        """
        config = self.network.config
        known = getattr(config, "num_class_embeds", None) or getattr(config, "num_embeds_ada_norm", None)
        if known or self.part == "transformer":
            labels = [each.label for each in images if each.label is not None]
            if len(labels) < len(images):
                raise ArchitectureError(
                    f"{self.name} is conditioned on classes, but these images have none: give a folder with one folder "
                    "per class, or digits"
                )
            if known and max(labels) >= known:
                raise ArchitectureError(
                    f"{self.name} has {known} classes, but these images have {max(labels) + 1}: give its own"
                )
            return {"class_labels": torch.tensor(labels)}
        if not hasattr(self.pipeline, "encode_prompt"):
            return {}
        texts = [each.text for each in images]
        how = {"device": self.network.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        parts = [
            self.pipeline.encode_prompt(texts[start : start + CAPTIONS], **how)
            for start in range(0, len(texts), CAPTIONS)
        ]
        found = {"encoder_hidden_states": torch.cat([each[0].cpu() for each in parts])}
        if len(parts[0]) == 4:  # SDXL: a pooled text embedding, and the crop of the image
            vae = self.pipeline.vae
            height, width = (2 ** (len(vae.config.block_out_channels) - 1) * each for each in self.size)
            times = torch.tensor([[height, width, 0, 0, height, width]], dtype=parts[0][0].dtype)
            pooled = torch.cat([each[2].cpu() for each in parts])
            found |= {"text_embeds": pooled, "time_ids": times.repeat(len(texts), 1)}
        return found

    def predict(self, network: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Compute the prediction of a network, this one or a modified one.

        Args:
            network: the network.
            noisy: noisy images [batch, channels, height, width].
            timesteps: timestep of each image [batch].
            conditions: conditioning inputs by name.
        """
        arguments: dict[str, Any] = dict(conditions)
        added = {name: arguments.pop(name) for name in ("text_embeds", "time_ids") if name in arguments}
        if added:
            arguments["added_cond_kwargs"] = added
        output: Tensor = network(noisy, timestep=timesteps, **arguments, return_dict=False)[0]
        return output[:, : noisy.shape[1]]  # further channels are a variance

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the training target: the noise, or as defined by the scheduler's ``prediction_type``.

        Args:
            clean: clean images.
            noise: the noise.
            timesteps: timestep of each image.
        """
        kind = self.noising.config.prediction_type
        if kind == "epsilon":
            return noise
        velocity: Tensor = self.noising.get_velocity(clean, noise, timesteps)
        return clean if kind == "sample" else velocity

    def with_network(self, network: Any, name: str = "") -> Denoiser:
        """Copy with another network in the same pipeline.

        Args:
            network: the network.
            name: name for messages; defaults to the current one.
        """
        components = {**self.pipeline.components, self.part: network}
        scalars = {name: self.pipeline.config[name] for name in self.pipeline.config if not name.startswith("_")}
        made = type(self.pipeline)(**(scalars | components))
        made.set_progress_bar_config(disable=True)
        return Denoiser(made, name or self.name)
