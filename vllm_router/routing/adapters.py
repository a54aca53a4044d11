"""LoRA adapters: which ones a server has loaded, and what it costs to load one.

vLLM keeps `max_loras` adapters in GPU memory, least recently used out first. A request for another
one waits until it is loaded, and until no running request needs the one that it replaces.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TypeAlias

from vllm_router.fleet.engine_metrics import MAX_ADAPTERS

Levels: TypeAlias = list[tuple[float, int]]
"""The cached tokens of a prompt, by server: pairs (tokens, bits of the servers that have them), the
most tokens first. A server counts by the first pair that has its bit."""

UNKNOWN_SLOTS = 4
"""Adapters that a server keeps if it does not say. vLLM's default is 1, but it says so."""

PRIOR_WEIGHT = 20.0
"""Weight, in first tokens seen, of the assumed cost."""

WAIT_PENALTY = 512.0
"""Requests added to the load of a server on which a request would wait for a slot: until none of
the running requests needs one of its adapters. With steady traffic that never happens."""

EWMA_WEIGHT = 0.05
MIN_COST, MAX_COST = 500.0, 32_000.0
TOKEN_SECONDS = 5e-5
"""Seconds per prompt token before the first one is known: an 8B model on an 80 GB card."""

MEASURED_FROM = 500.0
"""Uncached tokens from which on a first token shows how long one token takes to compute."""


class AdapterServers:
    """The servers that have an adapter loaded, and those with a slot left, as bits.

    A pick finds the servers of an adapter here without a look at the others.
    """

    __slots__ = ("_awaited", "_full", "_holders", "_loaded", "_spare")

    def __init__(self) -> None:
        self._full = self._awaited = self._spare = 0
        self._loaded: dict[str, int] = {}
        self._holders: dict[str, dict[int, LoadedAdapters]] = {}

    def add(self, name: str, server: LoadedAdapters) -> None:
        """The server has loaded the adapter."""
        self._loaded[name] = self._loaded.get(name, 0) | server.bit
        self._holders.setdefault(name, {})[server.bit] = server

    def remove(self, name: str, server: LoadedAdapters) -> None:
        """The server has it no more."""
        holders = self._holders[name]
        del holders[server.bit]
        self._loaded[name] ^= server.bit
        if not holders:
            del self._holders[name], self._loaded[name]

    def count(self, server: LoadedAdapters) -> None:
        """Slots of the server have become free or needed."""
        bit = server.bit
        self._full = self._full | bit if server.is_full else self._full & ~bit
        self._awaited = self._awaited | bit if server.is_awaited else self._awaited & ~bit

    def count_spare(self, server: LoadedAdapters, *, spare: bool) -> None:
        """Whether the server has a slot without an adapter has changed."""
        self._spare = self._spare | server.bit if spare else self._spare & ~server.bit

    def spare_for(self, adapter: str, candidates: int) -> int:
        """The bits of the candidates that load the adapter without an eviction, or have it.

        0 if that makes no difference between the candidates without it.
        """
        loaded = self._loaded.get(adapter, 0) & candidates
        spare = self._spare & candidates & ~loaded
        return spare | loaded if spare and spare | loaded != candidates else 0

    def slots_for(self, adapter: str, candidates: int) -> tuple[int, int]:
        """The bits of the candidates that have it loaded, and of those without a slot for it.

        On the latter all slots are needed by others. While requests wait for a slot anywhere, an
        adapter needs only one: the others, which it could do without, get free when their requests
        have ended. It keeps the one with the most requests, of servers on which no request waits
        if it can.
        """
        loaded = self._loaded.get(adapter, 0) & candidates
        missing = self._full & candidates & ~loaded
        if loaded & loaded - 1 and self._awaited & candidates:
            missing |= loaded & ~self._kept(adapter, loaded)
        return loaded, missing

    def _kept(self, adapter: str, loaded: int) -> int:
        """The bit of the server that keeps the adapter."""
        pool = loaded & ~self._awaited or loaded
        holders = self._holders[adapter].items()
        return max([(one.requests(adapter), bit) for bit, one in holders if bit & pool])[1]


