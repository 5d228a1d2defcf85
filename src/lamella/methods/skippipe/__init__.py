"""SkipPipe: pipeline-parallel training over slow links, with microbatch paths that skip stages."""

from lamella.methods.skippipe.method import omit, plan, skippipe
from lamella.methods.skippipe.network import Load, Machine, PipelineNetwork, published
from lamella.methods.skippipe.profile import NetworkProfile, profile
from lamella.methods.skippipe.recipe import train
from lamella.methods.skippipe.schedule import PipelineSchedule

__all__ = [
    "Load",
    "Machine",
    "NetworkProfile",
    "PipelineNetwork",
    "PipelineSchedule",
    "omit",
    "plan",
    "profile",
    "published",
    "skippipe",
    "train",
]
