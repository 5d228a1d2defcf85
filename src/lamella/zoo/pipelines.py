"""Pipelines of diffusers and their networks, from untrusted folders.

Nothing in a folder is executed: parts are created from classes of diffusers and transformers, and a network from which
Lamella has removed blocks by Lamella's own code. A network is first built on the meta device, with a limit on its
number of parameters; its weights are read only if their shapes match the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn

from lamella.errors import CheckpointError, LamellaError, reason_of
from lamella.extras import require
from lamella.needs import current_recorder, without_values
from lamella.plan.checkpoint import read_header, read_json
from lamella.plan.filling import at_most, check_tensors, fill, load_network, pretrained
from lamella.stack import BLOCK_TABLES, Model
from lamella.stack.blocks import leave_out
from lamella.zoo.configs import CONFIG, open_config

INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"
NETWORKS = ("unet", "transformer")  # names of the denoising network in pipelines
CUT_MODULE, CUT, DROPPED = (
    "cut_network",
    "Cut",
    "lamella_dropped",
)  # for networks whose config cannot express removed blocks
LARGEST = 2**17  # of the numbers in a config
LONGEST = 2**13  # of position tables: Wan has 1,024
FIX = "give a folder written by diffusers, with safetensors"
PROCESSORS = ("PreTrainedTokenizerBase", "ProcessorMixin", "ImageProcessingMixin", "FeatureExtractionMixin")


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder contains a pipeline, or at least a network in a pipeline's subfolder."""
    if (folder / CONFIG).is_file():
        return False
    return (folder / INDEX).is_file() or any((folder / each / CONFIG).is_file() for each in NETWORKS)


