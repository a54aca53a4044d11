"""Collects what this process has to tell the others, within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from vllm_router.routing.adapters import summed_requests
from vllm_router.routing.owners import Entry
from vllm_router.routing.sharing.messages import (
    MAX_HASHES,
    MAX_ITEMS,
    About,
    Batch,
    Figures,
    KeyUse,
    Placed,
    ServerLevel,
    pack_blocks,
    unpack_blocks,
)

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.blocks import Prompt

REPEAT_AFTER = 300.0
"""Seconds after which all blocks of a conversation are announced again, not only new ones: else the
others would evict its first blocks as unused."""

MAX_CONVERSATIONS = 8192
"""Conversations whose last repetition is remembered."""

MAX_WAITING_HASHES = 8 * MAX_HASHES
"""Block hashes that wait to be sent; beyond, the oldest are dropped and counted."""

OWNERS_PER_BATCH = 500
QUARANTINED_PER_BATCH = 100
MAX_WAITING = 16 * OWNERS_PER_BATCH

ADAPTER_BYTES = 16 * 1024
"""Bytes of adapters in a batch. Without them the others go by the servers' metrics."""

CONTINUOUS = 2.0
"""Seconds between two batches beyond which sharing was interrupted."""

Blocks = tuple[str, tuple[int, ...]]
"""A URL, and hashes of blocks that its server has."""

T = TypeVar("T")


