"""Which server has which pieces of prompts in its prefix cache, as far as the router can tell.

A record of what was sent where, not of what the engines hold: bounded per server by that server's
own KV cache, and by a number of entries over all, least recently used first, like the caches it
stands for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vllm_router.routing.prompt.pieces import piece_bytes

ENTRY_BYTES = 360
"""Memory of one piece on one server at the most: 150 while dictionaries are filled, 210 to 350 once
entries have come and gone for long (measured, CPython 3.11, 64 bits)."""


class PrefixTable:
    """Pieces by hash, and who has them.

    Servers are bits of an integer, so one pass over a prompt's pieces answers for all of them.
    `entries_per_server` bounds the memory: ENTRY_BYTES each, and `expiry` seconds the age.
    """

    def __init__(self, entries_per_server: int, expiry: float) -> None:
        self.entries_per_server = entries_per_server
        self.expiry = expiry
        self._holders: dict[int, int] = {}
        self._recent: dict[int, OrderedDict[int, float]] = {}
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        """Entries: a piece counts once for each server that has it."""
        return sum(map(len, self._recent.values()))

    def held(self, bit: int) -> int:
        """Bytes of prompts recorded for the server with this bit."""
        return self._bytes.get(bit, 0)

    def match(self, chain: Sequence[int], servers: int) -> list[tuple[int, int]]:
        """How many leading pieces each of `servers` has, as (pieces, bits), the most first.

        Those that have none are left out. One look-up per piece, ending with the first that
        nobody has; O(len(chain)).
        """
        holders = self._holders
        found: list[tuple[int, int]] = []
        having = servers
        for count, link in enumerate(chain):
            still = holders.get(link, 0) & having
            if still != having:
                if count:
                    found.append((count, having ^ still))
                having = still
                if not still:
                    break
        else:
            if chain:
                found.append((len(chain), having))
        found.reverse()
        return found

    def insert(self, chain: Sequence[int], bit: int, capacity: int, now: float) -> None:
        """The server with this bit will have these pieces; it has room for `capacity` bytes.

        The last piece goes in first, so that of one prompt's pieces the first stay longest.
        """
        recent = self._recent.get(bit)
        if recent is None:
            recent = self._recent[bit] = OrderedDict()
        holders, size = self._holders, self._bytes.get(bit, 0)
        for link in reversed(chain):
            if link in recent:
                recent.move_to_end(link)
            else:
                holders[link] = holders.get(link, 0) | bit
                size += piece_bytes(link)
            recent[link] = now
        self._bytes[bit] = size
        if size > capacity or len(recent) > self.entries_per_server:
            self._shrink(bit, recent, capacity)
        self._expire(bit, recent, now)

    def _shrink(self, bit: int, recent: OrderedDict[int, float], capacity: int) -> None:
        while recent and (self._bytes[bit] > capacity or len(recent) > self.entries_per_server):
            self._drop(recent.popitem(last=False)[0], bit)

    def _expire(self, bit: int, recent: OrderedDict[int, float], now: float) -> None:
        """Amortised O(1) per entry: the oldest are in front."""
        oldest = now - self.expiry
        while recent:
            link, used = next(iter(recent.items()))
            if used >= oldest:
                return
            del recent[link]
            self._drop(link, bit)

    def _drop(self, link: int, bit: int) -> None:
        left = self._holders[link] & ~bit
        if left:
            self._holders[link] = left
        else:
            del self._holders[link]
        self._bytes[bit] -= piece_bytes(link)

    def sweep(self, now: float) -> None:
        """Forget what has expired on servers that get no requests."""
        for bit, recent in self._recent.items():
            self._expire(bit, recent, now)

    def remove(self, chain: Sequence[int], bit: int) -> None:
        """The server turned out not to have these pieces."""
        recent = self._recent.get(bit)
        if recent is None:
            return
        for link in chain:
            if recent.pop(link, None) is not None:
                self._drop(link, bit)

    def forget(self, bit: int) -> None:
        """The server has lost its cache. O(entries of that server), 0.1 µs each."""
        for link in self._recent.pop(bit, ()):
            self._drop(link, bit)
        self._bytes.pop(bit, None)