class Pipeline(Model):
    """A pipeline of diffusers, in memory or in a folder. The parts in a folder are opened on first use.

    Args:
        pipeline: the pipeline in memory; None for one in a folder.
        path: the folder.
        name: its name in messages and reports.
        device: of its networks.
        dtype: of their weights; ``auto`` as they are stored.
    """

    def __init__(
        self,
        pipeline: Any = None,
        path: Path | None = None,
        name: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | str = "auto",
    ) -> None:
        self.library, self.architectures, self.path = "diffusers", {}, path
        self.name = name or (path.name if path else type(pipeline).__name__)
        self._device, self._dtype = device, dtype
        self._parts: dict[str, Any] = {} if pipeline is None else dict(pipeline.components)
        if pipeline is not None:
            self.model = pipeline

    @cached_property
    def index(self) -> dict[str, Any]:
        """The class of the pipeline, and the library and the class of each part; empty without an index file."""
        return read_json(self.path / INDEX) if self.path and (self.path / INDEX).is_file() else {}

    @cached_property
    def model(self) -> Any:
        """The pipeline with all of its parts, in evaluation mode.

        Raises:
            CheckpointError: for one that is damaged or incomplete, or that needs unsupported classes.
        """
        diffusers = require("diffusers", "vision", "opening a pipeline")
        if not self.index:
            raise CheckpointError(f"{self.path} has no {INDEX}: give the folder of a whole pipeline")
        kind = _class_of(diffusers, self.index.get("_class_name"))
        if kind is None or not issubclass(kind, diffusers.DiffusionPipeline):
            raise CheckpointError(
                f"{self.path}: '{self.index.get('_class_name')}' is not a pipeline of diffusers: {FIX}"
            )
        try:
            made = kind(**{name: self.part(name) for name in self.index if not name.startswith("_")})
        except LamellaError:
            raise
        except Exception as error:  # damaged files can cause errors of any type
            raise CheckpointError(f"{self.path}: cannot be opened: {reason_of(error)}: {FIX}") from None
        made.set_progress_bar_config(disable=True)
        return made

    @property
    def modules(self) -> list[nn.Module]:
        """The parts that are torch modules."""
        return [each for each in self.model.components.values() if isinstance(each, nn.Module)]

    def has(self, name: str) -> bool:
        """Return whether the pipeline has a part, such as a ``vae``."""
        if self.path is None:
            return self._parts.get(name) is not None
        return self.index.get(name) not in (None, [None, None]) if self.index else (self.path / name / CONFIG).is_file()

    def part(self, name: str, classes: Sequence[str] = ()) -> Any:
        """Return a part: a network in evaluation mode, a scheduler, a tokenizer; or a setting.

        Args:
            name: its name in the pipeline.
            classes: names of the allowed classes; any by default.

        Raises:
            CheckpointError: for a part that is missing, damaged, or of an unsupported class.
        """
        if name not in self._parts:
            found, recorder = self._open(name, classes), current_recorder()
            if isinstance(found, nn.Module) and recorder is not None:
                found = without_values(found)
                recorder.open(found)
            self._parts[name] = found
        found = self._parts[name]
        if classes and type(found).__name__ not in classes:
            raise CheckpointError(f"{self.name}: its {name} is not {' or '.join(classes)}: give another pipeline")
        return found

    def _open(self, name: str, classes: Sequence[str]) -> Any:
        if self.path is None:
            raise CheckpointError(f"{self.name} has no {name}: give a pipeline that has one")
        folder = self.path / name
        entry = self.index.get(name) if self.index else _class_in(folder)
        if not isinstance(entry, list) or entry == [None, None]:
            return None if isinstance(entry, list) else entry
        if len(entry) != 2 or not all(isinstance(each, str) for each in entry) or not name.isidentifier():
            raise CheckpointError(f"{self.path / INDEX}: '{name}' is not a valid part of a pipeline")
        library, kind = entry
        diffusers = require("diffusers", "vision", "opening a pipeline")
        if library == CUT_MODULE and name in NETWORKS:
            return open_network(folder, classes, self._dtype, self._device)
        home = {"diffusers": diffusers, "transformers": transformers}.get(library)
        home = home or (getattr(diffusers.pipelines, library, None) if library.isidentifier() else None)
        made = _class_of(home, kind)
        if made is not None and issubclass(made, diffusers.ModelMixin):
            return open_network(folder, classes, self._dtype, self._device, kind=made)
        if made is not None and issubclass(made, transformers.PreTrainedModel):
            if classes and kind not in classes:
                raise CheckpointError(f"{folder}: '{kind}' is not {' or '.join(classes)}: {FIX}")
            config = open_config(folder)
            if current_recorder() is not None:
                with init_empty_weights():
                    return made._from_config(config, dtype=self._dtype).eval()
            how = {"use_safetensors": True, "trust_remote_code": False, "config": config}
            part = pretrained(made, folder, local_files_only=True, dtype=self._dtype, **how)
            return part.eval().to(self._device)
        plain = (diffusers.SchedulerMixin, *(getattr(transformers, each) for each in PROCESSORS))
        if made is None or not (issubclass(made, plain) or made is transformers.AutoTokenizer):
            raise CheckpointError(f"{self.path / INDEX}: '{name}' needs {library}.{kind}, which is not supported")
        load = made.from_pretrained
        return load(folder, local_files_only=True, **({} if home is diffusers else {"trust_remote_code": False}))