class Outbox:
    """Implements `Placements` of policies. Times are arguments, in seconds.

    router: the id of this process in its batches.
    dropped: placements that were dropped because too many waited.
    """

    def __init__(self, router: str) -> None:
        self.router = router
        self.dropped = 0
        self._number = 0
        self._placed: deque[Blocks] = deque()
        self._withdrawn: deque[Blocks] = deque()
        self._waiting_hashes = 0
        self._announced_at: dict[tuple[str, int], float] = {}
        self._announced_before: dict[tuple[str, int], float] = {}
        self._ejected: deque[str] = deque(maxlen=MAX_WAITING)
        self._quarantined: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._owners: deque[Entry] = deque(maxlen=MAX_WAITING)
        self._keys: dict[str, tuple[int, int]] = {}
        self._batch_at: float | None = None

    # -- events -------------------------------------------------------------------------------

    def placed(self, server: Server, prompt: Prompt, known: int, now: float) -> None:
        """A prompt was sent to a server that had its first `known` blocks."""
        hashes = prompt.block_hashes
        conversation = server.url, prompt.conversation or hashes[0]
        announced_at = self._announced_at.get(conversation)
        if announced_at is None:
            announced_at = self._announced_before.get(conversation)
        if known and announced_at is not None and now - announced_at < REPEAT_AFTER:
            hashes = hashes[known:]
        else:
            if len(self._announced_at) >= MAX_CONVERSATIONS:
                self._announced_before, self._announced_at = self._announced_at, {}
            self._announced_at[conversation] = now
        if hashes:
            self._put(self._placed, (server.url, hashes[-MAX_HASHES:]))

    def withdrawn(self, server: Server, prompt: Prompt, known: int) -> None:
        """The server has refused the prompt, and computed nothing beyond `known` blocks."""
        blocks = server.url, prompt.block_hashes[known:][-MAX_HASHES:]
        if not blocks[1]:
            return
        if blocks in self._placed:
            self._placed.remove(blocks)
            self._waiting_hashes -= len(blocks[1])
        else:
            self._put(self._withdrawn, blocks)

    def _put(self, queue: deque[Blocks], blocks: Blocks) -> None:
        queue.append(blocks)
        self._waiting_hashes += len(blocks[1])
        while self._waiting_hashes > MAX_WAITING_HASHES or len(queue) > MAX_WAITING:
            fullest = max(self._placed, self._withdrawn, key=len)
            self._waiting_hashes -= len(fullest.popleft()[1])
            self.dropped += 1

    def pass_on(self, batch: Batch) -> None:
        """Pass on what another process of this router has announced."""
        for queue, news in ((self._placed, batch.placed), (self._withdrawn, batch.withdrawn)):
            for url, blocks in news:
                self._put(queue, (url, unpack_blocks(blocks)))
        self._quarantined += batch.quarantined

    def ejected(self, url: str) -> None:
        """A server was ejected by this router."""
        self._ejected.append(url)

    def quarantined(self, digest: bytes) -> None:
        """A request has crashed servers."""
        self._quarantined.append(digest)

    def owner(self, entry: Entry) -> None:
        """A server has stored a response."""
        self._owners.append(entry)

    # -- batches ------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether a batch would have content besides levels."""
        return bool(
            self._placed or self._withdrawn or self._ejected or self._quarantined or self._owners
        )

    def batch(
        self,
        about: About,
        servers: Mapping[str, ServerLevel],
        keys: Mapping[str, tuple[int, int]],
        now: float,
        figures: Mapping[str, Figures] | None = None,
    ) -> Batch:
        """Take the events out, up to the size of a batch.

        `servers` are the levels by URL, `keys` the admitted and running requests by key, `figures`
        the metrics of the servers that were scraped, by URL.
        """
        self._number += 1
        since = now - self._batch_at if self._batch_at is not None else None
        self._batch_at = now
        placed = self._blocks(self._placed, MAX_HASHES)
        return Batch(
            router=self.router,
            number=self._number,
            about=about,
            servers=_with_few_names(islice(servers.items(), MAX_ITEMS)),
            placed=placed,
            withdrawn=self._blocks(
                self._withdrawn, MAX_HASHES - sum(len(blocks) // 8 for _, blocks in placed)
            ),
            keys=self._changed(keys, since),
            ejected=_taken(self._ejected, OWNERS_PER_BATCH),
            quarantined=_taken(self._quarantined, QUARANTINED_PER_BATCH),
            owners=_taken(self._owners, OWNERS_PER_BATCH),
            figures=dict(figures or {}),
            interrupted=since if since is not None and since > CONTINUOUS else 0.0,
        )

    def _blocks(self, queue: deque[Blocks], room: int) -> list[Placed]:
        taken: list[Placed] = []
        while queue and len(queue[0][1]) <= room and len(taken) < MAX_ITEMS // 4:
            url, hashes = queue.popleft()
            room -= len(hashes)
            taken.append((url, pack_blocks(hashes)))
            self._waiting_hashes -= len(hashes)
        return taken

    def _changed(
        self, keys: Mapping[str, tuple[int, int]], since: float | None
    ) -> dict[str, KeyUse]:
        """The keys whose use has changed, `since` seconds after the last batch if there was one."""
        changed = {}
        for name, (admitted, running) in islice(keys.items(), MAX_ITEMS):
            before = self._keys.get(name, (0, 0))
            if running or before != (admitted, running):
                new = max(0, admitted - before[0]) if since is not None else 0
                if since is not None and since <= CONTINUOUS:
                    changed[name] = KeyUse(admitted, new, running)
                else:
                    changed[name] = KeyUse(admitted, 0, running, unheard=new)
        self._keys = dict(keys)
        return changed


def _with_few_names(levels: Iterable[tuple[str, ServerLevel]]) -> dict[str, ServerLevel]:
    """The levels by URL, without the adapters of the last servers if there are too many."""
    found, room = {}, ADAPTER_BYTES
    for url, level in levels:
        if level.adapters:
            room -= sum([len(name.encode()) + 4 for name in level.adapters])
            if room < 0:
                level = ServerLevel(level.queued, level.in_flight)
        found[url] = level
    return found


def _taken(queue: deque[T], most: int) -> list[T]:
    return [queue.popleft() for _ in range(min(most, len(queue)))]


def summed_levels(levels: Iterable[Mapping[str, ServerLevel]]) -> dict[str, ServerLevel]:
    """The sum of several processes' levels, by URL."""
    total: dict[str, ServerLevel] = {}
    for one in levels:
        for url, level in one.items():
            have = total.get(url)
            if have is not None:
                level = ServerLevel(
                    have.queued + level.queued,
                    have.in_flight + level.in_flight,
                    summed_requests(have.adapters, level.adapters),
                )
            total[url] = level
    return total
