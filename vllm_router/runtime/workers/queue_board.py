"""The requests that wait for a server in each process of a router: shared memory without locks.

Every process has a page that it alone writes; the parent resets the page of a process that has
died. A page has

* a head: the *epoch*, which is counted up at every reset, the *heartbeat* (when the process last
  handed out servers), and how many *changes* there have been in this epoch,
* when leases on servers were last released, by a hash of the server,
* a ring of the slots that have changed last,
* slots, one for each waiting request.

A reader keeps the number of changes that it has seen, and reads the slots that have changed since;
after a new epoch, or if the ring has been overrun, it reads all. Words are aligned, so that a
reader sees the value before or after a write. The first word of a slot is 0 while the others are
written. A slot that has ended is reused as late as possible, so that readers see how it ended.

Pure but for the memory itself. Times are microseconds of the clock that all processes share.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

SLOTS = 16_384
"""Requests that may wait in one process, for all models together."""

_RING = 8_192
_RELEASES = 1_024
_HEAD = 8
_EPOCH, _HEARTBEAT, _CHANGES, _USED = range(4)
_WORD = 8
_WIDTH = 12
_SPARE = 64
"""Slots that stay unused after their end, while others are free."""

_RELEASES_AT = _HEAD
_RING_AT = _RELEASES_AT + _RELEASES
_SLOTS_AT = _RING_AT + _RING
_PAGE = _SLOTS_AT + SLOTS * _WIDTH
_BYTES = -(-_PAGE * _WORD // mmap.PAGESIZE) * mmap.PAGESIZE

_NO_RELEASES = memoryview(bytes(_RELEASES * _WORD)).cast("q")
_UNDER_WAY = 2**63 - 1
_RETURNING = 1
_EPOCH_SHIFT = 1
_CONSIDERED = 8


class Entry(NamedTuple):
    """A waiting request, as other processes see it. `mark` hashes names to words.

    number: its stamp; negative once it has ended.
    queue: the model in whose queue it waits.
    public: the requested name if another model may replace it, otherwise 0.
    route: equal for requests of one process with equal routes.
    displaced: the number of the request that it has displaced; 0 if none.
    considered: when it was last its turn and no server was available.
    served, server: the stamp of its service and its server; 0 if none.
    since: when it began to wait.
    """

    number: int
    queue: int
    public: int
    key: int
    priority: int
    flags: int
    route: int
    displaced: int
    considered: int
    served: int
    server: int
    since: int

    @property
    def returning(self) -> bool:
        return bool(self.flags & _RETURNING)

    @property
    def epoch(self) -> int:
        return self.flags >> _EPOCH_SHIFT


@lru_cache(maxsize=8192)
def mark(text: str) -> int:
    """A name as one word, never 0; a collision among a thousand names has probability 10^-13."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_WORD).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


class QueueBoard:
    """The pages of `processes` processes; page 0 is the leader's."""

    def __init__(self, fileno: int, processes: int) -> None:
        """Map the memory of a descriptor, which the caller owns."""
        self._memory = mmap.mmap(fileno, processes * _BYTES)
        words = memoryview(self._memory).cast("q")
        step = _BYTES // _WORD
        self.pages = [Page(words[step * n : step * n + _PAGE]) for n in range(processes)]

    @staticmethod
    def create(processes: int) -> int:
        """Create a descriptor of zeroed memory, allocated on use; the caller closes it."""
        fileno = os.memfd_create("vllm-router queue")
        os.ftruncate(fileno, processes * _BYTES)
        return fileno


class Page:
    """The page of one process, as any process sees it."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    # -- for its process ----------------------------------------------------------------------

    def reset(self) -> None:
        """Drop all requests: the process starts, or has died (called by the parent)."""
        self._words[_CHANGES] = self._words[_HEARTBEAT] = self._words[_USED] = 0
        self._words[_RELEASES_AT:_RING_AT] = _NO_RELEASES
        self._words[_EPOCH] += 1

    def write(self, slot: int, entry: Entry) -> None:
        """A request begins to wait in this slot."""
        words, at = self._words, _SLOTS_AT + slot * _WIDTH
        words[at] = 0
        flags = entry.flags | self.epoch << _EPOCH_SHIFT
        for place, word in enumerate(entry._replace(flags=flags)[1:], at + 1):
            words[place] = word
        words[at] = entry.number
        if slot >= words[_USED]:
            words[_USED] = slot + 1
        self._announce(slot)

    def end(self, slot: int, served: int, server: int) -> None:
        """The request in this slot has stopped waiting."""
        words, at = self._words, _SLOTS_AT + slot * _WIDTH
        words[at + 9], words[at + 10] = served, server
        words[at] = -words[at]
        self._announce(slot)

    def _announce(self, slot: int) -> None:
        words = self._words
        words[_RING_AT + words[_CHANGES] % _RING] = slot
        words[_CHANGES] += 1

    def consider(self, slot: int, now: int) -> None:
        """It was this request's turn, but no server was available."""
        self._words[_SLOTS_AT + slot * _WIDTH + _CONSIDERED] = now

    def beat(self, now: int) -> None:
        """The process has assigned servers."""
        self._words[_HEARTBEAT] = now

    def begin_release(self, server: int) -> None:
        """The process is about to release a lease: until `release`, the time counts as now."""
        self._words[_RELEASES_AT + server % _RELEASES] = _UNDER_WAY

    def release(self, server: int, now: int) -> None:
        """The process has released a lease on the server with this mark."""
        self._words[_RELEASES_AT + server % _RELEASES] = now

    # -- for all ------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return int(self._words[_EPOCH])

    @property
    def heartbeat(self) -> int:
        return int(self._words[_HEARTBEAT])

    @property
    def changes(self) -> int:
        return int(self._words[_CHANGES])

    def considered(self, slot: int) -> int:
        return int(self._words[_SLOTS_AT + slot * _WIDTH + _CONSIDERED])

    def released(self, server: int) -> int:
        return int(self._words[_RELEASES_AT + server % _RELEASES])

    def read(self, slot: int) -> Entry:
        at = _SLOTS_AT + slot * _WIDTH
        return Entry(*self._words[at : at + _WIDTH].tolist())

    def changed_since(self, seen: int) -> Iterator[int] | None:
        """The slots changed since change number `seen`, in order; None if the ring was overrun.

        Half of the ring is reserved for concurrent writes.
        """
        changes = self.changes
        if not 0 <= changes - seen <= _RING // 2:
            return None
        return (self._words[_RING_AT + n % _RING] for n in range(seen, changes))

    def used(self) -> range:
        """All slots that may hold a request."""
        return range(self._words[_USED])


class FreeSlots:
    """The unused slots of a page; the slot that has been free for longest is used first."""

    def __init__(self) -> None:
        self._free: deque[int] = deque()
        self._fresh = 0

    def __bool__(self) -> bool:
        return bool(self._free) or self._fresh < SLOTS

    def take(self) -> int:
        if self._fresh < SLOTS and len(self._free) < _SPARE:
            self._fresh += 1
            return self._fresh - 1
        return self._free.popleft()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)
