"""Refaçade: an object in a picture or a video gets the texture of a reference, and keeps its shape and shading."""

from lamella.methods.refacade.base import Base
from lamella.methods.refacade.clips import Clip
from lamella.methods.refacade.conditions import dilated, folded, mask_latent, unfolded
from lamella.methods.refacade.frames import Frames, Masks, Reference
from lamella.methods.refacade.jigsaw import Jigsaw, Puzzle
from lamella.methods.refacade.lessons import Objects, removal_samples, transfer_samples
from lamella.methods.refacade.method import layers, refacade, remover, train
from lamella.methods.refacade.modules import ControlBranch, JointStreamAttention
from lamella.methods.refacade.objects import TexturedObject, objects, textured_object
from lamella.methods.refacade.recipe import Distillation, Pair, TransferLoss, distil, train_branch, train_remover
from lamella.methods.refacade.remover import TextureRemover, euler
from lamella.methods.refacade.result import Adapter, Remover, Retextured, Retexturer
from lamella.methods.refacade.sampler import Conditions, Drawn, Sampling, conditions, guided, retextured, sampled
from lamella.methods.refacade.sensitivity import hint_sensitivity, most_sensitive

__all__ = [
    "Adapter",
    "Base",
    "Clip",
    "Conditions",
    "ControlBranch",
    "Distillation",
    "Drawn",
    "Frames",
    "Jigsaw",
    "JointStreamAttention",
    "Masks",
    "Objects",
    "Pair",
    "Puzzle",
    "Reference",
    "Remover",
    "Retextured",
    "Retexturer",
    "Sampling",
    "TextureRemover",
    "TexturedObject",
    "TransferLoss",
    "conditions",
    "dilated",
    "distil",
    "euler",
    "folded",
    "guided",
    "hint_sensitivity",
    "layers",
    "mask_latent",
    "most_sensitive",
    "objects",
    "refacade",
    "removal_samples",
    "remover",
    "retextured",
    "sampled",
    "textured_object",
    "train",
    "train_branch",
    "train_remover",
    "transfer_samples",
    "unfolded",
]
