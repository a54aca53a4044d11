"""The candidates for a model, and the parts of their scores, kept as they change.

A request changes the load of one or two servers, so nothing is computed anew for all the others:
servers note in their fleet's journal when they change, and a scoreboard reads what is new in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.accounts import Account
from vllm_router.routing.hashing import draw

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.policies.base import Knobs

MAX_HOMES = 4096

QUEUED_WEIGHT = 2.0
"""A prompt token in the queue counts so many times: it delays the request that is placed now, and
by the length of the engine's steps everything that is being generated there."""

HOT_SHARE, HOT_ROOM, HOT_REQUESTS = 1.5, 0.25, 2.0
"""What a server has cached does not count while its load is more than 1.5 times the mean of the
candidates plus a quarter of its share, unless it has but two requests."""

HOME_BONUS = 2.0


class Scoreboard:
    """`candidates` in their order; `accounts`, `factors` (slowness over share), `slow` and
    `bases` (their scores but for what they would have to compute again) have one item for each.

    `credited` are the bits of those whose cached prefixes count. `others` is how much more than
    we sent since the scrape others probably sent, and `home` whether there are others at all.
    """

    __slots__ = (
        "_growth",
        "_growths",
        "_homes",
        "_journal",
        "_loads",
        "_per_queued",
        "_per_request",
        "_place_of_bit",
        "_places",
        "_read",
        "accounts",
        "bases",
        "candidates",
        "credited",
        "everyone",
        "factors",
        "fresh_until",
        "home",
        "others",
        "slow",
    )  # fmt: skip

    def __init__(self, candidates: Sequence[Server], accounts: list[Account], knobs: Knobs) -> None:
        self.candidates = candidates
        self.accounts = accounts
        self.bases = [0.0] * len(accounts)
        self.factors: list[float] = []
        self.slow: list[float] = []
        self.credited = 0
        self.everyone = sum(account.bit for account in accounts)
        self.fresh_until = -math.inf
        self.others = 0.0
        self.home = False
        self._homes: dict[int, Account] = {}
        self._per_request = 1.0 / knobs.tokens_per_request
        self._per_queued = QUEUED_WEIGHT * self._per_request
        self._growth = knobs.waste_growth
        self._growths = [0.0] * len(accounts)
        """By how much a score grows with each token that is to be computed again."""
        self._loads = [0.0] * len(accounts)
        self._places = {server: place for place, server in enumerate(candidates)}
        self._place_of_bit = {account.bit: place for place, account in enumerate(accounts)}
        self._journal = candidates[0].journal.servers
        self._read = 0

    def follow(self) -> None:
        """Bring the scores of those up to date that have changed since; a pick's first step."""
        journal = self.candidates[0].journal.servers
        if journal is not self._journal:
            self.measure_all()
            return
        read = self._read
        if read != len(journal):
            self._read = len(journal)
            places = self._places
            for server in set(journal[read:]):
                place = places.get(server)
                if place is not None:
                    self._measure(place)

    def measure_all(self) -> None:
        """The same for all: others' changes were missed, or `factors` are new."""
        self._journal = self.candidates[0].journal.servers
        self._read = len(self._journal)
        for place in range(len(self.accounts)):
            self._measure(place)

    def _measure(self, place: int) -> None:
        account, factor = self.accounts[place], self.factors[place]
        server = account.server
        load = server.work + account.extra
        self.bases[place] = factor * (1.0 + load + account.queued * self._per_queued)
        self._growths[place] = factor * (1.0 + self._growth * load) * self._per_request
        self._loads[place] = server.load

    def scores(self, levels: list[tuple[float, int]], bonus: int) -> list[float]:
        """One per candidate. `levels`: who has how many tokens of the prompt cached, the most
        first; `bonus`: the bit of the server that is home to a new conversation, or 0.
        """
        bases, growths, place_of = self.bases, self._growths, self._place_of_bit
        scores = bases
        if levels:
            best = levels[0][0]
            usual, rest = 0.0, levels
            tokens, holders = levels[-1]
            if 2 * holders.bit_count() > len(bases):
                usual, rest = tokens, levels[:-1]
                others = self.everyone
                for _, bits in levels:
                    others &= ~bits
                if others:
                    rest.append((0.0, others))
            # What most have is taken for all, and then put right for the others one by one.
            waste = best - usual
            if waste:
                scores = [b + waste * g for b, g in zip(bases, growths, strict=True)]
            else:
                scores = bases.copy()
            for tokens, bits in reversed(rest):  # the most last: some are in two levels
                waste = best - tokens
                while bits:
                    bit = bits & -bits
                    bits ^= bit
                    place = place_of[bit]
                    scores[place] = bases[place] + waste * growths[place]
        if bonus:
            scores = scores.copy()
            place = place_of[bonus]
            scores[place] -= self.factors[place] * HOME_BONUS
        return scores

    def not_overloaded(self, levels: list[tuple[float, int]]) -> list[tuple[float, int]]:
        """Without the servers that have much more to do than the mean: a hot prefix spreads."""
        loads = self._loads
        limit = HOT_SHARE * sum(loads) / len(loads) + HOT_ROOM
        if max(loads) <= limit:
            return levels
        out = 0
        for account, load in zip(self.accounts, loads, strict=True):
            if load > limit and load * account.server.share > HOT_REQUESTS:
                out |= account.bit
        return [(tokens, holders & ~out) for tokens, holders in levels if holders & ~out]

    def home_of(self, key: int) -> Account:
        """Rendezvous hashing, in proportion to capacity. Remembered: it costs 0.6 µs per server."""
        home = self._homes.get(key)
        if home is None:
            if len(self._homes) >= MAX_HOMES:
                self._homes.clear()
            home = self._homes[key] = min(
                self.accounts,
                key=lambda account: -math.log(draw(key, account.seed)) / account.server.share,
            )
        return home
