"""Formatting of figures for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_router.cli.monitor.texts import ENGLISH, Texts

_BLOCKS = " ▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MARK = "┃"
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


def span(value: float, texts: Texts = ENGLISH) -> str:
    """A duration in its largest units."""
    whole = max(0, int(value))
    if whole < 60:
        return texts("span_s", n=whole)
    if whole < 3600:
        return texts("span_min", n=whole // 60)
    if whole < 86400:
        return texts("span_h", n=whole // 3600, m=whole % 3600 // 60)
    return texts("span_d", n=whole // 86400, h=whole % 86400 // 3600)


def bar(share: float, width: int) -> str:
    """A bar of `width` characters, exact to an eighth of one; not empty for a load above zero.

    Beyond 1 the bar is full, and a mark in it is where 1 would be.
    """
    if not width:
        return ""
    if share > 1:
        mark = min(int(width / share), width - 1)
        return "█" * mark + _MARK + "█" * (width - mark - 1)
    eighths = round(max(share, 0.0) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def columns(values: Iterable[float | None], width: int) -> list[float | None]:
    """At most `width` values: the maximum of each interval, oldest first; None without a value."""
    known = list(values)
    step = max(1, -(-len(known) // width)) if width else 1
    # Group from the right, so that groups stay the same as values arrive.
    ends = range(len(known), 0, -step)
    stretches = [known[max(0, end - step) : end] for end in ends][:width]
    return [_greatest(stretch) for stretch in reversed(stretches)]


def _greatest(stretch: Sequence[float | None]) -> float | None:
    return max((max(value, 0.0) for value in stretch if value is not None), default=None)


def sparkline(values: Iterable[float | None], width: int, ceiling: float = 1.0) -> str:
    """The newest values at the right edge; each character shows the maximum of its interval."""
    return blocks(columns(values, width), width, 1, ceiling, least=1)[0]


def blocks(
    values: Sequence[float | None], width: int, rows: int, ceiling: float, *, least: int = 0
) -> list[str]:
    """Columns of `rows` lines, the top first, exact to an eighth of a line.

    The newest value is at the right edge. A value above zero is at least one eighth high, and any
    value `least` eighths.
    """
    heights = [_eighths(value, rows, ceiling, least) for value in values]
    return [
        "".join(_BLOCKS[min(max(height - 8 * below, 0), 8)] for height in heights).rjust(width)
        for below in range(rows - 1, -1, -1)
    ]


def _eighths(value: float | None, rows: int, ceiling: float, least: int) -> int:
    if value is None:
        return 0
    share = min(value / ceiling, 1.0) if ceiling > 0 else 0.0
    return max(round(share * rows * 8), 1 if value > 0 else least)
