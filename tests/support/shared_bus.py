"""The store of `[shared]` in memory, with the faults of a real one; its time is Trio's clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import trio

from vllm_router.config.shared import SharedConfig
from vllm_router.routing.sharing.messages import About
from vllm_router.routing.sharing.peers import RouterView
from vllm_router.routing.sharing.status import SharedStatus
from vllm_router.runtime.sharing.store import (
    ENTRIES_PER_TURN,
    EntryId,
    Store,
    StoreError,
    TooMuchToRead,
    Turn,
)

MAX_ENTRIES = 10_000


def shared_status(problem: str = "", digest: str = "aaaaaa") -> SharedStatus:
    """What a router shows that has one other router beside it.

    digest: of the other's configuration; this router's is "aaaaaa".
    """
    other = RouterView(
        router="router-1",
        about=About("gw-2", "1.2.3", digest, 3600.0, 1000),
        silent=0.1,
        in_flight=3,
        rate=2.0,
        live=True,
    )
    return SharedStatus(
        store="redis://store:6379",
        fleet="default",
        own=About("gw-1", "1.2.4", "aaaaaa", 60.0, 10),
        up=not problem,
        problem=problem,
        age=0.1,
        routers=[other],
        in_flight={"http://127.0.0.1:1": 3},
        count=2,
        failures=1,
        dropped=0,
        unsent=0,
        spared=2,
    )


class Bus:
    """One store for several routers.

    gone: connections are refused, and open ones break.
    frozen: turns wait until `thaw`, and fail after two seconds.
    takes_when_thawed: batches of turns that have failed while it was frozen are written then.
    full: writes are refused.
    longest: bytes of an entry beyond which a turn that would read it fails.
    clock: milliseconds that its clock differs from Trio's.
    """

    def __init__(self, clock: int = 1_700_000_000_000) -> None:
        self.entries: list[tuple[EntryId, bytes]] = []
        self.drains: dict[bytes, bytes] = {}
        self.gone = False
        self.takes_when_thawed = False
        self.full = False
        self.longest = 2**30
        self.clock = clock
        self.turns = 0
        self._thawed = trio.Event()
        self._thawed.set()
        self._received: list[bytes] = []
        self._last: EntryId = (0, 0)

    def freeze(self) -> None:
        self._thawed = trio.Event()

    def thaw(self) -> None:
        self._thawed.set()
        if self.takes_when_thawed:
            for batch in self._received:
                self.append(batch)
        self._received.clear()

    def flush(self) -> None:
        """All is lost, as after a restart without persistence."""
        self.entries.clear()
        self.drains.clear()
        self._last = (0, 0)

    @property
    def now(self) -> int:
        return int(trio.current_time() * 1000) + self.clock

    def append(self, content: bytes) -> EntryId:
        self._last = max((self.now, 0), (self._last[0], self._last[1] + 1))
        self.entries.append((self._last, content))
        del self.entries[:-MAX_ENTRIES]
        return self._last

    async def open(self, config: SharedConfig, use: Callable[[Store], Awaitable[None]]) -> None:
        """An `OpenStore`."""
        await self._answer()
        await use(self)

    async def _answer(self) -> None:
        await trio.sleep(0.001)
        if self.gone:
            raise StoreError("connection refused")
        with trio.move_on_after(2.0):
            await self._thawed.wait()
            return
        raise StoreError("no answer in 2 s")

    async def turn(self, batch: bytes | None, drains: Mapping[str, bytes], after: EntryId) -> Turn:
        try:
            await self._answer()
        except StoreError:
            if batch is not None and not self._thawed.is_set():
                self._received.append(batch)
            raise
        self.turns += 1
        stored = dict(self.drains)
        found = [entry for entry in self.entries if entry[0] > after][:ENTRIES_PER_TURN]
        if any(len(content) > self.longest for _, content in found):
            raise TooMuchToRead("the answer is too long")
        written = None
        if batch is not None and not self.full:
            written = self.append(batch)
            self.drains.update({url.encode(): record for url, record in drains.items()})
        problem = "OOM command not allowed" if self.full and batch is not None else ""
        return Turn(self.now, written, problem, stored, found)
