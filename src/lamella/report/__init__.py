"""What people read: the report page, the depth page and the model card, all made from evidence alone."""

from __future__ import annotations

from lamella.report.compression import render
from lamella.report.depth import render_depth
from lamella.report.forgetting import render_forgetting
from lamella.report.healing import render_healing
from lamella.report.page import check_installed
from lamella.report.repairing import render_repair
from lamella.report.restoration import render_restoration
from lamella.report.trace import render_trace

__all__ = [
    "check_installed",
    "render",
    "render_depth",
    "render_forgetting",
    "render_healing",
    "render_repair",
    "render_restoration",
    "render_trace",
]