class LoadedAdapters:
    """The adapters that a server has probably loaded, and which of them it needs.

    A slot whose adapter has running requests cannot be taken: requests for another adapter wait.
    """

    __slots__ = (
        "_elsewhere", "_is_spare", "_reported", "_servers", "_slots", "_stuck", "_waiting", "bit",
        "is_awaited", "is_full", "running",
    )  # fmt: skip

    def __init__(self, bit: int = 1, servers: AdapterServers | None = None) -> None:
        """`servers` has the adapters of all servers; `bit` is this server there."""
        self.bit = bit
        self.running: OrderedDict[str, int] = OrderedDict()
        """Our running requests for each loaded adapter, the least recently used first."""
        self.is_full = self.is_awaited = False
        """Whether every slot is needed, and whether requests wait for one."""
        self._servers = AdapterServers() if servers is None else servers
        self._slots = UNKNOWN_SLOTS
        self._reported: set[str] = set()
        """Adapters with running requests, other routers' too, by the last scrape."""
        self._stuck: set[str] = set()
        """Adapters with requests of which none runs, by the last scrape."""
        self._elsewhere: Mapping[str, int] = {}
        """Requests of other processes by adapter, as far as they have announced them."""
        self._waiting: dict[str, int] = {}
        """Our requests for adapters that wait for a slot, in their order."""
        self._is_spare = False
        self._note_spare()

    def __contains__(self, name: str) -> bool:
        return name in self.running

    @property
    def slots(self) -> int:
        return self._slots

    @slots.setter
    def slots(self, count: int) -> None:
        if count != self._slots:
            self._slots = count
            self._note_spare()
            self._count()

    @property
    def own(self) -> dict[str, int]:
        """Our running requests by adapter."""
        return {name: count for name, count in self.running.items() if count}

    def requests(self, name: str) -> int:
        """Running requests of all processes for a loaded adapter."""
        return self.running[name] + self._elsewhere.get(name, 0)

    def report(self, running: Collection[str], waiting: Collection[str] = ()) -> None:
        """The server says which adapters have requests that run, and which ones that wait.

        It knows better than we do which adapter got a slot.
        """
        self._reported = set(running)
        self._stuck = set(waiting) - self._reported
        for name in self._stuck & self.running.keys():
            count = self.running.pop(name)
            self._servers.remove(name, self)
            if count:
                self._waiting[name] = count
        self._note_spare()
        for name in running:
            self._load(name, self._waiting.pop(name, 0))
        self._count()

    def set_elsewhere(self, requests: Mapping[str, int]) -> None:
        """Replace the requests of other processes."""
        if requests != self._elsewhere:
            # Until the next scrape names them again.
            self._reported -= self._elsewhere.keys() - requests.keys() - self.own.keys()
            self._elsewhere = requests
            for name in requests:
                if name not in self._waiting and name not in self._stuck:
                    self._load(name, 0)
            self._count()

    def begin(self, name: str) -> bool:
        """A request for this adapter was sent to the server. Returns False if it waits there."""
        if self.running.get(name):
            self._load(name, 1)
            return True
        if name in self.running or not self.is_full:
            self._load(name, 1)
            self._count()
            return True
        self._waiting[name] = self._waiting.get(name, 0) + 1
        self.is_awaited = True
        self._servers.count(self)
        return False

    def end(self, name: str) -> None:
        """Such a request has ended; unknown ones, of an earlier process, change nothing."""
        if self.running.get(name):
            self.running[name] -= 1
            if self.running[name]:
                return
            self._reported.discard(name)  # until the next scrape names it again
        elif name in self._waiting:
            self._waiting[name] -= 1
            if self._waiting[name]:
                return
            del self._waiting[name]
            self._stuck.discard(name)
        self._count()

    def clear(self) -> None:
        """The server's process is new."""
        for name in self.running:
            self._servers.remove(name, self)
        self.running.clear()
        self._note_spare()
        self._waiting.clear()
        self._reported.clear()
        self._stuck.clear()
        self._count()

    def leave(self) -> None:
        """The server has left the fleet; requests may still run there.

        Its bit may stand for another server next.
        """
        self._elsewhere = {}
        self.clear()
        self._servers.count_spare(self, spare=False)
        self._servers = AdapterServers()

    def _count(self) -> None:
        """Slots or requests have changed: requests that waited may run."""
        needed = {name for name, count in self.running.items() if count} | self._reported
        if self._elsewhere:
            needed |= self._elsewhere.keys() - self._stuck
        while self._waiting:
            name = next(iter(self._waiting))
            if len(needed - {name}) >= self._slots:
                break
            self._load(name, self._waiting.pop(name))
            self._stuck.discard(name)
            needed.add(name)
        is_full = len(needed) >= self._slots
        is_awaited = bool(self._waiting) or len(needed | self._stuck) > self._slots
        if is_full is not self.is_full or is_awaited is not self.is_awaited:
            self.is_full, self.is_awaited = is_full, is_awaited
            self._servers.count(self)

    def _note_spare(self) -> None:
        """The number of loaded adapters, or of slots, has changed."""
        is_spare = len(self.running) < self._slots
        if is_spare is not self._is_spare:
            self._is_spare = is_spare
            self._servers.count_spare(self, spare=is_spare)

    def _load(self, name: str, requests: int) -> None:
        running = self.running
        if name not in running:
            running[name] = requests
            self._servers.add(name, self)
        else:
            running[name] += requests
            running.move_to_end(name)
        surplus = len(running) - self._slots
        if surplus > 0:
            idle = [one for one, count in running.items() if not count]
            needed = self._reported | self._elsewhere.keys()
            idle.sort(key=needed.__contains__)  # the ones without any requests first
            for one in idle[:surplus]:
                del running[one]
                self._servers.remove(one, self)
        self._note_spare()


