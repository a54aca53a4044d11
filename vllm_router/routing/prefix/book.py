"""The prefix table with what policies need around it: servers for bits, tokens for bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Knobs
from vllm_router.routing.prefix.table import ENTRY_BYTES, PrefixTable
from vllm_router.routing.prompt.pieces import ENDS, Prompt

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

BYTES_PER_TOKEN = 4.0
"""Until answers have told better. English text has 4 to 4.5."""

UNKNOWN_KV_TOKENS = 500_000
"""Size of a KV cache that is not exported: an 8B model on an 80 GB card has about 400 000."""

MAX_MODELS = 256
_LEARNING = 0.05


class PrefixBook:
    """Knows each server's bit, keeps the table's bounds, learns how many bytes a token has."""

    def __init__(self, knobs: Knobs) -> None:
        self.table = PrefixTable(1, knobs.prefix_expiry)
        self._entries = max(1, int(knobs.prefix_memory_mb * 1e6 / ENTRY_BYTES))
        self._bits: dict[Server, int] = {}
        self._restarts: dict[Server, int] = {}
        self._bytes_per_token: dict[str | None, float] = {}
        self._room: dict[Server, float] = {}
        self._sweep_at = 0.0

    def bit(self, server: Server) -> int:
        """The bit that stands for the server in masks."""
        bit = self._bits.get(server)
        if bit is None:
            taken = sum(self._bits.values())
            bit = ~taken & (taken + 1)  # the lowest that is free
            self._bits[server] = bit
            self._restarts[server] = server.restarts
            self.table.entries_per_server = max(1, self._entries // len(self._bits))
        return bit

    def follow(self, servers: Iterable[Server], now: float) -> None:
        """Forget what servers lost by restarting, and now and then what has expired."""
        for server in servers:
            bit = self.bit(server)
            if self._restarts[server] != server.restarts:
                self._restarts[server] = server.restarts
                self.table.forget(bit)
        if now >= self._sweep_at:
            self._sweep_at = now + self.table.expiry / 10
            self.table.sweep(now)

    def match(self, servers: Sequence[Server], prompt: Prompt) -> dict[Server, int]:
        """Bytes of the prompt that each server has, where it has any."""
        bits = [self.bit(server) for server in servers]
        found = self.table.match(prompt.chain, sum(set(bits)))
        return {
            server: ENDS[count - 1]
            for server, bit in zip(servers, bits, strict=True)
            for count, holders in found
            if holders & bit
        }

    def matched_bytes(self, server: Server, prompt: Prompt) -> int:
        found = self.table.match(prompt.chain, self.bit(server))
        return ENDS[found[0][0] - 1] if found else 0

    def insert(self, server: Server, prompt: Prompt, now: float) -> None:
        """The server is being sent the prompt; it will have it for as long as it has room."""
        if prompt.chain:
            metrics = server.metrics
            tokens = (metrics.kv_tokens if metrics is not None else None) or UNKNOWN_KV_TOKENS
            room = int(tokens * BYTES_PER_TOKEN * self._room.get(server, 1.0))
            self.table.insert(prompt.chain, self.bit(server), room, now)

    def known_pieces(self, server: Server, prompt: Prompt) -> int:
        """How many leading pieces of the prompt the server has."""
        found = self.table.match(prompt.chain, self.bit(server))
        return found[0][0] if found else 0

    def unlearn(self, server: Server, prompt: Prompt, known: int) -> None:
        """The server was sent the prompt and has not computed it: only `known` pieces are there."""
        self.table.remove(prompt.chain[known:], self.bit(server))

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""
        bit = self._bits.pop(server, None)
        self._restarts.pop(server, None)
        self._room.pop(server, None)
        if bit is not None:
            self.table.forget(bit)

    def judge(self, server: Server, expected: float, found: int) -> None:
        """An answer said how many of the tokens expected in its cache the server has found.

        A server that has forgotten what is on record has less room than it says, as generated
        tokens take some, too: the record shrinks by 2 %, down to a fifth, and grows back slowly.
        """
        room = self._room.get(server, 1.0)
        room = room * 0.98 if found < 0.5 * expected else room * 1.002
        self._room[server] = min(max(room, 0.2), 1.0)

    # -- tokens -------------------------------------------------------------------------------

    def tokens_per_byte(self, model: str | None, prompt: Prompt) -> float:
        if prompt.tokens is not None:
            return prompt.tokens / prompt.size
        return 1.0 / self._bytes_per_token.get(model, BYTES_PER_TOKEN)

    def learn(self, model: str | None, prompt: Prompt, tokens: int) -> None:
        """An answer said how many tokens this prompt had."""
        if prompt.tokens is not None or tokens <= 0 or not prompt.chain:
            return
        known = self._bytes_per_token
        if model not in known and len(known) >= MAX_MODELS:
            known.clear()
        seen = min(max(prompt.size / tokens, 0.5), 16.0)
        old = known.get(model, BYTES_PER_TOKEN)
        known[model] = old + _LEARNING * (seen - old)
