"""The ``serve`` command: an OpenAI-compatible server, by transformers' own serving code with batches of Lamella's."""

from lamella.cli.serving.command import serve

__all__ = ["serve"]
