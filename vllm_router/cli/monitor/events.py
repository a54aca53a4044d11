"""The monitor's events. Pure."""

from __future__ import annotations

import time

from rich.text import Text

from vllm_router.cli.monitor.state import View
from vllm_router.cli.monitor.styles import STATE_STYLES
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import Event


def events_list(view: View, room: int) -> list[Text]:
    """The newest events in `room` lines below a title and an empty line; nothing without room."""
    if room <= 0 or not view.events:
        return []
    newest = list(view.events)[-room:][::-1]
    return [Text(), Text("EVENTS", style="bright_black"), *map(event_line, newest)]


def event_line(event: Event) -> Text:
    """The time of an event, and what happened."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return Text().append(clock + "  ", "bright_black").append(*_event(event))


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
