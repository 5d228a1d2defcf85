"""What reproductions share: one command line, a record with a journal of finished arms, nano models, padded batches."""

from harness.run import Run, main

__all__ = ["Run", "main"]
