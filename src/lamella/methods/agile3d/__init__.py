"""AGILE3D: interactive segmentation of several objects of a scan or image at once, on a scene that is encoded once."""

from lamella.methods.agile3d.clicks import Click, Clicks, simulate_clicks
from lamella.methods.agile3d.collages import collages
from lamella.methods.agile3d.decoder import ClickDecoder, EncodedScene
from lamella.methods.agile3d.images import ImageEncoder, image_scene
from lamella.methods.agile3d.judge import answers, clicks_to, iou_at, nearest_click, play
from lamella.methods.agile3d.labelled import ClickLogs, LabelledScenes
from lamella.methods.agile3d.method import agile3d, judge, label
from lamella.methods.agile3d.modules import ClickSegmenter, SceneEncoder, SparseUNet, UNetWidths
from lamella.methods.agile3d.ply import read_ply, write_ply
from lamella.methods.agile3d.recipe import ClickSimulation
from lamella.methods.agile3d.result import Segmenter, SegmenterShape
from lamella.methods.agile3d.rooms import rooms
from lamella.methods.agile3d.scene import ClickScene, Tokens
from lamella.methods.agile3d.scenes import Scenes
from lamella.methods.agile3d.session import ClickLog, Session
from lamella.methods.agile3d.viewer import Viewer

__all__ = [
    "Click",
    "ClickDecoder",
    "ClickLog",
    "ClickLogs",
    "ClickScene",
    "ClickSegmenter",
    "ClickSimulation",
    "Clicks",
    "EncodedScene",
    "ImageEncoder",
    "LabelledScenes",
    "SceneEncoder",
    "Scenes",
    "Segmenter",
    "SegmenterShape",
    "Session",
    "SparseUNet",
    "Tokens",
    "UNetWidths",
    "Viewer",
    "agile3d",
    "answers",
    "clicks_to",
    "collages",
    "image_scene",
    "iou_at",
    "judge",
    "label",
    "nearest_click",
    "play",
    "read_ply",
    "rooms",
    "simulate_clicks",
    "write_ply",
]
