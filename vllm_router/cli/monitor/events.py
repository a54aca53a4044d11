"""The monitor's events. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from vllm_router.cli.monitor.state import OF_REQUESTS, View
from vllm_router.cli.monitor.styles import STATE_STYLES
from vllm_router.cli.monitor.texts import ENGLISH, Texts, reason_of
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import Event


def events_list(view: View, room: int) -> list[Text]:
    """The newest events in `room` lines below a title and an empty line; nothing without room."""
    if room <= 0 or not view.events:
        return []
    newest = _newest(view.events, room)
    title = Text(view.texts("EVENTS"), style="bright_black")
    return [Text(), title, *event_lines(view.texts, newest)]


def _newest(events: Sequence[Event], room: int) -> list[Event]:
    """The newest events first. Single requests that failed get a third: they come in masses."""
    found: list[Event] = []
    of_requests = max(1, room // 3)
    for event in reversed(events):
        if len(found) == room:
            break
        if event.kind == OF_REQUESTS:
            of_requests -= 1
            if of_requests < 0:
                continue
        found.append(event)
    return found


def event_lines(texts: Texts, events: Iterable[Event]) -> Iterator[Text]:
    """The time of each event, and what happened."""
    for event in events:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        line = Text().append(clock + "  ", "bright_black")
        yield line.append(visible(event_text(texts, event)), _style(event))


def is_about(event: Event, server: str) -> bool:
    """Whether the event is about this server, perhaps among others."""
    return event.server == server or server in event.servers


_EVENT_STYLES = {
    "reload": "green",
    "discovery": "green",
    "source": "yellow",
    "drained": "blue",
    "full": "yellow",
    "missed": "yellow",
}


_LABELLED = ("reload", "reload_refused", "discovery")


def _style(event: Event) -> str:
    if event.kind in ("state", "states"):
        return STATE_STYLES.get(event.new or "", "")
    return _EVENT_STYLES.get(event.kind, "red")


def event_text(texts: Texts, event: Event) -> str:
    """What happened. The router's words are English; kinds and codes are translated.

    A text without a code, such as the configuration parser's, stays as it is.
    """
    text = texts.event(event.text, event.text_code, event.text_values)
    if event.kind in _LABELLED:
        return texts(f"event_{event.kind}", text=text)
    if texts.language == ENGLISH.language:
        return event.text
    if event.kind == "state" and event.server and event.old and event.new:
        reason = reason_of(texts, event)
        return texts(
            "event_state_why" if reason else "event_state",
            server=event.server,
            old=texts.word("state", event.old),
            new=texts.word("state", event.new),
            reason=reason,
        )
    if event.kind == "states" and event.old and event.new:
        old, new = texts.word("state", event.old), texts.word("state", event.new)
        return texts("event_states", n=event.count or len(event.servers), old=old, new=new)
    if event.kind == "full" and not event.server:
        return texts("event_full_many", n=len(event.servers), times=event.count or 1)
    if event.kind in ("full", "drained", "missed"):
        return texts(f"event_{event.kind}", server=event.server, n=event.count or 1)
    return text
