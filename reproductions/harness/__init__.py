"""Shared code of the reproductions: command line, record with a journal of arms, nano models, padded batches."""

from harness.run import Run, main

__all__ = ["Run", "main"]
