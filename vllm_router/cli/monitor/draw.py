"""Render the monitor as terminal lines. Pure: the same state and size give the same frame.

Names, reasons and events come from configuration files and servers: they are escaped, so that they
cannot control the terminal.
"""

from __future__ import annotations

import json

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.charts import charts
from vllm_router.cli.monitor.events import events_list
from vllm_router.cli.monitor.models import models_table, outage
from vllm_router.cli.monitor.overlays import overlay
from vllm_router.cli.monitor.servers import models_of, servers_table, window
from vllm_router.cli.monitor.shared import shared_lines
from vllm_router.cli.monitor.state import SORTS, View
from vllm_router.cli.monitor.styles import STATE_STYLES, heat
from vllm_router.observability.formatting import visible

_EVENTS_LEAST = 3
_EVENTS_MOST = 12
_EVENTS_HEIGHT = 26
"""On smaller screens, events get only what the servers leave."""


def draw(view: View, width: int, height: int, now: float) -> RenderableType:
    """A frame of exactly this size. `now` is Unix time."""
    inner = max(10, width - 4)
    stale = view.stale(now)
    body = overlay(view, inner, height - 2) or _body(view, inner, height - 2)
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


def _body(view: View, width: int, height: int) -> list[Text]:
    head = [_figures(view, width), *outage(view), *shared_lines(view), Text()]
    servers = view.servers()
    foot = [Text(), *_detail(view), _keys(view, width)]
    models = models_table(view, width, height)
    wanted = len(models) + len(servers) + 1 + len(foot) + min(len(view.events), _EVENTS_MOST) + 2
    hint = _first_request(view, height)
    head += charts(view, width, height - len(head) - wanted - len(hint))
    head += models
    events_least = min(_EVENTS_LEAST, len(view.events)) if height >= _EVENTS_HEIGHT else 0
    # One line each for the column titles, the line above the events, and their title.
    room = height - len(head) - len(foot) - 1 - (events_least + 2 if events_least else 0)
    first, last = window(view, servers, max(1, room))
    heading = f"{first + 1}-{last} of {len(servers)}" if last - first < len(servers) else "SERVER"
    if view.filter:
        heading = f"{len(servers)} with {visible(view.filter)}"
    table = servers_table(view, servers[first:last], heading, width)
    left = height - len(head) - len(table) - len(foot) - 2
    hint = _first_request(view, left + 2 - events_least)
    events = events_list(view, left - len(hint)) + hint
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
        (str(router.open_streams), "in flight", ""),
    ):
        text.append(figure, f"bold {style}".strip()).append(f" {name}  ")
    room = min(60, width - text.cell_len - 6)
    if room >= 8:
        text.append("load ", "bright_black")
        text.append(words.sparkline(view.trend.values("load", hour=view.hour), room), "cyan")
    return text


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
    second.append(models_of(server))
    return [first, second]


def _keys(view: View, width: int) -> Text:
    """The question or message, else the filter, else the keys that fit."""
    if view.question is not None:
        return Text(style="bold").append(visible(view.question.text) + " ").append("y/n", "reverse")
    if view.message:
        return Text(visible(view.message), style="bold yellow")
    if view.typing or view.filter:
        text = Text("filter: ", style="bold").append(visible(view.filter))
        if view.typing:
            return text.append("▏").append("  enter keeps it, escape ends it", "bright_black")
        return text.append("  escape ends it", "bright_black")
    reload = view.snapshot.router.reload if view.snapshot is not None else None
    text = Text()
    for key, does in (
        ("q", "stop" if view.attached else "quit"),
        ("?", "help"),
        ("s", f"sort: {SORTS[view.sort][0]}"),
        ("/", "filter"),
        ("d", "drain"),
        ("u", "undrain"),
        ("e", "explain"),
        ("m", "models"),
        ("r", "5 min" if view.hour else "60 min"),
        ("enter", "details"),
    ):
        if text.cell_len + len(key) + len(does) + 4 <= width:
            text.append(f" {key} ", "reverse").append(f" {does} ")
    if reload is not None and reload.error:
        first = reload.error.splitlines()[0]
        text = Text("configuration refused: ", style="bold red").append(visible(first), "red")
    return text
