"""MuraNet: walls, doors and windows of floor plans by one network, and what its two tasks share."""

from lamella.methods.muranet.assign import simota
from lamella.methods.muranet.attention import RelationAttention2d, RelationBlock
from lamella.methods.muranet.balance import Balance
from lamella.methods.muranet.branch import branch_point
from lamella.methods.muranet.drawing import Drawing
from lamella.methods.muranet.encoder import Blocks, Encoder, Widths, mura, of_timm
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.judge import grey_floor, judged, recognise
from lamella.methods.muranet.method import branch, judge, muranet, read, stages_worth, tune
from lamella.methods.muranet.modules import Detector, PlanNetwork, UNetDecoder
from lamella.methods.muranet.plans import FloorPlans
from lamella.methods.muranet.raster import floor_plans, synthetic_floor_plan
from lamella.methods.muranet.readings import Readings
from lamella.methods.muranet.recipe import Practice
from lamella.methods.muranet.result import Recogniser, Shape
from lamella.methods.muranet.vector import vector

__all__ = [
    "Balance",
    "Blocks",
    "Detector",
    "Drawing",
    "Encoder",
    "FloorPlan",
    "FloorPlans",
    "PlanNetwork",
    "Practice",
    "Readings",
    "Recogniser",
    "RelationAttention2d",
    "RelationBlock",
    "Shape",
    "UNetDecoder",
    "Widths",
    "branch",
    "branch_point",
    "floor_plans",
    "grey_floor",
    "judge",
    "judged",
    "mura",
    "muranet",
    "of_timm",
    "read",
    "recognise",
    "simota",
    "stages_worth",
    "synthetic_floor_plan",
    "tune",
    "vector",
]
