"""CoLa, chain of layers: search which layers to skip or repeat so that one sample is answered right."""

from lamella.methods.cola.method import cola, search_paths
from lamella.methods.cola.page import layer_scores, rates, report
from lamella.methods.cola.paths import (
    PathSearchResult,
    PathSettings,
    PathStudy,
    ProblemStudy,
    edits,
    find_paths,
    repeat,
    skip,
    study_sample,
)
from lamella.methods.cola.predictor import (
    OPS,
    PathPredictor,
    PredictorNetwork,
    Segment,
    compile_path,
    decode,
    parse,
    targets,
    train_predictor,
)
from lamella.methods.cola.prefix_tree import PrefixTree
from lamella.methods.cola.result import Paths
from lamella.methods.cola.running import KnownAnswers
from lamella.methods.cola.samples import PathAnswerer, Problem, Problems, plain, read_samples, same
from lamella.methods.cola.tree import SearchNode, TreeSearch, random_search, tree_search

__all__ = [
    "OPS",
    "KnownAnswers",
    "PathAnswerer",
    "PathPredictor",
    "PathSearchResult",
    "PathSettings",
    "PathStudy",
    "Paths",
    "PredictorNetwork",
    "PrefixTree",
    "Problem",
    "ProblemStudy",
    "Problems",
    "SearchNode",
    "Segment",
    "TreeSearch",
    "cola",
    "compile_path",
    "decode",
    "edits",
    "find_paths",
    "layer_scores",
    "parse",
    "plain",
    "random_search",
    "rates",
    "read_samples",
    "repeat",
    "report",
    "same",
    "search_paths",
    "skip",
    "study_sample",
    "targets",
    "train_predictor",
    "tree_search",
]
