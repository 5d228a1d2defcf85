"""REWIRE: rewrite what filters would throw away, and keep the best of it beside the best raw text."""

from lamella.methods.rewire.accounts import diversity
from lamella.methods.rewire.guiding import Guide, parsed
from lamella.methods.rewire.method import Judging, Rewriting, judge, rewire, score
from lamella.methods.rewire.pool import Rules, near_duplicates, pool_of, refused
from lamella.methods.rewire.quality import Positives, cross_fitted, fit_quality, top

__all__ = [
    "Guide",
    "Judging",
    "Positives",
    "Rewriting",
    "Rules",
    "cross_fitted",
    "diversity",
    "fit_quality",
    "judge",
    "near_duplicates",
    "parsed",
    "pool_of",
    "refused",
    "rewire",
    "score",
    "top",
]
