"""CapRecover: what an eavesdropper reads of a split model's features: classes, captions, tokens; and defences."""

from lamella.methods.caprecover.audit import (
    Eavesdropping,
    Sets,
    accuracy,
    audited,
    of_link,
    recommended,
    recorded,
    trained,
)
from lamella.methods.caprecover.captioner import Captioner, Spoken, recovered, taught
from lamella.methods.caprecover.captions import captions, small_writer
from lamella.methods.caprecover.digits import FourStages
from lamella.methods.caprecover.guard import Guard, scales
from lamella.methods.caprecover.method import caprecover
from lamella.methods.caprecover.readers import READERS, nearest
from lamella.methods.caprecover.tokens import streams, tokens
from lamella.methods.caprecover.victim import Victim, of_timm

__all__ = [
    "READERS",
    "Captioner",
    "Eavesdropping",
    "FourStages",
    "Guard",
    "Sets",
    "Spoken",
    "Victim",
    "accuracy",
    "audited",
    "caprecover",
    "captions",
    "nearest",
    "of_link",
    "of_timm",
    "recommended",
    "recorded",
    "recovered",
    "scales",
    "small_writer",
    "streams",
    "taught",
    "tokens",
    "trained",
]
