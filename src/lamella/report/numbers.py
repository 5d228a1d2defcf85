"""Numbers as people read them: few digits, a unit, and a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"  # noqa: RUF001
MINUS = "−"  # noqa: RUF001


def number(value: float | None) -> str:
    """Three significant digits; thousands in groups."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-5:
        text = f"{value:.1e}"
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{_decimals(size)}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def _decimals(size: float) -> int:
    if size == 0:
        return 0
    return max(0, 2 - math.floor(math.log10(size))) if size >= 1e-3 else 5


def ratio(value: float | None) -> str:
    """A factor, such as ``1.32×``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}×"  # noqa: RUF001


def spread(value: Mapping[str, Any] | None) -> str:
    """The quartiles of a measured ratio, such as ``1.30 to 1.34``."""
    return MISSING if value is None else f"{value['low']:.2f} to {value['high']:.2f}"


def estimate(value: Mapping[str, Any] | None) -> str:
    """A mean with its standard error, where it has one, at the precision of the mean."""
    if value is None or value.get("mean") is None:
        return MISSING
    mean, error = value["mean"], value.get("error")
    text = number(mean)
    if error is None or not math.isfinite(error):
        return text
    decimals = len(text.partition(".")[2]) if "e" not in text else None
    rounded = number(error) if decimals is None or error < 0.5 * 10**-decimals else f"{error:.{decimals}f}"
    return f"{text} ± {rounded}"


def percent(value: float | None) -> str:
    """A share, such as ``81.4 %``."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def change(before: float | None, after: float | None) -> str:
    """The change from one amount to another, such as ``−17.2 %``."""
    if before is None or after is None or not before:
        return MISSING
    share = 100 * (after / before - 1)
    if abs(share) < 0.05:
        return "same"
    return f"{MINUS if share < 0 else '+'}{abs(share):.1f} %"


def count(value: float | None) -> str:
    """An amount with a decimal prefix, such as ``134.5 M``."""
    return _prefixed(value, "", (("G", 1e9), ("M", 1e6), ("k", 1e3)))


def size(value: float | None) -> str:
    """Bytes with a decimal prefix, such as ``538.1 MB``."""
    return _prefixed(value, "B", (("G", 1e9), ("M", 1e6), ("k", 1e3)))


def _prefixed(value: float | None, unit: str, prefixes: tuple[tuple[str, float], ...]) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    for prefix, scale in prefixes:
        if abs(value) >= scale:
            return f"{value / scale:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def duration(value: float | None) -> str:
    """Seconds, such as ``12.3 ms`` or ``80 s``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 1:
        return f"{number(1000 * value)} ms"
    return f"{number(value)} s" if value < 600 else f"{value / 60:.0f} min"
