"""What people read: the report page, the depth page and the model card, all made from evidence alone."""

from __future__ import annotations

from lamella.report.compression import render
from lamella.report.trace import render_trace

__all__ = [
    "render",
    "render_trace",
]
