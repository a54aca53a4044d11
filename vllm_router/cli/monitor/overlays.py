"""What the monitor shows instead of the fleet: help, one server, or an explanation. Pure."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_router.cli.explain import verdict
from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.events import event_line
from vllm_router.cli.monitor.servers import models_of
from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import STATE_STYLES, cut, heat
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import Percentiles

_PLAIN = Console(file=io.StringIO())
"""Wraps texts; nothing is printed with it."""

KEYS = (
    ("↑ ↓", "select a server (also j, k, page up and down, home, end)"),
    ("enter", "the selected server alone: its figures and events"),
    ("s, S", "sort by the next figure, the one before"),
    ("/", "show only servers with a text in name, address, model or state"),
    ("e", "explain where a request for the server's model would go"),
    ("r", "charts of the last hour, of five minutes"),
    ("d", "drain the selected server: nothing new, what runs may finish"),
    ("u", "undrain it"),
    ("m", "models of each server"),
    ("q", "quit"),
    ("Ctrl-C", "quit at once"),
    ("?", "this help"),
)


def overlay(view: View, width: int, height: int) -> list[Text]:
    """The lines in front of the fleet, exactly `height` of them; empty if nothing is."""
    if view.help:
        lines = _help_lines()
    elif view.explained is not None:
        lines = _explanation(view.explained, width)
    elif view.details:
        lines = _details(view, width, height - 2)
    else:
        return []
    lines = lines[: height - 2]
    back = [Text(), Text("Any key goes back.", style="bright_black")]
    return [*lines, *[Text()] * (height - 2 - len(lines)), *back]


def _explanation(found: dict[str, Any], width: int) -> list[Text]:
    text = Text(visible(verdict(found)), style="bold")
    lines = [Text(), *text.wrap(_PLAIN, width), Text()]
    rows = [*(found.get("candidates") or []), *(found.get("out") or [])]
    names = min(32, max([12, *(len(row["server"]) for row in rows)]))
    title = cut("  SERVER", names + 2) + "    LOAD     SCORE  WHY NOT"
    lines.append(Text(title, style="bright_black"))
    for row in rows:
        chosen = row["server"] == found.get("picked")
        line = Text("▸ " if chosen else "  ", "bold cyan")
        line.append(cut(visible(row["server"]), names), "bold" if chosen else "")
        line.append(words.percent(row["load"]).rjust(8), heat(row["load"]))
        score = row.get("score")
        line.append(("" if score is None else f"{score:.4g}").rjust(10) + "  ")
        if "state" in row:
            why = row.get("reason") or row["state"]
            line.append(visible(why), STATE_STYLES.get(row["state"], ""))
        lines.append(line)
    return lines


def _details(view: View, width: int, height: int) -> list[Text]:
    server = view.chosen()
    if server is None or view.snapshot is None:
        return [Text("The server is gone.")]
    since = words.span(view.snapshot.time - server.since)
    state = f"{server.state} for {since}" + (f": {server.reason}" if server.reason else "")
    cached = words.NONE if server.prefix_hit_rate is None else words.percent(server.prefix_hit_rate)
    age = words.seconds(server.metrics_age) + (" (too old to count)" if server.stale else "")
    requests = (
        f"{words.rate(server.requests_per_s)}, errors/s {words.rate(server.errors_per_s)}, "
        f"tokens/s {words.rate(server.tokens_per_s)}"
    )
    load = (
        f"{words.percent(server.load)}: {server.running:.0f} running, {server.waiting:.0f} "
        f"waiting, capacity {server.capacity} ({server.capacity_source})"
    )
    facts = (
        ("Address", server.url),
        ("Models", models_of(server)),
        ("Load", load),
        ("In flight", str(server.leases)),
        ("Requests/s", requests),
        ("First token", _percentiles(server.ttft)),
        ("Duration", _percentiles(server.duration)),
        ("KV cache", words.NONE if server.kv_usage is None else words.percent(server.kv_usage)),
        ("Prefix hits", cached),
        ("Metrics age", age),
    )
    lines = [
        Text(visible(server.name), style="bold"),
        Text(visible(state), style=STATE_STYLES.get(server.state, "")),
        Text(),
        *(Text(cut(name, 14), "bright_black").append(visible(text), "default")
          for name, text in facts),
        Text(),
        Text(cut("Load", 14), "bright_black").append(
            words.sparkline(view.loads.get(server.name, ()), max(8, width - 14)), "cyan"
        ),
    ]  # fmt: skip
    events = [event for event in view.events if event.server == server.name]
    room = height - len(lines) - 2
    if events and room > 0:
        lines += [Text(), Text("EVENTS", style="bright_black")]
        lines += [event_line(event) for event in events[-room:][::-1]]
    return lines


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return words.NONE
    three = ((found.p50, "p50"), (found.p95, "p95"), (found.p99, "p99"))
    return ", ".join(f"{name} {words.seconds(value)}" for value, name in three)


def _help_lines() -> list[Text]:
    lines = [Text(), Text("Keys", style="bold"), Text()]
    lines += [Text().append(key.rjust(9) + "   ", "bold cyan").append(does) for key, does in KEYS]
    lines += [
        Text(),
        Text("RUN and WAIT are requests on the engine, IN FLT is what this router has in flight,"),
        Text("CAP is the capacity."),
        Text("LOAD is (RUN + WAIT / 2) / CAP: yellow from 70 %, red from 90 %."),
    ]
    return lines
