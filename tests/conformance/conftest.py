"""Fixtures for all suites."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """What trains switches them on itself."""
    with torch.no_grad():
        yield
