"""Formatting of figures for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
NONE = "-"


def rate(value: float | None) -> str:
    """A rate per second with significant digits only."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if value < 1:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def span(value: float) -> str:
    """A duration in its largest units."""
    whole = max(0, int(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def bar(share: float, width: int) -> str:
    """A bar of `width` characters, exact to an eighth of one; not empty for a load above zero."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def sparkline(values: Iterable[float | None], width: int, ceiling: float = 1.0) -> str:
    """The newest values at the right edge; each character shows the maximum of its interval."""
    known = list(values)
    step = max(1, -(-len(known) // width)) if width else 1
    # Group from the right, so that groups stay the same as values arrive.
    ends = range(len(known), 0, -step)
    stretches = [known[max(0, end - step) : end] for end in ends][:width]
    chars = [_block(stretch, ceiling) for stretch in reversed(stretches)]
    return "".join(chars).rjust(width)


def _block(stretch: Sequence[float | None], ceiling: float) -> str:
    known = [value for value in stretch if value is not None]
    if not known:
        return " "
    share = min(max(*known, 0.0) / ceiling, 1.0)
    return _BLOCKS[max(1, round(share * 8))]
