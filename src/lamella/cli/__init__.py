"""The command line."""

from lamella.cli.app import main

__all__ = ["main"]
