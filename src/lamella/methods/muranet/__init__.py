"""MuraNet: recognise walls, doors and windows of floor plans with one network, and study what its two tasks share."""

from lamella.methods.muranet.assign import simota
from lamella.methods.muranet.attention import RelationAttention2d, RelationBlock
from lamella.methods.muranet.balance import LossBalance
from lamella.methods.muranet.branch import branch_point
from lamella.methods.muranet.drawing import Drawing
from lamella.methods.muranet.encoder import BlockDesign, EncoderWidths, PlanEncoder, mura, of_timm
from lamella.methods.muranet.floor_plan import FloorPlan
from lamella.methods.muranet.judge import evaluate_plans, grey_floor, recognise
from lamella.methods.muranet.method import branch, judge, muranet, read, stages_worth, tune
from lamella.methods.muranet.modules import Detector, PlanNetwork, UNetDecoder
from lamella.methods.muranet.plans import FloorPlans
from lamella.methods.muranet.raster import floor_plans, synthetic_floor_plan
from lamella.methods.muranet.readings import Readings
from lamella.methods.muranet.recipe import PlanTraining
from lamella.methods.muranet.result import Recogniser, RecogniserShape
from lamella.methods.muranet.vector import vector

__all__ = [
    "BlockDesign",
    "Detector",
    "Drawing",
    "EncoderWidths",
    "FloorPlan",
    "FloorPlans",
    "LossBalance",
    "PlanEncoder",
    "PlanNetwork",
    "PlanTraining",
    "Readings",
    "Recogniser",
    "RecogniserShape",
    "RelationAttention2d",
    "RelationBlock",
    "UNetDecoder",
    "branch",
    "branch_point",
    "evaluate_plans",
    "floor_plans",
    "grey_floor",
    "judge",
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
