"""What the monitor shows instead of the fleet: help, one server, requests, the log. Pure."""

from __future__ import annotations

import io
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from vllm_router.cli.explain import verdict
from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.actions import Overlay
from vllm_router.cli.monitor.events import event_lines, is_about
from vllm_router.cli.monitor.requests import requests_table
from vllm_router.cli.monitor.servers import models_of
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import STATE_STYLES, cut, heat, right
from vllm_router.cli.monitor.texts import Texts, reason_of
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import Percentiles

_PLAIN = Console(file=io.StringIO())
"""Wraps texts; nothing is printed with it."""

KEYS = (
    ("↑ ↓", "help_select"),
    ("enter", "help_enter"),
    ("click", "help_click"),
    ("s, S", "help_sort"),
    ("/", "help_filter"),
    ("e", "help_explain"),
    ("r", "help_range"),
    ("t", "help_requests"),
    ("l", "help_log"),
    ("d", "help_drain"),
    ("u", "help_undrain"),
    ("R", "help_reload"),
    ("m", "help_models"),
    ("q", "help_quit"),
    ("Ctrl-C", "help_quit_now"),
    ("?", "help_help"),
)


def overlay(view: View, width: int, height: int) -> list[Text]:
    """The lines in front of the fleet, exactly `height` of them; empty if nothing is."""
    if view.overlay is None:
        return []
    lines, room = _lines(view, width, height), height - 2
    top = min(view.scroll, max(0, len(lines) - room))
    if view.overlay is Overlay.LOG:
        top = max(0, len(lines) - room) - top
    shown = lines[top : top + room]
    back = view.texts("any_key")
    if len(lines) > room:
        first, last = top + 1, top + len(shown)
        back = view.texts("any_key_scroll", first=first, last=last, all=len(lines))
    return [*shown, *[Text()] * (room - len(shown)), Text(), Text(back, style="bright_black")]


def clamp_scroll(view: View, width: int, height: int) -> None:
    """Bound the scrolling by what is shown in `height` lines."""
    if view.scroll:
        view.scroll = min(view.scroll, max(0, len(_lines(view, width, height)) - (height - 2)))


def _lines(view: View, width: int, height: int) -> list[Text]:
    """All lines of the overlay, which may be more than fit."""
    match view.overlay:
        case Overlay.HELP:
            return _help_lines(view.texts)
        case Overlay.EXPLAINED:
            return _explanation(view.texts, view.explained, width)
        case Overlay.DETAILS:
            return _details(view, width, height - 2)
        case Overlay.REQUESTS:
            return _requests(view, width)
        case Overlay.LOG:
            return _log(view, width)
        case None:
            return []


def _requests(view: View, width: int) -> list[Text]:
    lines = []
    if view.requests_problem:
        lines.append(Text(visible(view.requests_problem), style="bold yellow"))
    if view.requests:
        return lines + requests_table(view, width, len(view.requests))
    return lines or [Text(view.texts("no_requests"))]


def _log(view: View, width: int) -> list[Text]:
    lines = [Text(view.texts("LOG" if view.log else "log_empty"), style="bright_black")]
    for line in view.log:
        style = next((style for level, style in _LEVELS.items() if level in line[:60]), "")
        lines += Text(line, style).wrap(_PLAIN, width)
    return lines


_LEVELS = {" ERROR ": "red", " CRITICAL ": "bold red", " WARNING ": "yellow"}
"""Levels of log lines, which follow the time."""


