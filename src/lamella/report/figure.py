"""Figures of a page: a drawing with its caption."""

from __future__ import annotations

from html import escape


def figure(drawing: str, caption: str = "") -> str:
    """A figure as HTML; nothing where there is nothing to draw.

    Args:
        drawing: HTML, such as an SVG.
        caption: plain text, which is escaped here.
    """
    if not drawing:
        return ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{drawing}{below}</figure>"
