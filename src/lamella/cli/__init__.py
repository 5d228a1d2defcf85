"""The command line: one module of commands per kind of work, in the order in which ``--help`` shows them."""

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
