"""The monitor's state and its screen as text, for tests."""

from __future__ import annotations

import io
from typing import Any

import msgspec
from rich.console import Console

from support.feed_makers import NOW, PERCENTILES, hello, server, snapshot
from vllm_router.cli.monitor.draw import draw
from vllm_router.cli.monitor.state import View
from vllm_router.web import schema


def view(*servers: schema.ServerView, **facts: Any) -> View:
    shown = View("http://router:8888", **facts)
    shown.take(hello(), NOW)
    shown.take(snapshot(*servers), NOW)
    return shown


def picture(shown: View, width: int = 80, height: int = 24, now: float = NOW) -> list[str]:
    """The lines of the screen, each exactly `width` cells wide."""
    console = Console(
        width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None
    )
    lines = console.render_lines(draw(shown, width, height, now), pad=False)
    texts = ["".join(segment.text for segment in line) for line in lines]
    assert len(texts) == height
    assert all(sum(segment.cell_length for segment in line) == width for line in lines)
    return texts


def styles(shown: View, text: str) -> set[str]:
    """The text as the screen shows it."""
    console = Console(width=120, height=24, file=io.StringIO(), force_terminal=True)
    lines = console.render_lines(draw(shown, 120, 24, NOW), pad=False)
    return {str(part.style) for line in lines for part in line if text in part.text}


def model(name: str, available: int = 1, servers: int = 2, **facts: Any) -> schema.ModelView:
    known: dict[str, Any] = {
        "names": [],
        "adapters": 0,
        "aliases": [],
        "fallback": None,
        "draining": 0,
        "without_server_since": None if available else NOW,
        "running": 3.0,
        "waiting": 1.0,
        "queued": 0,
        "capacity": 8,
        "load": 0.44,
        "requests_per_s": 2.0,
        "errors_per_s": 0.5,
        "refused_per_s": 0.0,
        "tokens_per_s": 77.0,
        "ttft": PERCENTILES,
        "duration": PERCENTILES,
    }
    return schema.ModelView(name=name, available=available, servers=servers, **(known | facts))


def with_models(*models: schema.ModelView, **facts: Any) -> View:
    shown = view(server("a"), server("b"), **facts)
    assert shown.snapshot is not None
    shown.take(msgspec.structs.replace(shown.snapshot, models=list(models)), NOW)
    return shown