class SwapCost:
    """The cost of loading an adapter, in prompt tokens that could be computed meanwhile.

    Learnt from the times to first tokens with and without it; `prior` is assumed at first.
    """

    __slots__ = ("_loaded", "_per_token", "_seen", "_swapped", "prior")

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self._per_token = self._loaded = self._swapped = 0.0
        self._seen = 0.0

    def learn(self, seconds: float, tokens: float, *, adapter: bool, swapped: bool) -> None:
        """A first token came after `seconds`, with so many uncached tokens before it."""
        if not swapped and tokens >= MEASURED_FROM:
            weight = EWMA_WEIGHT if self._per_token else 1.0
            self._per_token += weight * (seconds / tokens - self._per_token)
        if not adapter or not self._per_token:
            return
        rest = max(0.0, seconds - tokens * self._per_token)
        if swapped:
            most = MAX_COST * self._per_token
            self._seen += 1.0
            weight = max(EWMA_WEIGHT, 1.0 / self._seen)
            self._swapped += weight * (min(rest, most) - self._swapped)
        else:
            self._loaded += EWMA_WEIGHT * (rest - self._loaded)

    @property
    def per_token(self) -> float:
        """Seconds in which a server computes one token."""
        return self._per_token or TOKEN_SECONDS

    @property
    def tokens(self) -> float:
        """The cost in tokens."""
        if not self._seen or not self._per_token:
            return self.prior
        measured = max(0.0, self._swapped - self._loaded) / self._per_token
        share = self._seen / (self._seen + PRIOR_WEIGHT)
        return min(max(self.prior + share * (measured - self.prior), MIN_COST), MAX_COST)


def summed_requests(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The sum of two counts of requests by adapter; of at most MAX_ADAPTERS."""
    total = dict(one)
    for name, count in other.items():
        if name in total or len(total) < MAX_ADAPTERS:
            total[name] = total.get(name, 0) + count
    return total


def with_adapters(levels: Levels, loaded: int, cost: float) -> Levels:
    """The levels with `cost` tokens added for the `loaded` servers."""
    found, seen = [], 0
    for tokens, bits in levels:
        fresh = bits & ~seen  # a server counts with its highest level
        seen |= bits
        if fresh & loaded:
            found.append((tokens + cost, fresh & loaded))
        if fresh & ~loaded:
            found.append((tokens, fresh & ~loaded))
    if loaded & ~seen:
        found.append((cost, loaded & ~seen))
    found.sort(reverse=True)
    return found
