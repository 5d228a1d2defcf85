"""Models and texts for any machine: the embedded default model, built-in texts, nano models."""

from lamella.zoo.cache import cache_folder
from lamella.zoo.configs import open_config
from lamella.zoo.draft import NamedDraft
from lamella.zoo.libraries import timm_features
from lamella.zoo.named import ComparedModel, LazyCheckpoint
from lamella.zoo.nano import NANO, NANO_ASSEMBLIES, NANO_DIFFUSION, nano
from lamella.zoo.opening import (
    SavedModel,
    chat_inputs,
    check_folder,
    computes_well,
    default_device,
    load,
    open_for,
    open_model,
    open_processor,
    open_saved,
    open_stack,
    open_tokenizer,
    parameters_of,
    prefer,
    preference,
    size_in_memory,
)
from lamella.zoo.pipelines import Pipeline
from lamella.zoo.pull import ZOO, convert_gguf, pull, resolve
from lamella.zoo.views import View

__all__ = [
    "NANO",
    "NANO_ASSEMBLIES",
    "NANO_DIFFUSION",
    "ZOO",
    "ComparedModel",
    "LazyCheckpoint",
    "NamedDraft",
    "Pipeline",
    "SavedModel",
    "View",
    "cache_folder",
    "chat_inputs",
    "check_folder",
    "computes_well",
    "convert_gguf",
    "default_device",
    "load",
    "nano",
    "open_config",
    "open_for",
    "open_model",
    "open_processor",
    "open_saved",
    "open_stack",
    "open_tokenizer",
    "parameters_of",
    "prefer",
    "preference",
    "pull",
    "resolve",
    "size_in_memory",
    "timm_features",
]
