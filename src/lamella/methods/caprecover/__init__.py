"""CapRecover: what an eavesdropper recovers from a split model's features (classes, captions, tokens), and defences."""

from lamella.methods.caprecover.attackers import ATTACKERS, nearest
from lamella.methods.caprecover.audit import (
    AttackLoss,
    AuditData,
    accuracy,
    measure_defences,
    recommend_cut,
    record_features,
    run_attacks,
    train_attacker,
)
from lamella.methods.caprecover.captioner import Captioner, CaptionLoss, recover_captions, train_captioner
from lamella.methods.caprecover.captions import captions, small_writer
from lamella.methods.caprecover.digits import FourStages
from lamella.methods.caprecover.guard import LinkDefence, scales
from lamella.methods.caprecover.method import caprecover
from lamella.methods.caprecover.tokens import hidden_states, tokens
from lamella.methods.caprecover.victim import Victim, of_timm

__all__ = [
    "ATTACKERS",
    "AttackLoss",
    "AuditData",
    "CaptionLoss",
    "Captioner",
    "FourStages",
    "LinkDefence",
    "Victim",
    "accuracy",
    "caprecover",
    "captions",
    "hidden_states",
    "measure_defences",
    "nearest",
    "of_timm",
    "recommend_cut",
    "record_features",
    "recover_captions",
    "run_attacks",
    "scales",
    "small_writer",
    "tokens",
    "train_attacker",
    "train_captioner",
]
