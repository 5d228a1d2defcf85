"""Visual tokens of masked-diffusion models: whether, where and when they can be left out (arXiv 2511.15098)."""

from __future__ import annotations

from lamella.registry import method
from lamella.results import Study
from lamella.stack import Model


@method("dmllm-token-redundancy", paper="2511.15098", purpose="skip", on="masked tokens")
def dmllm_token_redundancy(model: Model) -> Study:
    """Study when image tokens can be left out."""
    return Study(findings={})