def _explanation(texts: Texts, found: dict[str, Any] | None, width: int) -> list[Text]:
    if found is None:
        return []
    text = Text(visible(verdict(found, texts)), style="bold")
    lines = [Text(), *text.wrap(_PLAIN, width), Text()]
    rows = [*(found.get("candidates") or []), *(found.get("out") or [])]
    names = min(32, max([12, *(cell_len(row["server"]) for row in rows)]))
    title = cut("  " + texts("SERVER"), names + 2) + right(texts("LOAD"), 8)
    title += right(texts("SCORE"), 10) + "  " + texts("WHY_NOT")
    lines.append(Text(title, style="bright_black"))
    for row in rows:
        chosen = row["server"] == found.get("picked")
        line = Text("▸ " if chosen else "  ", "bold cyan")
        line.append(cut(visible(row["server"]), names), "bold" if chosen else "")
        line.append(words.percent(row["load"]).rjust(8), heat(row["load"]))
        score = row.get("score")
        line.append(("" if score is None else f"{score:.4g}").rjust(10) + "  ")
        if "state" in row:
            why = reason_of(texts, row) or texts.word("state", row["state"])
            line.append(visible(why), STATE_STYLES.get(row["state"], ""))
        lines.append(line)
    return lines


def _details(view: View, width: int, height: int) -> list[Text]:
    server, texts = view.chosen(), view.texts
    if server is None or view.snapshot is None:
        return [Text(texts("server_gone"))]
    span = words.span(view.snapshot.time - server.since, texts)
    state = texts("state_for", state=texts.word("state", server.state), span=span)
    if server.reason:
        state = texts("with_reason", state=state, reason=reason_of(texts, server))
    cached = words.NONE if server.prefix_hit_rate is None else words.percent(server.prefix_hit_rate)
    age = words.seconds(server.metrics_age)
    in_flight = str(server.leases)
    if server.max_in_flight is not None:
        in_flight = texts("in_flight_of", n=server.leases, most=server.max_in_flight)
    if server.elsewhere:
        in_flight = texts("in_flight_and", n=in_flight, more=server.elsewhere)
    requests = texts(
        "rates_facts",
        requests=words.rate(server.requests_per_s),
        errors=words.rate(server.errors_per_s),
        tokens=words.rate(server.tokens_per_s),
    )
    load = texts(
        "load_facts",
        load=words.percent(server.load),
        running=f"{server.running:.0f}",
        waiting=f"{server.waiting:.0f}",
        capacity=server.capacity,
        source=texts(f"source_{server.capacity_source}"),
    )
    facts = (
        ("address", server.url),
        ("models", models_of(server, texts)),
        ("Load", load),
        ("In_flight", in_flight),
        ("rates", requests),
        ("first_token", _percentiles(server.ttft)),
        ("duration", _percentiles(server.duration)),
        ("kv_cache", words.NONE if server.kv_usage is None else words.percent(server.kv_usage)),
        ("prefix_hits", cached),
        ("age_of_metrics", texts("too_old", age=age) if server.stale else age),
    )
    lines = [
        Text(visible(server.name), style="bold"),
        Text(visible(state), style=STATE_STYLES.get(server.state, "")),
        Text(),
        *(Text(cut(texts(name), 14), "bright_black").append(visible(text), "default")
          for name, text in facts),
        Text(),
        Text(cut(texts("Load"), 14), "bright_black").append(
            words.sparkline(view.loads.get(server.name, ()), max(8, width - 14)), "cyan"
        ),
    ]  # fmt: skip
    events = [event for event in view.events if is_about(event, server.name)]
    room = height - len(lines) - 2
    if events and room > 0:
        lines += [Text(), Text(texts("EVENTS"), style="bright_black")]
        lines += event_lines(texts, events[-room:][::-1])
    return lines


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return words.NONE
    three = ((found.p50, "p50"), (found.p95, "p95"), (found.p99, "p99"))
    return ", ".join(f"{name} {words.seconds(value)}" for value, name in three)


def _help_lines(texts: Texts) -> list[Text]:
    lines = [Text(texts("help_keys"), style="bold")]
    for key, does in KEYS:
        name = texts("key_click") if key == "click" else key
        lines.append(Text().append(right(name, 9) + "   ", "bold cyan").append(texts(does)))
    about = ("help_columns", "help_capacity", "help_load", "help_bar")
    return [*lines, Text(), *(Text(texts(key)) for key in about)]
