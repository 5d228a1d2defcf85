"""Refaçade: transfer the texture of a reference to an object in an image or a video, and keep its shape and shading."""

from lamella.methods.refacade.base import Base
from lamella.methods.refacade.clips import Clip
from lamella.methods.refacade.conditions import dilate_mask, fold_mask, mask_latent, unfold_mask
from lamella.methods.refacade.datasets import Objects, removal_samples, transfer_samples
from lamella.methods.refacade.frames import Frames, Masks, Reference
from lamella.methods.refacade.jigsaw import Jigsaw, Puzzle
from lamella.methods.refacade.method import layers, refacade, remover, train
from lamella.methods.refacade.modules import ControlBranch, JointStreamAttention
from lamella.methods.refacade.objects import TexturedObject, objects, textured_object
from lamella.methods.refacade.recipe import DmdLoss, StudentAndFake, TransferLoss, distil, train_branch, train_remover
from lamella.methods.refacade.remover import TextureRemover, euler
from lamella.methods.refacade.result import AdapterMetadata, Remover, Retextured, Retexturer
from lamella.methods.refacade.sampler import (
    Conditions,
    RetexturedClip,
    SamplerSettings,
    conditions,
    guided_velocity,
    retexture,
    sample_latents,
)
from lamella.methods.refacade.sensitivity import hint_sensitivity, most_sensitive

__all__ = [
    "AdapterMetadata",
    "Base",
    "Clip",
    "Conditions",
    "ControlBranch",
    "DmdLoss",
    "Frames",
    "Jigsaw",
    "JointStreamAttention",
    "Masks",
    "Objects",
    "Puzzle",
    "Reference",
    "Remover",
    "Retextured",
    "RetexturedClip",
    "Retexturer",
    "SamplerSettings",
    "StudentAndFake",
    "TextureRemover",
    "TexturedObject",
    "TransferLoss",
    "conditions",
    "dilate_mask",
    "distil",
    "euler",
    "fold_mask",
    "guided_velocity",
    "hint_sensitivity",
    "layers",
    "mask_latent",
    "most_sensitive",
    "objects",
    "refacade",
    "removal_samples",
    "remover",
    "retexture",
    "sample_latents",
    "textured_object",
    "train",
    "train_branch",
    "train_remover",
    "transfer_samples",
    "unfold_mask",
]
