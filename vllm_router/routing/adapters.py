"""LoRA adapters: which ones a server has loaded, and what it costs to load one.

vLLM keeps `max_loras` adapters in GPU memory, least recently used out first. A request for another
one waits until it is loaded, and until no running request needs the one that it replaces.
"""

from __future__ import annotations

from collections import OrderedDict

UNKNOWN_SLOTS = 4
"""Adapters that a server keeps if it does not say. vLLM's default is 1, but it says so."""

PRIOR_WEIGHT = 20.0
"""Weight, in first tokens seen, of the assumed cost."""

EWMA_WEIGHT = 0.05
MIN_COST, MAX_COST = 500.0, 32_000.0
TOKEN_SECONDS = 5e-5
"""Seconds per prompt token before the first one is known: an 8B model on an 80 GB card."""

MEASURED_FROM = 500.0
"""Uncached tokens from which on a first token shows how long one token takes to compute."""


class LoadedAdapters:
    """The adapters that a server has probably loaded, the least recently used first."""

    __slots__ = ("_used", "slots")

    def __init__(self) -> None:
        self.slots = UNKNOWN_SLOTS
        self._used: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._used

    def use(self, name: str) -> None:
        """A request for this adapter was sent to the server, or runs there."""
        self._used[name] = None
        self._used.move_to_end(name)
        while len(self._used) > self.slots:
            self._used.popitem(last=False)

    def clear(self) -> None:
        """The server's process is new."""
        self._used.clear()


class SwapCost:
    """What loading an adapter costs, in prompt tokens that could be computed meanwhile.

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


def with_adapters(
    levels: list[tuple[float, int]], loaded: int, cost: float
) -> list[tuple[float, int]]:
    """Levels (cached tokens, bits of servers), the most first.

    `cost` tokens are added for the `loaded` servers.
    """
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
