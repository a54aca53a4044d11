"""The monitor on a terminal: paint frames, read keys, restore the terminal."""

from __future__ import annotations

import enum
import os
import signal
import sys
import time

import trio
from rich.console import Console
from rich.live import Live

from vllm_router.cli.monitor.draw import draw
from vllm_router.cli.monitor.keys import decode, raw_input
from vllm_router.cli.monitor.link import Feed, GoingAway, Message, NoFeed
from vllm_router.cli.monitor.state import Explain, SetDrain, View
from vllm_router.errors import RouterError

FRAME = 0.05
"""Minimum seconds between two frames."""

TICK = 1.0
"""Maximum seconds between two frames, so that stale figures are marked."""

ESCAPE_TIME = 0.05
"""Seconds to wait for the rest of an escape sequence."""

PARENT_INTERVAL = 0.25


class End(enum.IntEnum):
    """Why the monitor has ended; its exit code if it was started by a router."""

    USER = 0
    ROUTER_STOPS = 3
    ROUTER_DIED = 4
    SIGNALLED = 5
    HANGUP = 6


_ENDS = {
    signal.SIGINT: End.USER,
    signal.SIGTERM: End.SIGNALLED,
    signal.SIGHUP: End.HANGUP,
}


class Screen:
    """The monitor on this process's terminal."""

    def __init__(self, feed: Feed, view: View) -> None:
        self._feed = feed
        self._view = view
        self._changed = trio.Event()
        self._end = End.USER
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._parent = os.getppid()
        self._error: NoFeed | None = None

    async def run(self) -> End:
        """Run until the user or a signal ends it. Raises NoFeed if no router answers at the start.

        The terminal is restored in any case.
        """
        view = self._view
        first = trio.Event()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._follow, first)
                    await nursery.start(self._signals)
                    # Paint only when there is data: earlier errors stay readable lines.
                    await first.wait()
                    descriptor = sys.stdin.fileno()
                    console = Console()
                    with (
                        raw_input(descriptor),
                        Live(
                            console=console,
                            screen=True,
                            auto_refresh=False,
                            redirect_stdout=False,
                            redirect_stderr=False,
                        ) as live,
                    ):
                        nursery.start_soon(self._keys, descriptor)
                        if view.attached:
                            nursery.start_soon(self._watch_parent)
                        await self._paint(console, live)
        finally:
            self._nursery = None
        if self._error is not None:
            raise self._error
        return self._end

    def _stop(self, end: End) -> None:
        self._end = end
        self._scope.cancel(reason=end.name)

    # -- tasks ----------------------------------------------------------------------------------

    async def _follow(self, first: trio.Event) -> None:
        view = self._view

        def take(message: Message) -> None:
            try:
                view.take(message, time.time())
            except ValueError as error:
                raise NoFeed(str(error)) from None
            if view.snapshot is not None:
                first.set()
            self._changed.set()

        def lost(error: NoFeed) -> None:
            view.lost(str(error))
            self._changed.set()
            if view.attached and isinstance(error, GoingAway):
                self._stop(End.ROUTER_STOPS)

        try:
            await self._feed.follow(take, lost, patient=view.attached)
        except NoFeed as error:
            self._error = error
            self._scope.cancel(reason="no feed")

    async def _paint(self, console: Console, live: Live) -> None:
        while True:
            width, height = console.size
            live.update(draw(self._view, width, height, time.time()), refresh=True)
            self._changed = trio.Event()
            with trio.move_on_after(TICK):
                await self._changed.wait()
            await trio.sleep(FRAME)

    async def _keys(self, descriptor: int) -> None:
        rest = b""
        while True:
            with trio.move_on_after(ESCAPE_TIME if rest else float("inf")) as patience:
                await trio.lowlevel.wait_readable(descriptor)
            if patience.cancelled_caught:
                rest = b""  # an Escape key by itself, without a function
                self._press("escape")
                continue
            try:
                data = os.read(descriptor, 1024)
            except OSError:  # the terminal has been closed
                data = b""
            if not data:
                self._stop(End.HANGUP)
                return
            keys, rest = decode(rest + data)
            for key in keys:
                self._press(key)

    def _press(self, key: str) -> None:
        action = self._view.key(key)
        self._changed.set()
        if isinstance(action, SetDrain):
            if self._nursery is not None:
                self._nursery.start_soon(self._drain, action)
        elif isinstance(action, Explain):
            if self._nursery is not None:
                self._nursery.start_soon(self._explain, action)
        elif action is not None:
            self._stop(End.USER)

    async def _drain(self, action: SetDrain) -> None:
        # Half of the start-up time; rarely needed.
        from vllm_router.cli.router_client import RouterClient

        try:
            async with RouterClient(self._feed.url, self._feed.key, self._feed.ca) as router:
                await router.drain(action.server, on=action.on)
            done = "is draining" if action.on else "takes requests again"
            self._view.message = f"{action.server} {done}."
        except RouterError as error:
            self._view.message = str(error)
        self._changed.set()

    async def _explain(self, action: Explain) -> None:
        from vllm_router.cli.router_client import RouterClient

        try:
            async with RouterClient(self._feed.url, self._feed.key, self._feed.ca) as router:
                self._view.explained = await router.explain(action.model, None)
        except RouterError as error:
            self._view.message = str(error)
        self._changed.set()

    async def _signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGWINCH, signal.SIGCONT)
        with trio.open_signal_receiver(*numbers) as received:
            task_status.started()
            async for number in received:
                if number in (signal.SIGWINCH, signal.SIGCONT):
                    self._changed.set()
                elif number == signal.SIGINT and self._view.attached:
                    # The terminal also sends it to the router, which closes the feed when it stops.
                    continue
                else:
                    self._stop(_ENDS[signal.Signals(number)])

    async def _watch_parent(self) -> None:
        """Detect a router that was killed and cannot end its monitor."""
        while True:
            await trio.sleep(PARENT_INTERVAL)
            if os.getppid() != self._parent:
                self._stop(End.ROUTER_DIED)
