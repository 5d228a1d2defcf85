"""Formatting of numbers for people: few digits, a unit, and a dash for missing values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"  # noqa: RUF001
MINUS = "−"  # noqa: RUF001


def number(value: float | None) -> str:
    """Format a number with three significant digits and grouped thousands."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-5:
        text = f"{value:.1e}"
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{_decimals(size)}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text.removeprefix("-")


def _decimals(size: float) -> int:
    if size == 0:
        return 0
    return max(0, 2 - math.floor(math.log10(size))) if size >= 1e-3 else 5


def ratio(value: float | None) -> str:
    """Format a factor, such as ``1.32×``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}×".replace("-", MINUS)  # noqa: RUF001


def spread(value: Mapping[str, Any] | None) -> str:
    """Format the quartiles of a measured ratio, such as ``1.30 to 1.34``."""
    return MISSING if value is None else f"{value['low']:.2f} to {value['high']:.2f}"


def estimate(value: Mapping[str, Any] | None) -> str:
    """Format a mean with its standard error, if it has one, at the precision of the mean."""
    if value is None or value.get("mean") is None:
        return MISSING
    mean, error = value["mean"], value.get("error")
    text = number(mean)
    if error is None or not math.isfinite(error):
        return text
    decimals = len(text.partition(".")[2]) if "e" not in text else None
    rounded = number(error) if decimals is None or error < 0.5 * 10**-decimals else f"{error:.{decimals}f}"
    return f"{text} ± {rounded}"


def percent(value: float | None, decimals: int = 1) -> str:
    """Format a fraction in percent, such as ``81.4 %``.

    Args:
        value: the fraction, such as 0.814; None if it is unknown.
        decimals: number of decimal places.
    """
    return MISSING if value is None or not math.isfinite(value) else f"{_fixed(100 * value, decimals)} %"


def points(value: float) -> str:
    """Format a difference of two fractions in percentage points, such as ``1 point`` or ``2.5 points``."""
    text = _fixed(100 * value, 1).removesuffix(".0")
    return f"{text} {'point' if text.removeprefix(MINUS) == '1' else 'points'}"


def signed(value: float, decimals: int = 2) -> str:
    """Format a difference with its sign, such as ``+0.25``.

    Args:
        value: the difference.
        decimals: number of decimal places.
    """
    text = _fixed(value, decimals)
    return text if text.startswith(MINUS) else f"+{text}"


def _fixed(value: float, decimals: int) -> str:
    """Format with a fixed number of decimals, with a minus sign, and without one for zero."""
    text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS, 1) if float(text) < 0 else text.removeprefix("-")


def share(part: float, whole: float) -> float:
    """Return a part as a fraction of a whole; 0 if the whole is 0.

    Args:
        part: the part.
        whole: the whole, in the same unit.
    """
    return part / whole if whole else 0.0


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a number of things, such as ``1 plan`` or ``1,024 plans``.

    Args:
        count: the number of things.
        noun: their name in the singular.
        plural: their name in the plural; if empty, the noun with an s.
    """
    text = noun if count == 1 else plural or f"{noun}s"
    return f"{count:,} {text}".replace("-", MINUS, 1)


def listed(names: Sequence[Any], nothing: str = "nothing", most: int = 8) -> str:
    """Format names in a sentence, such as ``a, b and c``; of a long list the first, and the number of the rest.

    Args:
        names: the names, or other values to show as text.
        nothing: text for an empty list.
        most: maximum number of names to show.
    """
    if not names:
        return nothing
    shown, more = list(map(str, names[:most])), len(names) - most
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Format things by their indices, such as ``layer 3``, ``layers 3 and 5`` or ``no layer``.

    Args:
        noun: name of the things in the singular.
        numbers: their indices.
    """
    return f"{noun if len(numbers) == 1 else f'{noun}s'} {listed(numbers, most=32)}" if numbers else f"no {noun}"


def span(noun: str, start: int, stop: int) -> str:
    """Format a range, such as ``layer 3`` or ``layers 3 to 5``; ``stop`` is exclusive.

    Args:
        noun: name of the things in the singular.
        start: first index.
        stop: index after the last one.
    """
    return f"{noun} {start}" if stop - start == 1 else f"{noun}s {start} to {stop - 1}"


def change(before: float | None, after: float | None) -> str:
    """Format a relative change, such as ``−17.2 %``; ``same`` below 0.05 %.

    Args:
        before: the value before the change.
        after: the value after it.
    """
    if before is None or after is None or not before:
        return MISSING
    share = 100 * (after / before - 1)
    if abs(share) < 0.05:
        return "same"
    return f"{MINUS if share < 0 else '+'}{abs(share):.1f} %"


def count(value: float | None) -> str:
    """Format an amount with a decimal prefix, such as ``134.5 M``."""
    return _prefixed(value, "", (("G", 1e9), ("M", 1e6), ("k", 1e3)))


def size(value: float | None) -> str:
    """Format bytes with a decimal prefix, such as ``538.1 MB``."""
    return _prefixed(value, "B", (("G", 1e9), ("M", 1e6), ("k", 1e3)))


def _prefixed(value: float | None, unit: str, prefixes: tuple[tuple[str, float], ...]) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    for prefix, scale in prefixes:
        if abs(value) >= scale:
            return f"{value / scale:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def duration(value: float | None) -> str:
    """Format seconds, such as ``12.3 ms`` or ``80 s``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 1:
        return f"{number(1000 * value)} ms"
    return f"{number(value)} s" if value < 600 else f"{value / 60:.0f} min"
