"""REWIRE: rewrite documents that filters would discard, and combine the best rewrites with the best raw text."""

from lamella.methods.rewire.accounts import diversity
from lamella.methods.rewire.guiding import Guide, parse_answer
from lamella.methods.rewire.method import QualityFilter, Rewriting, rewire, score, select, select_best
from lamella.methods.rewire.pool import PoolRules, broken_rule, near_duplicates, pool_of
from lamella.methods.rewire.quality import Positives, TrainedFastText, cross_fitted, fit_quality, top
from lamella.methods.rewire.result import Rewritten

__all__ = [
    "Guide",
    "PoolRules",
    "Positives",
    "QualityFilter",
    "Rewriting",
    "Rewritten",
    "TrainedFastText",
    "broken_rule",
    "cross_fitted",
    "diversity",
    "fit_quality",
    "near_duplicates",
    "parse_answer",
    "pool_of",
    "rewire",
    "score",
    "select",
    "select_best",
    "top",
]
