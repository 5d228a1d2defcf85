"""CoLa, chain of layers: for one sample with a known answer, which layers to skip or repeat to get it right."""

from lamella.methods.cola.method import cola, search_paths
from lamella.methods.cola.page import layer_scores, rates, report
from lamella.methods.cola.paths import (
    Outcome,
    SampleStudy,
    Settings,
    Study,
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
from lamella.methods.cola.running import Answers
from lamella.methods.cola.samples import Reader, Sample, Samples, plain, read_samples, same
from lamella.methods.cola.tree import Node, Search, random_search, tree_search

__all__ = [
    "OPS",
    "Answers",
    "Network",
    "Node",
    "Outcome",
    "PathPredictor",
    "Paths",
    "PrefixTree",
    "Reader",
    "Sample",
    "SampleStudy",
    "Samples",
    "Search",
    "Segment",
    "Settings",
    "Study",
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
