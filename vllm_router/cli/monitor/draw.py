"""Render the monitor as terminal lines. Pure: the same state and size give the same frame.

Names, reasons and events come from configuration files and servers: they are escaped, so that they
cannot control the terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.models import models_table, outage
from vllm_router.cli.monitor.state import SORTS, View
from vllm_router.cli.monitor.styles import STATE_STYLES, cut, heat
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import Event, ServerView

_PUT_OUT = ("asleep", "paused")
_SICK = ("down", "ejected", "silent", "refusing", "unknown", *_PUT_OUT)
_EVENTS_LEAST = 3
_EVENTS_MOST = 12
_EVENTS_HEIGHT = 20
"""On smaller screens, events get only what the servers leave."""

KEYS = (
    ("↑ ↓", "select a server (also j, k, page up and down, home, end)"),
    ("s, S", "sort by the next figure, the one before"),
    ("d", "drain the selected server: nothing new, what runs may finish"),
    ("u", "undrain it"),
    ("m", "models of each server"),
    ("q", "quit"),
    ("Ctrl-C", "quit at once"),
    ("?", "this help"),
)


def draw(view: View, width: int, height: int, now: float) -> RenderableType:
    """A frame of exactly this size. `now` is Unix time."""
    inner = max(10, width - 4)
    stale = view.stale(now)
    body = _help_lines() if view.help else _body(view, inner, height - 2, now)
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
        subtitle=_totals(view),
        subtitle_align="left",
        width=width,
        height=height,
        padding=(0, 1),
        border_style=style,
        style="dim" if stale and not view.help else "",
    )


def _title(view: View, now: float) -> Text:
    # The panel would apply its border's colour to unstyled text.
    title = Text(style="not dim").append(" vLLM Router ", "bold default")
    stale = view.stale(now)
    if view.hello is not None and not stale:
        title.append(f"{view.hello.version} on {visible(view.hello.name)} ", "default")
    title.append(f"{visible(view.url)} ", "cyan")
    if view.snapshot is None:
        title.append("connecting ", "yellow")
    elif stale:
        again = "" if view.connected else ", trying again"
        title.append(f"no data for {words.span(now - view.heard)}{again} ", "bold red")
    elif view.snapshot.router.draining:
        title.append("stopping ", "bold yellow")
    else:
        title.append("live ", "green")
    return title


def _totals(view: View) -> Text:
    fleet = view.fleet
    if fleet is None:
        return Text("")
    text = Text(style="not dim")
    text.append(
        f" {fleet.available}/{fleet.servers} up ",
        "bold green" if fleet.available == fleet.servers else "bold red",
    )
    for figure, name in (
        (fleet.running, "running"),
        (fleet.waiting, "waiting"),
        (fleet.leases, "in flight"),
    ):
        text.append("· ", "bright_black").append(f"{figure:.0f} ", "bold default")
        text.append(f"{name} ", "default")
    if fleet.queued:
        text.append("· ", "bright_black").append(f"{fleet.queued} ", "bold yellow")
        text.append("queued ", "default")
    text.append("· ", "bright_black").append("load ", "default")
    text.append(words.percent(fleet.load), f"bold {heat(fleet.load)}")
    return text.append(" of ", "default").append(f"{fleet.capacity} ", "bold default")


# -- the inside -------------------------------------------------------------------------------


def _body(view: View, width: int, height: int, now: float) -> list[Text]:
    head = [_figures(view, width), *outage(view), Text()]
    servers = view.servers()
    foot = [Text(), *_detail(view), _keys(view)]
    head += models_table(view, width, height)
    events_least = min(_EVENTS_LEAST, len(view.events)) if height >= _EVENTS_HEIGHT else 0
    # One line each for the column titles, the line above the events, and their title.
    room = height - len(head) - len(foot) - 1 - (events_least + 2 if events_least else 0)
    first, last = _window(view, servers, max(1, room))
    heading = f"{first + 1}-{last} of {len(servers)}" if last - first < len(servers) else "SERVER"
    table = _table(view, servers[first:last], heading, width)
    left = height - len(head) - len(table) - len(foot) - 2
    events = _events(view, min(left, _EVENTS_MOST) if left > 0 else 0)
    events += _first_request(view, height - len(head) - len(table) - len(events) - len(foot))
    filler = height - len(head) - len(table) - len(events) - len(foot)
    return [*head, *table, *events, *[Text()] * max(0, filler), *foot]


def _first_request(view: View, room: int) -> list[Text]:
    """What to do on a router that no client has used; empty if there is no room for it."""
    if view.snapshot is None or not view.snapshot.router.unused or room < 5:
        return []
    url = view.url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    models = [model for server in view.snapshot.servers for model in server.models or ()]
    model = json.dumps(models[0] if models else "MODEL")
    body = f'{{"model": {model}, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return [
        Text(),
        Text("No client has sent a request yet. In another terminal:", style="bold"),
        Text(visible(f"  curl {url}/v1/chat/completions \\"), style="cyan"),
        Text(visible(f"    -H 'Content-Type: application/json' -d '{body}'"), style="cyan"),
        Text(visible(f"The page: {url}"), style="bold"),
    ]


def _figures(view: View, width: int) -> Text:
    if view.snapshot is None:
        return Text(view.trouble and f"no router yet: {visible(view.trouble)}")
    if not view.connected:
        return Text(f"{visible(view.trouble)}; what is shown is old", style="bold red not dim")
    fleet, router = view.snapshot.fleet, view.snapshot.router
    text = Text()
    for figure, name, style in (
        (words.rate(fleet.requests_per_s), "req/s", ""),
        (words.rate(fleet.tokens_per_s), "tok/s", ""),
        (words.seconds(fleet.ttft.p95 if fleet.ttft else None), "TTFT p95", ""),
        (words.rate(fleet.errors_per_s), "err/s", "red" if fleet.errors_per_s else ""),
        (str(router.open_streams), "streams", ""),
    ):
        text.append(figure, f"bold {style}".strip()).append(f" {name}  ")
    room = min(60, width - text.cell_len - 1)
    if room >= 8:
        text.append(words.sparkline(view.fleet_load, room), "cyan")
    return text


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int
    value: Callable[[ServerView], str]
    right: bool = True


def _columns(width: int) -> list[_Column]:
    """The figures that fit beside name, state and load."""
    columns = [
        _Column("RUN", 4, lambda server: f"{server.running:.0f}"),
        _Column("WAIT", 4, lambda server: f"{server.waiting:.0f}"),
        _Column("IN FLT", 6, lambda server: str(server.leases)),
        _Column("CAP", 4, lambda server: str(server.capacity)),
    ]
    more = [
        (96, _Column("TTFT95", 7, lambda s: words.seconds(s.ttft.p95 if s.ttft else None))),
        (104, _Column("REQ/S", 6, lambda server: words.rate(server.requests_per_s))),
        (112, _Column("TOK/S", 6, lambda server: words.rate(server.tokens_per_s))),
        (120, _Column("ERR/S", 6, lambda server: words.rate(server.errors_per_s))),
        (
            128,
            _Column(
                "KV", 5, lambda s: words.percent(s.kv_usage) if s.kv_usage is not None else "-"
            ),
        ),
    ]
    return columns + [column for least, column in more if width >= least]


def _widths(width: int, columns: list[_Column], *, models: bool) -> tuple[int, int, int, int]:
    """The widths of name, bar, sparkline and models."""
    left = width - 2 - 10 - 7 - sum(column.width + 1 for column in columns)
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


def _table(view: View, shown: list[ServerView], heading: str, width: int) -> list[Text]:
    columns = _columns(width)
    names, bar, spark, listed = _widths(width, columns, models=view.models)
    title = Text(style="bright_black")
    title.append("  " + cut(heading, names) + " " + "STATE".ljust(9) + " ")
    title.append(" ".join(column.title.rjust(column.width) for column in columns) + " ")
    title.append(cut(f"LOAD{_sorted(view)}", bar + 6))
    if spark:
        title.append(" " + cut("LAST 5 MIN", spark))
    if listed:
        title.append(" " + cut("MODELS", listed))
    lines = [title]
    for server in shown:
        line = Text()
        selected = server.name == view.selected
        line.append("▸ " if selected else "  ", "bold cyan")
        style = "strike red" if server.state in ("down", "ejected") else ""
        name = cut(visible(server.name), names)
        line.append(name.rstrip(), f"{style} bold" if selected else style)
        line.append(" " * (len(name) - len(name.rstrip())))
        state = "leaving" if server.leaving else server.state
        line.append(" " + state[:9].ljust(9) + " ", STATE_STYLES.get(server.state, ""))
        if server.state in _SICK and server.reason:
            line.append(visible(server.reason), "red" if server.state not in _PUT_OUT else "")
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
            line.append(cut(_models(server), listed), "cyan")
        lines.append(line)
    return lines


def _sorted(view: View) -> str:
    name = SORTS[view.sort][0]
    return "" if view.sort == 0 else f" (by {name})"


def _window(view: View, servers: list[ServerView], room: int) -> tuple[int, int]:
    """The range of visible rows, which includes the selected one."""
    if len(servers) <= room:
        return 0, len(servers)
    at = next((n for n, server in enumerate(servers) if server.name == view.selected), 0)
    first = min(max(0, at - room // 2), len(servers) - room)
    return first, first + room


def _models(server: ServerView) -> str:
    if server.models is None:
        return "not known"
    return visible(", ".join(server.models))


def _detail(view: View) -> list[Text]:
    """Two lines about the selected server."""
    server = view.chosen()
    if server is None or view.snapshot is None:
        return [Text("no server is configured" if view.snapshot is not None else "")]
    first = Text().append(visible(server.name), "bold").append(f"  {visible(server.url)}  ")
    since = words.span(view.snapshot.time - server.since)
    first.append(f"{server.state} for {since}", STATE_STYLES.get(server.state, ""))
    if server.reason:
        first.append(f": {visible(server.reason)}")
    second = Text(style="bright_black")
    age = "never read" if server.metrics_age is None else f"{words.seconds(server.metrics_age)} old"
    second.append(f"metrics {age}{' (too old to count)' if server.stale else ''}, models ")
    second.append(_models(server))
    return [first, second]


def _events(view: View, room: int) -> list[Text]:
    if room <= 0 or not view.events:
        return []
    lines = [Text(), Text("EVENTS", style="bright_black")]
    for event in list(view.events)[-room:][::-1]:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        lines.append(Text().append(clock + "  ", "bright_black").append(*_event(event)))
    return lines


_EVENT_STYLES = {
    "reload": "green",
    "discovery": "green",
    "source": "yellow",
    "drained": "blue",
    "missed": "yellow",
}


def _event(event: Event) -> tuple[str, str]:
    if event.kind == "state":
        return visible(event.text), STATE_STYLES.get(event.new or "", "")
    style = _EVENT_STYLES.get(event.kind, "red")
    label = {
        "reload": "configuration: ",
        "reload_refused": "configuration refused: ",
        "discovery": "servers found: ",
    }
    return label.get(event.kind, "") + visible(event.text), style


def _keys(view: View) -> Text:
    if view.question is not None:
        return Text(style="bold").append(visible(view.question.text) + " ").append("y/n", "reverse")
    if view.message:
        return Text(visible(view.message), style="bold yellow")
    reload = view.snapshot.router.reload if view.snapshot is not None else None
    text = Text()
    for key, does in (
        ("q", "stop" if view.attached else "quit"),
        ("s", f"sort: {SORTS[view.sort][0]}"),
        ("d", "drain"),
        ("u", "undrain"),
        ("m", "models"),
        ("?", "help"),
    ):
        text.append(f" {key} ", "reverse").append(f" {does} ")
    if reload is not None and reload.error:
        first = reload.error.splitlines()[0]
        text = Text("configuration refused: ", style="bold red").append(visible(first), "red")
    return text


def _help_lines() -> list[Text]:
    lines = [Text(), Text("Keys", style="bold"), Text()]
    lines += [Text().append(key.rjust(9) + "   ", "bold cyan").append(does) for key, does in KEYS]
    lines += [
        Text(),
        Text("RUN and WAIT are requests on the engine, IN FLT is what this router has in flight,"),
        Text("CAP is the capacity."),
        Text("LOAD is (RUN + WAIT / 2) / CAP: yellow from 70 %, red from 90 %."),
        Text(),
        Text("Any key goes back.", style="bright_black"),
    ]
    return lines
