"""The command line: declared commands, generated from their signatures, and a few that are written by hand."""

import os

# Threads that wait for work must not spin for long: on a busy machine they would take the cores that they wait for.
# OpenMP reads this once, when torch is loaded. GNU's threads sleep after microseconds, which costs less than at once.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# isort: off
from lamella.cli import models, serving, talking
from lamella.cli.app import app, main

__all__ = ["app", "main", "models", "serving", "talking"]
