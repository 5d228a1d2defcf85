"""The identity of a training run, so that a folder's checkpoints are resumed only by the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lamella.errors import TrainingError
from lamella.files import UNFINISHED
from lamella.train.log import TrainingLog

LOG = "log.json"


def check_same_run(out: Path, ours: Mapping[str, Any]) -> None:
    """Check that a folder is empty, or contains a run with these settings.

    Args:
        out: folder of the run.
        ours: settings of the run that begins or resumes.

    Raises:
        TrainingError: if it contains something else.
    """
    if not out.exists() or all(path.match(UNFINISHED) for path in out.iterdir()):
        return  # a run that was killed while it wrote its first file has not begun
    try:
        theirs = TrainingLog.read(out / LOG).settings
    except TrainingError:
        raise TrainingError(f"{out} is not the folder of a training run: give a new folder") from None
    differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differ:
        what = ", ".join(f"{key} {short(theirs.get(key))}, not {short(ours.get(key))}" for key in differ)
        raise TrainingError(f"{out} contains a run with {what}: give a new folder, or remove this one")


def samples_digest(samples: Sequence[Any]) -> str:
    """Return a digest of all tensors of all samples, by name or by role and name, or of their ``content()``."""
    digest = hashlib.sha256()
    for sample in samples:
        if hasattr(sample, "content"):
            digest.update(hashlib.sha256(sample.content()).digest())
        else:
            _digest(digest, sample)
    return digest.hexdigest()


def _digest(digest: Any, sample: Mapping[str, Any]) -> None:
    for name in sorted(sample):
        each = sample[name]
        if isinstance(each, Mapping):
            digest.update(f"{name}: ".encode())
            _digest(digest, each)
        else:
            digest.update(f"{name} {list(each.shape)} {each.dtype};".encode())
            digest.update(each.cpu().numpy().tobytes())


def model_digest(model: nn.Module, trained: Collection[str]) -> str:
    """Return a digest of all names and shapes, and of a few values of each frozen tensor.

    Args:
        model: the model.
        trained: names of the trained parameters, whose values do not enter the digest.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {name in trained};".encode())
        if name not in trained:
            values = parameter.detach().flatten()
            digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as read back from JSON, so that they compare equal to those of a file."""
    return json.loads(json.dumps(settings))


def short(value: Any) -> str:
    """Return a value as text of at most 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
