"""SLR, Selective Layer Restoration: restore the pre-trained weights of one range of layers to regain diversity."""

from lamella.methods.slr.answers import ChoiceQuestion, EncodedQuestions, QuestionScores, answer
from lamella.methods.slr.baselines import fixed_intervals, mix_models, random_intervals, soup, with_norms_of
from lamella.methods.slr.diversity import diversity, first_answer
from lamella.methods.slr.intervals import Interval, answer_restored, intervals, layer_runs
from lamella.methods.slr.method import plan_of, slr
from lamella.methods.slr.open_ended import open_questions
from lamella.methods.slr.pair import check_pair, check_same_tokens
from lamella.methods.slr.questions import Questions, crc, encode_questions, load_questions
from lamella.methods.slr.search import (
    EMPTY,
    MixedModel,
    SearchResult,
    answerable,
    choose,
    measure,
    measure_restored,
    search,
)

__all__ = [
    "EMPTY",
    "ChoiceQuestion",
    "EncodedQuestions",
    "Interval",
    "MixedModel",
    "QuestionScores",
    "Questions",
    "SearchResult",
    "answer",
    "answer_restored",
    "answerable",
    "check_pair",
    "check_same_tokens",
    "choose",
    "crc",
    "diversity",
    "encode_questions",
    "first_answer",
    "fixed_intervals",
    "intervals",
    "layer_runs",
    "load_questions",
    "measure",
    "measure_restored",
    "mix_models",
    "open_questions",
    "plan_of",
    "random_intervals",
    "search",
    "slr",
    "soup",
    "with_norms_of",
]
