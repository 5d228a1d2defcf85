"""The command line: one module of commands per kind of work, in the order in which ``--help`` shows them."""

# isort: off
from lamella.cli import plans, training, restoring, forgetting, repairing, models, measuring, talking, searching
from lamella.cli.app import app, main

__all__ = [
    "app",
    "forgetting",
    "main",
    "measuring",
    "models",
    "plans",
    "repairing",
    "restoring",
    "searching",
    "talking",
    "training",
]
