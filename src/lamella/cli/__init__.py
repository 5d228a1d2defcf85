"""The command line: one module of commands per kind of work, in the order in which ``--help`` shows them."""

import os

# Threads that wait for work must not spin: on a machine with other work they take the cores that they wait for. OpenMP
# reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# isort: off
from lamella.cli import plans, training, models, measuring, talking
from lamella.cli.app import app, main

__all__ = [
    "app",
    "main",
    "measuring",
    "models",
    "plans",
    "talking",
    "training",
]
