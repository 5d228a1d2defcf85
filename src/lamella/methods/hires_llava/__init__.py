"""HiRes-LLaVA: see :mod:`lamella.methods.hires_llava.method`."""

from lamella.methods.hires_llava.entities import CUTS, Asked, EntityGrid, asked
from lamella.methods.hires_llava.method import Restoring, built, hires_llava, judge, seams
from lamella.methods.hires_llava.modules import SelfMiningSampler, SliceRestore
from lamella.methods.hires_llava.network import HiResLlava, HiResLlavaConfig, HiResLlavaProcessor, sliced
from lamella.methods.hires_llava.result import Restored
from lamella.methods.hires_llava.seams import Seams, compared, probed, streams
from lamella.methods.hires_llava.slicing import Grid, Slices, Slicing, cut, merge

__all__ = [
    "CUTS",
    "Asked",
    "EntityGrid",
    "Grid",
    "HiResLlava",
    "HiResLlavaConfig",
    "HiResLlavaProcessor",
    "Restored",
    "Restoring",
    "Seams",
    "SelfMiningSampler",
    "SliceRestore",
    "Slices",
    "Slicing",
    "asked",
    "built",
    "compared",
    "cut",
    "hires_llava",
    "judge",
    "merge",
    "probed",
    "seams",
    "sliced",
    "streams",
]
