"""Settings that must be made before any test imports torch or a Hugging Face library."""

import os

# More threads than this only make small tensors slower, and several test workers would fight for the cores.
THREADS = 2
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, str(THREADS))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tests build their models or take them from the zoo; a look-up at the hub would be a mistake, and should fail at once.
# A test of the hub itself, marked `network`, is run with HF_HUB_OFFLINE=0 in the environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
