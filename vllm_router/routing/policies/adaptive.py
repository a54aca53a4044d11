"""Load, prompt tokens to be computed, and what each server has cached, in one score.

    score = slow × (1 + load + (2 × queued + waste × (1 + K × load)) / T) / share

The lowest wins, equals at random. docs/routing.md explains every term with an example; with
nothing cached, nothing queued and equal speed it is the order of `least_load`. What changes with
each request is kept up to date as it happens, for the servers it happens to; what changes with
time (slowness, phantoms, slow start) is brought up to date at most every REFRESH seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.accounts import (
    PHANTOMS,
    Account,
    Booking,
    PrefixStatistics,
    keep_queued,
    middle_latency,
    middle_load,
    slowness,
)
from vllm_router.routing.hashing import seed_of
from vllm_router.routing.policies.base import Explained, Knobs, Policy
from vllm_router.routing.prefix.book import PrefixBook
from vllm_router.routing.prompt.pieces import ENDS, pieces_in
from vllm_router.routing.scoreboard import HOME_BONUS, QUEUED_WEIGHT, Scoreboard

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.prompt.facts import Facts

REFRESH = 0.1
MAX_BOARDS = 256

PACE = 0.05
"""How fast the mean time to the first token follows."""

NO_CREDIT_PHANTOMS = 2.0
NO_CREDIT_SLOW = 2.0
"""What a server has cached does not count while it fails or is so much slower than the fleet."""

OTHERS_RATIO = 1.3
"""Gauges this much above our own leases mean that other routers send to the same servers."""

HOME_TOKENS = 256.0
"""A shared beginning shorter than this is worth no home."""


class Adaptive(Policy):
    """The recommended policy; the text at the top of its module says what it does."""

    name = "adaptive"
    needs_prompt = True
    needs_session = True

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, knobs)
        self.book = PrefixBook(knobs)
        self._accounts: dict[Server, Account] = {}
        self._boards: dict[str | None, Scoreboard] = {}
        self._first_token = 0.0
        """Seconds to the first token of a stream, on average over all servers."""
        self._matched: tuple[tuple[int, ...], list[tuple[int, int]]] = (), []
        """What the last pick has found on record, for the lease that follows it."""

    # -- the decision -------------------------------------------------------------------------

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        board = self._board(candidates, facts.model, now)
        scores = board.bases
        chain = facts.prompt.chain
        if chain or board.home:
            found = self.book.table.match(chain, board.everyone)
            self._matched = chain, found
            levels, bonus = self._known(board, facts, found)
            if levels or bonus:
                scores = board.scores(levels, bonus)
        lowest = min(scores)
        if scores.count(lowest) == 1:
            return candidates[scores.index(lowest)]
        return self.rng.choice(
            [server for server, score in zip(candidates, scores, strict=True) if score == lowest]
        )

    def _known(
        self, board: Scoreboard, facts: Facts, found: list[tuple[int, int]]
    ) -> tuple[list[tuple[float, int]], int]:
        """Who has how many tokens of the prompt cached, the most first, as far as that counts.

        `found` is what is on record. With it the bit of the server that is home to a conversation
        that begins here, or 0.
        """
        levels: list[tuple[float, int]] = []
        if found:
            per_byte = self.book.tokens_per_byte(facts.model, facts.prompt)
            credited = board.credited
            levels = [
                (ENDS[count - 1] * per_byte, holders & credited)
                for count, holders in found
                if holders & credited
            ]
        bonus = 0
        if board.home and facts.prompt.conversation:
            bonus = self._credit_homes(board, facts, levels)
        return board.not_overloaded(levels) if levels else levels, bonus

    # -- several routers before the same servers ----------------------------------------------

    def _credit_homes(
        self, board: Scoreboard, facts: Facts, levels: list[tuple[float, int]]
    ) -> int:
        """Servers that other routers probably sent this conversation to are taken to have it.

        All routers agree on the home of a conversation and of a shared beginning. Changes
        `levels`; returns the bit of the server on which a new conversation should begin, or 0.
        """
        prompt = facts.prompt
        per_byte = self.book.tokens_per_byte(facts.model, prompt)
        known = levels[0][0] if levels else 0.0
        shared = prompt.shared * per_byte
        bonus = 0
        homes: list[tuple[float, int]] = []
        if known <= shared:
            if facts.session is not None:
                home = board.home_of(seed_of(facts.session))
            else:
                home = board.home_of(prompt.conversation)
            if prompt.earlier:
                homes.append((prompt.earlier * per_byte, home.bit))
            elif home.bit & board.credited and home.server.ramp >= 1.0:
                # A score below 0 would be the lower, the slower or the newer the server is.
                bonus = home.bit
        pieces = pieces_in(prompt.shared)
        if shared >= HOME_TOKENS and pieces:
            homes.append((shared, board.home_of(prompt.chain[pieces - 1]).bit))
        levels += [credit for credit in homes if credit[1] & board.credited]
        levels.sort(reverse=True)
        return bonus

    # -- what is known of the candidates ------------------------------------------------------

    def _board(self, candidates: Sequence[Server], model: str | None, now: float) -> Scoreboard:
        board = self._boards.get(model)
        if board is None or board.candidates is not candidates:
            accounts = [self._account(server) for server in candidates]
            board = Scoreboard(candidates, accounts, self.knobs)
            if len(self._boards) >= MAX_BOARDS:
                self._boards.clear()
            self._boards[model] = board
        if now >= board.fresh_until:
            self._refresh(board, now)
        else:
            board.follow()
        return board

    def _account(self, server: Server) -> Account:
        account = self._accounts.get(server)
        if account is None:
            account = self._accounts[server] = Account(server, self.book.bit(server))
        return account

    def _refresh(self, board: Scoreboard, now: float) -> None:
        """Bring up to date what changes with time. O(candidates), at most every REFRESH."""
        accounts = board.accounts
        self.book.follow(board.candidates, now)
        for account in accounts:
            account.follow_scrape()
            account.settle(now)
        self._look_for_others(board)
        middle, usual = middle_latency(accounts), middle_load(accounts)
        board.credited = 0
        board.factors, board.slow = [], []
        for account in accounts:
            server = account.server
            phantoms = account.phantoms_now(now)
            account.extra = phantoms + board.others * account.sent
            slow = slowness(account, middle, usual, now)
            if phantoms < NO_CREDIT_PHANTOMS and slow < NO_CREDIT_SLOW and account.trusted:
                board.credited |= account.bit
            share = server.share * server.ramp
            board.slow.append(slow)
            board.factors.append(slow / share)
        board.fresh_until = now + REFRESH
        board.measure_all()

    @staticmethod
    def _look_for_others(board: Scoreboard) -> None:
        accounts = board.accounts
        there = sum(account.gauge for account in accounts)
        mine = sum(account.mine for account in accounts)
        # At least a request per server: a gauge lags, and short requests make much of that.
        board.home = there > OTHERS_RATIO * mine and there - mine >= len(accounts)
        board.others = 0.0
        if board.home:
            board.others = 0.5 * min(max(there / max(mine, 0.1) - 1.0, 0.0), 8.0)

    # -- what happens to requests -------------------------------------------------------------

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        server, prompt = lease.server, facts.prompt
        account = self._account(server)
        per_byte = self.book.tokens_per_byte(facts.model, prompt)
        cached, pieces = 0.0, 0
        chain = prompt.chain
        if chain:
            known, found = self._matched
            if known is not chain:
                found = self.book.table.match(chain, account.bit)
            self._matched = (), []
            for count, holders in found:
                if holders & account.bit:
                    cached, pieces = ENDS[count - 1] * per_byte, count
                    break
        tokens = max(0.0, prompt.size * per_byte - cached)
        lease.booking = booking = Booking(account, facts.model, prompt, tokens, cached, pieces)
        account.expected_total += cached
        account.prompt_total += tokens + cached
        account.sent += 1
        board = self._boards.get(facts.model)
        if board is not None and board.others:
            account.extra += board.others
        if not facts.stream:
            account.settle(now)  # nobody else may: where there is no choice, no pick looks
            account.due.append((now + account.first_token, booking))
        self.book.insert(server, prompt, now)

    def first_byte(self, lease: Lease) -> None:
        booking = lease.booking
        if isinstance(booking, Booking):
            booking.begun()
            took = lease.last_byte_at - lease.taken_at
            self._first_token += (PACE if self._first_token else 1.0) * (took - self._first_token)

    def learned(self, lease: Lease, prompt_tokens: int, cached_tokens: int | None) -> None:
        booking = lease.booking
        if not isinstance(booking, Booking):
            return
        prompt = booking.prompt
        self.book.learn(booking.model, prompt, prompt_tokens)
        if cached_tokens is None:
            return
        booking.account.told_total += cached_tokens
        if booking.cached >= HOME_TOKENS:
            self.book.judge(lease.server, booking.cached, cached_tokens)

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        booking = lease.booking
        if not isinstance(booking, Booking):
            return
        if refused:
            booking.cached = 0.0  # the engine has not looked for it
            self.book.unlearn(lease.server, booking.prompt, booking.known)
            keep_queued(booking, self._first_token, now, lease.taken_at)
        booking.begun()
        lease.booking = None
        if failed:
            account = booking.account
            account.phantoms = account.phantoms_now(now) + PHANTOMS
            account.phantoms_at = now
            account.extra += PHANTOMS
            for board in self._boards.values():
                board.fresh_until = -math.inf

    def forget(self, server: Server) -> None:
        self._accounts.pop(server, None)
        self._boards.clear()
        self.book.forget(server)

    # -- to be seen ---------------------------------------------------------------------------

    def statistics(self, server: Server) -> PrefixStatistics | None:
        account = self._accounts.get(server)
        if account is None:
            return None
        return PrefixStatistics(
            round(account.prompt_total),
            round(account.expected_total),
            account.told_total,
            self.book.table.held(account.bit),
        )

    def formula(self) -> str:
        queued, knobs = QUEUED_WEIGHT, self.knobs
        return (
            f"score = slow × (1 + load - home + ({queued:g} × queued tokens + waste tokens × "
            f"(1 + {knobs.waste_growth:g} × load)) / {knobs.tokens_per_request:g}) / "
            "(share × slow start); load = running + 0.5 × waiting + phantoms + others + fast errors"
        )

    def explain(self, candidates: Sequence[Server], facts: Facts, now: float) -> list[Explained]:
        board = self._board(candidates, facts.model, now)
        found = self.book.table.match(facts.prompt.chain, board.everyone)
        levels, bonus = self._known(board, facts, found)
        scores = board.scores(levels, bonus)
        best = levels[0][0] if levels else 0.0
        rows = []
        for place, (account, score) in enumerate(zip(board.accounts, scores, strict=True)):
            server = account.server
            cached = next((tokens for tokens, bits in levels if bits & account.bit), 0.0)
            phantoms = account.phantoms_now(now)
            parts = {
                "load": server.work + account.extra,
                "phantoms": phantoms,
                "others": account.extra - phantoms,
                "queued_tokens": account.queued,
                "cached_tokens": cached,
                "waste_tokens": best - cached,
                "home": HOME_BONUS if account.bit == bonus else 0.0,
                "slow": board.slow[place],
                "fast_errors": server.ghosts,
                "slow_start": server.ramp,
                "share": server.share,
            }
            rows.append(Explained(server, score, parts))
        return sorted(rows, key=lambda row: row.score)
