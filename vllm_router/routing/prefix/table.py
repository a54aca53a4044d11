"""The blocks that each server has in its prefix cache, estimated from the prompts sent to it.

Bounded per server by the size of its KV cache and by a number of entries, with LRU eviction as in
the engines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vllm_router.routing.prompt.blocks import block_bytes

ENTRY_BYTES = 360
"""Maximum memory of one entry: 150 bytes while dictionaries grow, 210 to 350 in the long run
(measured, CPython 3.11, 64 bits)."""


class PrefixTable:
    """Block hashes with the servers that have them.

    Servers are bits of an integer, so one pass over a prompt's blocks covers all servers.
    `entries_per_server` bounds the memory (ENTRY_BYTES each), `expiry` the age in seconds.
    """

    def __init__(self, entries_per_server: int, expiry: float) -> None:
        self.entries_per_server = entries_per_server
        self.expiry = expiry
        self._holders: dict[int, int] = {}
        self._recent: dict[int, OrderedDict[int, float]] = {}
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        """The number of entries: a block counts once per server that has it."""
        return sum(map(len, self._recent.values()))

    def held(self, bit: int) -> int:
        """Bytes of prompts recorded for the server with this bit."""
        return self._bytes.get(bit, 0)

    def blocks(self, bit: int) -> list[int]:
        """The blocks of the server with this bit, the least recently used first."""
        return list(self._recent.get(bit, ()))

    def match(self, hashes: Sequence[int], servers: int) -> list[tuple[int, int]]:
        """Pairs (leading blocks, bits of the servers that have them), the most blocks first.

        Servers without the first block are left out. One look-up per block up to the first one
        that no server has; O(len(hashes)).
        """
        holders = self._holders
        found: list[tuple[int, int]] = []
        having = servers
        for count, block in enumerate(hashes):
            still = holders.get(block, 0) & having
            if still != having:
                if count:
                    found.append((count, having ^ still))
                having = still
                if not still:
                    break
        else:
            if hashes:
                found.append((len(hashes), having))
        found.reverse()
        return found

    def insert(self, hashes: Sequence[int], bit: int, capacity: int, now: float) -> None:
        """Add blocks of a server with `capacity` bytes of cache.

        The last block is added first, so that a prompt's first blocks are evicted last.
        """
        recent = self._recent.get(bit)
        if recent is None:
            recent = self._recent[bit] = OrderedDict()
        holders, size = self._holders, self._bytes.get(bit, 0)
        for block in reversed(hashes):
            if block in recent:
                recent.move_to_end(block)
            else:
                holders[block] = holders.get(block, 0) | bit
                size += block_bytes(block)
            recent[block] = now
        self._bytes[bit] = size
        if size > capacity or len(recent) > self.entries_per_server:
            self._shrink(bit, recent, capacity)
        self._expire(bit, recent, now)

    def _shrink(self, bit: int, recent: OrderedDict[int, float], capacity: int) -> None:
        while recent and (self._bytes[bit] > capacity or len(recent) > self.entries_per_server):
            self._drop(recent.popitem(last=False)[0], bit)

    def _expire(self, bit: int, recent: OrderedDict[int, float], now: float) -> None:
        """Drop expired entries. Amortised O(1) per entry: the oldest are in front."""
        oldest = now - self.expiry
        while recent:
            block, used = next(iter(recent.items()))
            if used >= oldest:
                return
            del recent[block]
            self._drop(block, bit)

    def _drop(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
        self._bytes[bit] -= block_bytes(block)

    def sweep(self, now: float) -> None:
        """Drop expired entries of all servers, also of those without requests."""
        for bit, recent in self._recent.items():
            self._expire(bit, recent, now)

    def remove(self, hashes: Sequence[int], bit: int) -> None:
        """Drop these blocks of a server."""
        recent = self._recent.get(bit)
        if recent is None:
            return
        for block in hashes:
            if recent.pop(block, None) is not None:
                self._drop(block, bit)

    def forget(self, bit: int) -> None:
        """Drop all blocks of a server. O(entries of the server), 0.1 µs each."""
        for block in self._recent.pop(bit, ()):
            self._drop(block, bit)
        self._bytes.pop(bit, None)
