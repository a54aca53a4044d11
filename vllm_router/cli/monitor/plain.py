"""The monitor without a terminal: a line per interval, and one per event."""

from __future__ import annotations

import math
import time

import trio

from vllm_router.cli.monitor import words
from vllm_router.cli.monitor.link import Feed, Message, NoFeed
from vllm_router.cli.monitor.shared import shared_text
from vllm_router.cli.monitor.state import View
from vllm_router.observability.formatting import visible
from vllm_router.web.schema import Event, Hello, Snapshot


def summary(snapshot: Snapshot) -> str:
    """`3/3 servers up, 12 running, …`: the fleet in one line."""
    fleet = snapshot.fleet
    sick = [f"{n} {state}" for state, n in sorted(fleet.states.items()) if state != "up"]
    parts = [
        f"{fleet.available}/{fleet.servers} servers" + (f" ({', '.join(sick)})" if sick else ""),
        f"{fleet.running:.0f} running",
        f"{fleet.waiting:.0f} waiting",
        f"{fleet.leases} in flight",
        *([f"{fleet.queued} queued"] if fleet.queued else ()),
        f"load {words.percent(fleet.load)}",
        f"{words.rate(fleet.requests_per_s)} req/s",
        f"{words.rate(fleet.errors_per_s)} err/s",
        f"TTFT p95 {words.seconds(fleet.ttft.p95 if fleet.ttft else None)}",
    ]
    shared = snapshot.router.shared
    return ", ".join(parts) + (f"; {shared_text(shared)}" if shared is not None else "")


def stamped(moment: float, text: str) -> str:
    """A line with its time in UTC; control characters are escaped."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime(moment)) + visible(text)


async def print_lines(feed: Feed, interval: float) -> None:
    """Print until cancelled. Raises NoFeed if no router answers at the start."""
    view = View(feed.url)
    due = -math.inf

    def say(moment: float, text: str) -> None:
        print(stamped(moment, text), flush=True)  # noqa: T201  a command's output

    def take(message: Message) -> None:
        nonlocal due
        back = bool(view.trouble)
        if isinstance(message, Hello) and view.hello is not None:
            for event in view.unheard(message):
                say(event.time, event.text)
        view.take(message, time.time())
        if isinstance(message, Event):
            say(message.time, message.text)
        elif isinstance(message, Snapshot):
            if back:
                view.trouble = ""
                say(message.time, f"connected again to {feed.url}")
            if back or trio.current_time() >= due:
                due = trio.current_time() + interval
                say(message.time, summary(message))

    def lost(error: NoFeed) -> None:
        if view.trouble != str(error):
            say(time.time(), f"no data from {feed.url}: {error}; trying again")
        view.lost(str(error))

    await feed.follow(take, lost, patient=False)