def open_network(
    folder: Path,
    classes: Sequence[str] = (),
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    *,
    kind: Any = None,
) -> Any:
    """Return the diffusers network in a folder, in evaluation mode; on the meta device while needs are recorded.

    Args:
        folder: with a ``config.json`` and safetensors.
        classes: names of the allowed classes; any by default.
        dtype: of the weights; ``auto`` as they are stored.
        device: the device.
        kind: the class, if it is not read from the config.

    Raises:
        CheckpointError: for a folder that is missing, damaged, or of another class.
        LamellaError: if diffusers is not installed.
    """
    diffusers = require("diffusers", "vision", "opening a network")
    config = read_json(folder / CONFIG)
    name = config.get("_class_name") if kind is None else kind.__name__
    if classes and name not in classes:
        raise CheckpointError(f"{folder / CONFIG}: '{name}' is not {' or '.join(classes)}: {FIX}")
    kind = kind or _class_of(diffusers, name)
    if DROPPED not in config and (kind is None or not issubclass(kind, diffusers.ModelMixin)):
        raise CheckpointError(f"{folder / CONFIG}: '{name}' is not a network of diffusers: {FIX}")
    if "quantization_config" in config:
        raise CheckpointError(f"{folder}: its weights are quantised: give the folder of the original model")
    try:
        if DROPPED in config:
            return _restored(folder).to(device)
        files = _files(folder)
        shapes = {each.name: each.shape for file in files for each in read_header(file)}
        _check_numbers(config, folder / CONFIG)
        with torch.device("meta"), at_most(2 * len(shapes), folder / CONFIG):
            empty = kind.from_config(config)
        check_tensors(empty, _renamed(empty, shapes), folder)
        with init_empty_weights():  # buffers are computed, not stored
            network = kind.from_config(config)
        if current_recorder() is not None:
            return (network if dtype == "auto" else network.to(torch_dtype(dtype))).eval()
        weights = _renamed(network, {name: each for file in files for name, each in load_file(file).items()})
        wide = set(getattr(network, "_keep_in_fp32_modules", None) or ())
        for name, each in weights.items():
            if each.is_floating_point() and wide & set(name.split(".")):
                weights[name] = each.float()
            elif each.is_floating_point() and dtype != "auto":
                weights[name] = each.to(torch_dtype(dtype))
        return fill(network, weights, folder).eval().to(device)
    except LamellaError:
        raise
    except Exception as error:  # damaged files can cause errors of any type
        raise CheckpointError(f"{folder}: cannot be opened: {reason_of(error)}: {FIX}") from None


def torch_dtype(name: torch.dtype | str) -> torch.dtype:
    """Return a dtype by its name."""
    found: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
    return found


def _renamed(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return tensors with the names of this diffusers version: attentions of old checkpoints have others."""
    rename = getattr(network, "_fix_state_dict_keys_on_load", lambda _: None)
    rename(tensors)
    return tensors


def _restored(folder: Path) -> Any:
    """Return a network from which Lamella has removed blocks, built by Lamella's own code."""
    config = read_json(folder / CONFIG)
    kind, paths = str(config.pop("_class_name", "")).removeprefix(CUT), config.pop(DROPPED, None)
    if kind not in BLOCK_TABLES or not isinstance(paths, list) or not all(isinstance(each, str) for each in paths):
        raise CheckpointError(f"{folder / CONFIG}: '{kind}' without its blocks was not written by Lamella")
    diffusers = require("diffusers", "vision", "opening a network")

    def build() -> Any:
        made = getattr(diffusers, kind).from_config(config)
        for path in paths:
            block = made.get_submodule(path)
            left = BLOCK_TABLES[kind].kinds[type(block).__name__]
            leave_out(block, left.bypass, left.keeps)
        return made

    made = load_network(build, folder / WEIGHTS)
    made.register_to_config(**{DROPPED: paths})
    return made


def _class_of(home: Any, name: Any) -> Any:
    """Return a class of a library by its name; None if the library has no such class."""
    found = getattr(home, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) else None


def _class_in(folder: Path) -> list[str]:
    """Return the library and the class of a part without an index."""
    if not (folder / CONFIG).is_file():
        return ["transformers", "AutoTokenizer"]
    config = read_json(folder / CONFIG)
    if "_class_name" in config:
        return ["diffusers", str(config["_class_name"])]
    return ["transformers", str(next(iter(config.get("architectures") or ()), None))]


def _files(folder: Path) -> list[Path]:
    """Return the files of the weights, which must be in the folder of the index that names them."""
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {WEIGHTS}: {FIX}")
        return [folder / WEIGHTS]
    files = sorted(set(map(str, read_json(index)["weight_map"].values())))
    outside = next((each for each in files if Path(each).name != each), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {outside}, which is not in its folder: {FIX}")
    return [folder / each for each in files]


def _check_numbers(config: dict[str, Any], file: Path) -> None:
    """Check that no size in a config is excessive, since it may exhaust memory before the weights are checked."""
    for name, value in config.items():
        sizes = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
        most = LONGEST if name == "rope_max_seq_len" else LARGEST
        if "theta" not in name and any(each > most or each < -1 for each in sizes):
            raise CheckpointError(f"{file}: {name} is {str(value)[:40]}, which does not fit the weights: {FIX}")
