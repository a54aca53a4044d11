"""The monitor's table of servers. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.order import SORTS
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import PUT_OUT, STATE_STYLES, cut, heat, right
from vllm_router.cli.monitor.texts import Texts, reason_of
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import ServerView

_MODELS_WIDTH = 160
"""Cells from which models are listed unless key `m` hides them."""

_STATE_WIDTH = 9

_SICK = ("down", "ejected", "silent", "refusing", "unknown", *PUT_OUT)


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    """A key of the texts."""
    width: int
    value: Callable[[ServerView], str]


def _in_flight(server: ServerView) -> str:
    """The requests of this router, and of the other ones if they have any."""
    return f"{server.leases}+{server.elsewhere}" if server.elsewhere else str(server.leases)


def _columns(width: int) -> list[_Column]:
    """The figures that fit beside name, state and load."""
    columns = [
        (0, _Column("RUN", 4, lambda server: f"{server.running:.0f}")),
        (0, _Column("WAIT", 4, lambda server: f"{server.waiting:.0f}")),
        (70, _Column("IN_FLT", 6, _in_flight)),
        (62, _Column("CAP", 4, lambda server: str(server.capacity))),
        (96, _Column("TTFT95", 7, lambda s: words.seconds(s.ttft.p95 if s.ttft else None))),
        (104, _Column("REQ_S", 6, lambda server: words.rate(server.requests_per_s))),
        (112, _Column("TOK_S", 6, lambda server: words.rate(server.tokens_per_s))),
        (120, _Column("ERR_S", 6, lambda server: words.rate(server.errors_per_s))),
        (
            128,
            _Column(
                "KV", 5, lambda s: words.percent(s.kv_usage) if s.kv_usage is not None else "-"
            ),
        ),
    ]
    return [column for least, column in columns if width >= least]


def _widths(width: int, columns: list[_Column], *, models: bool) -> tuple[int, int, int, int]:
    """The widths of name, bar, sparkline and models."""
    left = width - 2 - (_STATE_WIDTH + 1) - 7 - sum(column.width + 1 for column in columns)
    names = min(32, max(14, left * 2 // 5))
    left -= names + 1
    listed = 0
    if models:
        listed = min(40, max(12, left // 2))
        left -= listed + 1
    if left < 18:
        return names, max(4, left), 0, listed
    bar = min(24, left // 2)
    return names, bar, min(40, left - bar - 1), listed


def servers_table(view: View, shown: list[ServerView], heading: str, width: int) -> list[Text]:
    texts, columns = view.texts, _columns(width)
    names, bar, spark, listed = _widths(
        width, columns, models=view.models is not (width >= _MODELS_WIDTH)
    )
    title = Text(style="bright_black")
    title.append("  " + cut(heading, names) + " " + cut(texts("STATE"), _STATE_WIDTH) + " ")
    title.append(" ".join(right(texts(column.title), column.width) for column in columns) + " ")
    title.append(cut(_sorted(view), bar + 6))
    if spark:
        title.append(" " + cut(texts("LAST_5_MIN"), spark))
    if listed:
        title.append(" " + cut(texts("MODELS"), listed))
    lines = [title]
    for server in shown:
        line = Text()
        selected = server.name == view.selected
        line.append("▸ " if selected else "  ", "bold cyan")
        style = "red" if server.state in ("down", "ejected") else ""
        name = cut(visible(server.name), names)
        line.append(name.rstrip(), f"{style} bold" if selected else style)
        line.append(" " * (len(name) - len(name.rstrip())))
        state = texts("leaving") if server.leaving else texts.word("state", server.state)
        line.append(" " + cut(state, _STATE_WIDTH) + " ", STATE_STYLES.get(server.state, ""))
        if server.state in _SICK and server.reason:
            reason = visible(reason_of(texts, server))
            line.append(reason, "red" if server.state not in PUT_OUT else "")
            lines.append(line)
            continue
        for column in columns:
            line.append(column.value(server).rjust(column.width) + " ")
        colour = heat(server.load)
        line.append(words.bar(server.load, bar), colour)
        line.append(words.percent(server.load).rjust(6), f"bold {colour}")
        if spark:
            line.append(" " + words.sparkline(view.loads.get(server.name, ()), spark), "cyan")
        if listed:
            line.append(" ")
            line.append(cut(models_of(server, texts), listed), "cyan")
        lines.append(line)
    return lines


def _sorted(view: View) -> str:
    if view.sort == 0:
        return view.texts("LOAD")
    return view.texts("sorted_by", name=view.texts(SORTS[view.sort][0]))


def window(view: View, servers: list[ServerView], room: int) -> tuple[int, int]:
    """The range of visible rows, which includes the selected one."""
    if len(servers) <= room:
        return 0, len(servers)
    at = next((n for n, server in enumerate(servers) if server.name == view.selected), 0)
    first = min(max(0, at - room // 2), len(servers) - room)
    return first, first + room


def models_of(server: ServerView, texts: Texts) -> str:
    if server.models is None:
        return texts("models_unknown")
    return visible(", ".join(server.models))
