"""Pre-RMSNorm: rewrite Pre-LN models with RMSNorm instead of LayerNorm, without changing what they compute."""

from lamella.methods.pre_rmsnorm.llama import to_llama
from lamella.methods.pre_rmsnorm.method import pre_rmsnorm
from lamella.methods.pre_rmsnorm.rewrite import CRMSNorm, Form, RMSNorm
from lamella.methods.pre_rmsnorm.rotation import rotate
from lamella.methods.pre_rmsnorm.timm_models import rewrite_timm
from lamella.methods.pre_rmsnorm.trainable import pre_ln_state, trainable

__all__ = [
    "CRMSNorm",
    "Form",
    "RMSNorm",
    "pre_ln_state",
    "pre_rmsnorm",
    "rewrite_timm",
    "rotate",
    "to_llama",
    "trainable",
]
