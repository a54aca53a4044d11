"""Render the monitor as terminal lines. Pure: the same state and size give the same frame.

Names, reasons and events come from configuration files and servers: they are escaped, so that they
cannot control the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.actions import Overlay
from vllm_router.cli.monitor.charts import charts
from vllm_router.cli.monitor.events import events_list
from vllm_router.cli.monitor.lines import (
    detail_lines,
    figures_line,
    first_request_lines,
    keys_line,
)
from vllm_router.cli.monitor.models import models_table, outage
from vllm_router.cli.monitor.overlays import overlay
from vllm_router.cli.monitor.requests import requests_list
from vllm_router.cli.monitor.servers import servers_table, window
from vllm_router.cli.monitor.shared import shared_lines
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import heat
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import ServerView

_COMPACT_HEIGHT = 18
"""On smaller screens, servers get the lines about the selected one if there are too many."""

_REQUESTS_HEIGHT = 30
"""Lines of a screen from which the last requests are shown."""

_BESIDE_WIDTH = 140
"""Cells from which the last requests are beside the events."""

_CHARTS_ALONE, _CHARTS_LEAST, _REQUESTS_ROOM = 14, 9, 9
"""Lines: below the first, requests leave the charts all of them; else they want the third."""

_REQUESTS_BESIDE = 8
"""Requests beside the events for which the charts make room."""

_GAP = 3
_EVENTS_LEAST = 3
_EVENTS_MOST = 12
_EVENTS_HEIGHT = 26
"""On smaller screens, events get only what the servers leave."""


def draw(view: View, width: int, height: int, now: float) -> RenderableType:
    """A frame of exactly this size. `now` is Unix time."""
    inner = max(10, width - 4)
    stale = view.stale(now)
    body = overlay(view, inner, height - 2) or _body(view, inner, height - 2).lines
    for line in body:
        line.no_wrap = True
        line.overflow = "ellipsis"
        line.truncate(inner)
    style = "red" if stale else "bright_black"
    return Panel(
        Group(*body),
        box=box.ROUNDED,
        title=_title(view, now),
        title_align="left",
        subtitle=_totals(view, width - 6),
        subtitle_align="left",
        width=width,
        height=height,
        padding=(0, 1),
        border_style=style,
        style="dim" if stale and view.overlay is None else "",
    )


def _title(view: View, now: float) -> Text:
    # The panel would apply its border's colour to unstyled text.
    title = Text(style="not dim").append(" vLLM Router ", "bold default")
    stale, texts = view.stale(now), view.texts
    if view.hello is not None and not stale:
        name = visible(view.hello.name)
        title.append(texts("version_on", version=view.hello.version, name=name) + " ", "default")
    title.append(f"{visible(view.url)} ", "cyan")
    if view.snapshot is None:
        state, style = texts("connecting"), "yellow"
    elif stale:
        key = "no_data" if view.connected else "no_data_retry"
        state, style = texts(key, span=words.span(now - view.heard, texts)), "bold red"
    elif view.snapshot.router.draining:
        state, style = texts("stopping"), "bold yellow"
    else:
        state, style = texts("live"), "green"
    return title.append(state + " ", style)


def _totals(view: View, width: int) -> Text:
    """Servers and load; and as many of the other figures as fit between them."""
    fleet, texts = view.fleet, view.texts
    if fleet is None:
        return Text("")
    text = Text(style="not dim")
    text.append(
        f" {texts('up_of', up=fleet.available, all=fleet.servers)} ",
        "bold green" if fleet.available == fleet.servers else "bold red",
    )
    load = Text().append("· ", "bright_black").append(f"{texts('load')} ", "default")
    load.append(words.percent(fleet.load), f"bold {heat(fleet.load)}")
    load.append(texts("load_of"), "default").append(f"{fleet.capacity} ", "bold default")
    for figure, name, style in (
        (fleet.running, "running", "bold default"),
        (fleet.waiting, "waiting", "bold default"),
        (fleet.queued or None, "queued", "bold yellow"),
        (fleet.leases, "in_flight", "bold default"),
    ):
        if figure is not None:
            part = Text().append("· ", "bright_black").append(f"{figure:.0f} ", style)
            part.append(f"{texts(name)} ", "default")
            if text.cell_len + part.cell_len + load.cell_len <= width:
                text.append_text(part)
    return text.append_text(load)


# -- the inside -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Body:
    """The lines inside the frame, and the servers whose rows begin at the line `first`."""

    lines: list[Text]
    first: int
    servers: list[ServerView]


def server_at(view: View, width: int, height: int, row: int) -> str | None:
    """The server in a line of the screen, counted from 0; None if it shows something else."""
    if view.overlay is not None:
        return None
    body = _body(view, max(10, width - 4), height - 2)
    at = row - 1 - body.first
    return body.servers[at].name if 0 <= at < len(body.servers) else None


def wants_requests(view: View, height: int) -> bool:
    """Whether a screen of this height shows the last requests."""
    return view.overlay is Overlay.REQUESTS or (view.overlay is None and height >= _REQUESTS_HEIGHT)


def _body(view: View, width: int, height: int) -> _Body:
    servers = view.servers()
    compact = height < _COMPACT_HEIGHT and len(servers) > height - 8
    head = [figures_line(view, width), *outage(view), *shared_lines(view)]
    foot = [keys_line(view, width)]
    if not compact:
        head.append(Text())
        foot = [Text(), *detail_lines(view), *foot]
    models = models_table(view, width, height)
    happened = max(min(len(view.events), _EVENTS_MOST), _beside(view, width, height))
    wanted = len(models) + len(servers) + 1 + len(foot) + happened + 2
    hint = first_request_lines(view, height)
    spare = height - len(head) - wanted - len(hint)
    if wants_requests(view, height + 2) and view.requests and width < _BESIDE_WIDTH:
        spare = spare if spare < _CHARTS_ALONE else max(_CHARTS_LEAST, spare - _REQUESTS_ROOM)
    head += charts(view, width, spare)
    head += models
    events_least = min(_EVENTS_LEAST, len(view.events)) if height >= _EVENTS_HEIGHT else 0
    # One line each for the column titles, the line above the events, and their title.
    room = height - len(head) - len(foot) - 1 - (events_least + 2 if events_least else 0)
    first, last = window(view, servers, max(1, room))
    table = servers_table(view, servers[first:last], _heading(view, servers, first, last), width)
    left = height - len(head) - len(table) - len(foot) - 2
    hint = first_request_lines(view, left + 2 - events_least)
    below = _below(view, width, left - len(hint), height) + hint
    filler = height - len(head) - len(table) - len(below) - len(foot)
    lines = [*head, *table, *below, *[Text()] * max(0, filler), *foot]
    return _Body(lines, len(head) + 1, servers[first:last])


def _heading(view: View, servers: list[ServerView], first: int, last: int) -> str:
    if view.filter:
        return view.texts("with_filter", n=len(servers), text=visible(view.filter))
    if last - first < len(servers):
        return view.texts("some_of", first=first + 1, last=last, all=len(servers))
    return view.texts("SERVER")


def _beside(view: View, width: int, height: int) -> int:
    """The lines of requests that a wide screen wants beside its events."""
    if width < _BESIDE_WIDTH or not wants_requests(view, height + 2):
        return 0
    return min(len(view.requests), _REQUESTS_BESIDE)


def _below(view: View, width: int, room: int, height: int) -> list[Text]:
    """Events, and the last requests beside or below them, in `room` lines and two more."""
    if not wants_requests(view, height + 2):
        return events_list(view, room)
    if width < _BESIDE_WIDTH:
        events = events_list(view, room)
        return events + requests_list(view, width, room - len(events))
    half = (width - _GAP) // 2
    left, right = events_list(view, room), requests_list(view, width - half - _GAP, room)
    if not left or not right:
        return left or right
    lines = []
    for one, other in zip_longest(left, right):
        line = (one or Text()).copy()
        line.truncate(half, overflow="ellipsis", pad=True)
        lines.append(line.append(" " * _GAP).append_text(other or Text()))
    return lines
