"""AGILE3D: several objects of a scan segmented at once, click by click, on a scene that is encoded once."""

from lamella.methods.agile3d.clicks import Click, Clicks, simulated
from lamella.methods.agile3d.collages import collages
from lamella.methods.agile3d.decoder import ClickDecoder, Encoded
from lamella.methods.agile3d.judge import answers, clicks_to, iou_at, nearest_click, play
from lamella.methods.agile3d.labelled import ClickLogs, Labelled
from lamella.methods.agile3d.method import agile3d, judge, label
from lamella.methods.agile3d.modules import ClickSegmenter, Encoder, SparseUNet, Widths
from lamella.methods.agile3d.pictures import PictureEncoder, pictured
from lamella.methods.agile3d.ply import read_ply, write_ply
from lamella.methods.agile3d.recipe import Practice
from lamella.methods.agile3d.result import Segmenter, Shape
from lamella.methods.agile3d.rooms import rooms
from lamella.methods.agile3d.scene import Scene, Tokens
from lamella.methods.agile3d.scenes import Scenes
from lamella.methods.agile3d.session import ClickLog, Session
from lamella.methods.agile3d.viewer import Viewer

__all__ = [
    "Click",
    "ClickDecoder",
    "ClickLog",
    "ClickLogs",
    "ClickSegmenter",
    "Clicks",
    "Encoded",
    "Encoder",
    "Labelled",
    "PictureEncoder",
    "Practice",
    "Scene",
    "Scenes",
    "Segmenter",
    "Session",
    "Shape",
    "SparseUNet",
    "Tokens",
    "Viewer",
    "Widths",
    "agile3d",
    "answers",
    "clicks_to",
    "collages",
    "iou_at",
    "judge",
    "label",
    "nearest_click",
    "pictured",
    "play",
    "read_ply",
    "rooms",
    "simulated",
    "write_ply",
]
