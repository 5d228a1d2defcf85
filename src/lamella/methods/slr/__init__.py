"""SLR, Selective Layer Restoration: pre-trained weights back in one range of layers, and diversity with them."""

from lamella.methods.slr.answers import Answers, Asked, Question, answer
from lamella.methods.slr.baselines import mixed, placed, random_intervals, soup, with_norms_of
from lamella.methods.slr.diversity import diversity, first_named
from lamella.methods.slr.intervals import Interval, answer_restored, intervals, layer_runs
from lamella.methods.slr.method import plan_of, slr
from lamella.methods.slr.open_ended import open_questions
from lamella.methods.slr.pair import check_pair, check_same_tokens
from lamella.methods.slr.questions import Questions, ask, crc, load_questions
from lamella.methods.slr.search import EMPTY, Blend, Blends, answerable, choose, measure, restored, search

__all__ = [
    "EMPTY",
    "Answers",
    "Asked",
    "Blend",
    "Blends",
    "Interval",
    "Question",
    "Questions",
    "answer",
    "answer_restored",
    "answerable",
    "ask",
    "check_pair",
    "check_same_tokens",
    "choose",
    "crc",
    "diversity",
    "first_named",
    "intervals",
    "layer_runs",
    "load_questions",
    "measure",
    "mixed",
    "open_questions",
    "placed",
    "plan_of",
    "random_intervals",
    "restored",
    "search",
    "slr",
    "soup",
    "with_norms_of",
]
