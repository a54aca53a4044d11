"""The monitor's charts: requests, tokens, first token and running requests over time. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import right

LEAST_ROWS, MOST_ROWS = 3, 12
"""Lines of a chart without its title."""

LEAST_WIDTH = 36
"""Cells of a chart; fewer charts are drawn where more do not fit."""

GAP = 3


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    """A key of the texts."""
    figure: str
    shown: Callable[[float | None], str]
    style: str


_CHARTS = (
    _Chart("chart_requests", "requests_per_s", words.rate, "green"),
    _Chart("chart_tokens", "tokens_per_s", words.rate, "magenta"),
    _Chart("chart_ttft", "ttft_p95", words.seconds, "yellow"),
    _Chart("chart_running", "running", words.rate, "cyan"),
)


def charts(view: View, width: int, room: int) -> list[Text]:
    """As many charts as fit side by side into `room` lines, an empty line below; or none."""
    rows = min(MOST_ROWS, room - 2)
    if rows < LEAST_ROWS or view.snapshot is None:
        return []
    number = max(1, min(len(_CHARTS), (width + GAP) // (LEAST_WIDTH + GAP)))
    cells = (width - GAP * (number - 1)) // number
    lines = [Text() for _ in range(rows + 1)]
    for position, chart in enumerate(_CHARTS[:number]):
        for line, part in zip(lines, _draw(view, chart, cells, rows), strict=True):
            line.append(" " * GAP if position else "").append_text(part)
    return [*lines, Text()]


def _draw(view: View, chart: _Chart, width: int, rows: int) -> list[Text]:
    values = view.trend.values(chart.figure, hour=view.hour)
    columns = words.columns(values, width)
    top = max((value for value in columns if value is not None), default=0.0)
    now = chart.shown(values[-1] if values else None)
    texts = view.texts
    title = Text(f"{texts(chart.title)} ", "bright_black").append(now, "bold")
    room = max(0, width - title.cell_len)
    most = "  " + texts("chart_max", value=chart.shown(top))
    span = texts("chart_hour" if view.hour else "chart_minutes")
    note = next((text for text in (most + span, most) if cell_len(text) <= room), "")
    title.append(right(note, room), "bright_black")
    lines = words.blocks(columns, width, rows, top)
    above = [" " * width, *lines]
    return [title, *(_shaded(*both, chart.style) for both in zip(lines, above, strict=False))]


def _shaded(line: str, above: str, style: str) -> Text:
    """A line of a chart: bright where it is the top, dim below."""
    text = Text()
    for dim, run in groupby(zip(line, above, strict=True), lambda both: both[1] != " "):
        text.append("".join(cell for cell, _ in run), f"dim {style}" if dim else style)
    return text
