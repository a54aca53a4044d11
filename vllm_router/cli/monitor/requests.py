"""The monitor's table of the last requests. Pure."""

from __future__ import annotations

import time
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import cut, right
from vllm_router.observability.formatting import visible

LEAST_LINES = 2
"""Requests below which the list is not worth its title."""

_CLOCK, _TRIES, _TIME = 8, 5, 7
_WIDE = 100
"""Cells from which the number of attempts and the first byte are shown."""


def requests_list(view: View, width: int, room: int) -> list[Text]:
    """The last requests in `room` lines below a title and an empty line; nothing without room."""
    if room < LEAST_LINES or not view.requests:
        return []
    return [Text(), *requests_table(view, width, room)]


def requests_table(view: View, width: int, most: int) -> list[Text]:
    """A title, and at most so many requests, newest first."""
    texts, wide = view.texts, width >= _WIDE
    left = width - _CLOCK - _TIME - 5 - (_TRIES + _TIME + 2 if wide else 0)
    rows = view.requests[:most]
    results = [_result(view, row) for row in rows]
    servers = [visible(str(row.get("server") or "-")) for row in rows]
    # The names of servers and results get what they need, within bounds; models get the rest.
    result = _longest(results, min(34, max(12, left // 3)))
    server = _longest(servers, min(32, (left - result) // 2))
    model = max(1, min(60, left - result - server))
    title = Text(style="bright_black")
    title.append(cut(texts("LAST_REQUESTS"), _CLOCK + 1 + model) + " ")
    title.append(cut(texts("SERVER"), server) + " " + cut(texts("RESULT"), result))
    if wide:
        title.append(" " + right(texts("TRIES"), _TRIES) + " " + right(texts("FIRST"), _TIME))
    title.append(" " + right(texts("DURATION"), _TIME + 1))
    lines = [title]
    for row, name, ended in zip(rows, servers, results, strict=True):
        line = Text().append(_clock(row) + " ", "bright_black")
        line.append(cut(_model(row), model) + " " + cut(name, server) + " ")
        line.append(cut(ended, result), "red" if row.get("failed") else "green")
        if wide:
            line.append(" " + right(str(row.get("attempts", "")), _TRIES))
            line.append(" " + right(words.seconds(_number(row.get("first_byte_seconds"))), _TIME))
        line.append(" " + right(words.seconds(_number(row.get("duration_seconds"))), _TIME + 1))
        lines.append(line)
    return lines


def _longest(texts: list[str], most: int) -> int:
    """The cells of the longest text, and of a title, up to `most`."""
    return min(most, max([8, *map(cell_len, texts)]))


def _clock(row: dict[str, Any]) -> str:
    """The time of its end, by which requests are sorted."""
    moment = (_number(row.get("time")) or 0.0) + (_number(row.get("duration_seconds")) or 0.0)
    return time.strftime("%H:%M:%S", time.localtime(moment))


def _model(row: dict[str, Any]) -> str:
    asked, served = row.get("model"), row.get("served_model")
    return visible(str(asked or "-") + (f" → {served}" if served and served != asked else ""))


def _result(view: View, row: dict[str, Any]) -> str:
    code = str(row.get("code") or row.get("outcome") or "")
    return visible(f"{row.get('status') or '-'} {view.texts.word('outcome', code)}")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
