"""Peak memory of a checkpoint, measured in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.errors import CheckpointError
from lamella.progress import tracker
from lamella.zoo import preference

_CHILD = """
import json, sys
import torch, transformers, lamella
from lamella.evaluate.speed import random_tokens
from lamella.needs import peak_used_memory
from lamella.runtime import Sampler, denoise
from lamella.zoo import prefer
folder, dtype, batch, prompt, tokens = *sys.argv[1:3], *map(int, sys.argv[3:])
prefer(dtype or None)
idle = peak_used_memory()
model = lamella.load(folder).model
loaded = peak_used_memory()
ids = random_tokens([model], batch, prompt)
if hasattr(model, "generate"):
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
else:
    denoise(model, ids, sampler=Sampler(length=tokens))
print(json.dumps({"idle": idle, "loaded": loaded, "peak": peak_used_memory()}))
"""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that loads a checkpoint and generates, in bytes.

    Attributes:
        peak: the peak, beyond the memory of the libraries.
        libraries: memory of Python and the libraries before anything is loaded.
    """

    peak: int
    libraries: int

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON values."""
        return {"peak_bytes": self.peak, "libraries_bytes": self.libraries}


def peak_memory(folder: str | Path, batch: int = 1, prompt: int = 128, tokens: int = 16) -> Memory:
    """Load a checkpoint folder in a new process, generate on the CPU, and return its peak resident memory.

    It is loaded in the precision set by :func:`lamella.zoo.prefer`.

    Args:
        folder: folder of the checkpoint.
        batch: number of sequences.
        prompt: tokens of each prompt.
        tokens: number of tokens to generate.

    Raises:
        CheckpointError: if the child process fails; the message contains its last line.
    """
    dtype = str(preference().dtype or "").removeprefix("torch.")
    command = [sys.executable, "-c", _CHILD, str(folder), dtype, str(batch), str(prompt), str(tokens)]
    with tracker(f"memory of {Path(folder).name}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{folder} could not be loaded to measure its memory: {last}")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    return Memory(measured["peak"] - measured["idle"], measured["idle"])
