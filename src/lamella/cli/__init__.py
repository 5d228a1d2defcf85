"""The command line: declared commands, generated from their signatures, and a few that are written by hand."""

import os

# Threads that wait for work must not spin: on a busy machine they would take the cores that they wait for. OpenMP
# reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# isort: off
from lamella.cli import models, talking
from lamella.cli.app import app, main

__all__ = ["app", "main", "models", "talking"]
