"""HiRes-LLaVA: see :mod:`lamella.methods.hires_llava.method`."""

from lamella.methods.hires_llava.entities import CUTS, EntityGrid, EntityQuestion, entity_questions
from lamella.methods.hires_llava.method import Restoring, build, hires_llava, judge, seams
from lamella.methods.hires_llava.modules import SelfMiningSampler, SliceRestore
from lamella.methods.hires_llava.network import HiResLlava, HiResLlavaConfig, HiResLlavaProcessor, with_slices
from lamella.methods.hires_llava.result import Restored
from lamella.methods.hires_llava.seams import Seams, compare_neighbours, patch_maps, probe_entities
from lamella.methods.hires_llava.slicing import SliceGrid, Slicing, TileLayout, cut, merge

__all__ = [
    "CUTS",
    "EntityGrid",
    "EntityQuestion",
    "HiResLlava",
    "HiResLlavaConfig",
    "HiResLlavaProcessor",
    "Restored",
    "Restoring",
    "Seams",
    "SelfMiningSampler",
    "SliceGrid",
    "SliceRestore",
    "Slicing",
    "TileLayout",
    "build",
    "compare_neighbours",
    "cut",
    "entity_questions",
    "hires_llava",
    "judge",
    "merge",
    "patch_maps",
    "probe_entities",
    "seams",
    "with_slices",
]
