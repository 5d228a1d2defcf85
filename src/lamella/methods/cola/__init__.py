"""CoLa, chain of layers: for one sample with a known answer, which layers to skip or repeat to get it right."""

from lamella.methods.cola.method import cola, search_paths
from lamella.methods.cola.page import layer_scores, rates, report
from lamella.methods.cola.paths import (
    Found,
    PathStudy,
    ProblemStudy,
    Settings,
    edits,
    find_paths,
    repeat,
    skip,
    study_sample,
)
from lamella.methods.cola.predictor import (
    OPS,
    Network,
    PathPredictor,
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
from lamella.methods.cola.samples import PathReader, Problem, Problems, plain, read_samples, same
from lamella.methods.cola.tree import Node, TreeSearch, random_search, tree_search

__all__ = [
    "OPS",
    "Found",
    "KnownAnswers",
    "Network",
    "Node",
    "PathPredictor",
    "PathReader",
    "PathStudy",
    "Paths",
    "PrefixTree",
    "Problem",
    "ProblemStudy",
    "Problems",
    "Segment",
    "Settings",
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
