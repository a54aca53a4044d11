"""The prefix index of a policy: the table with bits for servers and bytes converted to tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import PolicySettings
from vllm_router.routing.prefix.table import ENTRY_BYTES, PrefixTable
from vllm_router.routing.prompt.blocks import BLOCK_ENDS, Prompt

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

BYTES_PER_TOKEN = 4.0
"""The initial estimate. English text has 4 to 4.5."""

UNKNOWN_KV_TOKENS = 500_000
"""Assumed KV cache size of a server that does not export it. An 8B model on an 80 GB card has
about 400 000."""

MAX_MODELS = 256
_EWMA_WEIGHT = 0.05


class PrefixIndex:
    """Assigns bits to servers, bounds the table, and learns the bytes per token of each model."""

    def __init__(self, settings: PolicySettings) -> None:
        self.table = PrefixTable(1, settings.prefix_expiry)
        self._max_entries = max(1, int(settings.prefix_memory_mb * 1e6 / ENTRY_BYTES))
        self._bits: dict[Server, int] = {}
        self._taken = 0
        """The bits of all servers."""
        self._restarts: dict[Server, int] = {}
        self._bytes_per_token: dict[str | None, float] = {}
        self._kv_share: dict[Server, float] = {}
        self._sweep_at = 0.0

    def bit(self, server: Server) -> int:
        """The bit that represents the server in the table."""
        bit = self._bits.get(server)
        if bit is None:
            bit = ~self._taken & (self._taken + 1)  # the lowest free bit
            self._taken |= bit
            self._bits[server] = bit
            self._restarts[server] = server.restarts
            self._share_entries()
        return bit

    def _share_entries(self) -> None:
        share = self._max_entries // max(1, len(self._bits))
        self.table.entries_per_server = max(1, share)

    def follow(self, servers: Iterable[Server], now: float) -> None:
        """Drop the entries of restarted servers and, periodically, expired entries."""
        for server in servers:
            bit = self.bit(server)
            if self._restarts[server] != server.restarts:
                self._restarts[server] = server.restarts
                self.table.forget(bit)
        if now >= self._sweep_at:
            self._sweep_at = now + self.table.expiry / 10
            self.table.sweep(now)

    def match(self, servers: Sequence[Server], prompt: Prompt) -> dict[Server, int]:
        """Cached bytes of the prompt by server, without servers that have none."""
        bits = [self.bit(server) for server in servers]
        found = self.table.match(prompt.block_hashes, sum(set(bits)))
        return {
            server: BLOCK_ENDS[count - 1]
            for server, bit in zip(servers, bits, strict=True)
            for count, holders in found
            if holders & bit
        }

    def matched_bytes(self, server: Server, prompt: Prompt) -> int:
        found = self.table.match(prompt.block_hashes, self.bit(server))
        return BLOCK_ENDS[found[0][0] - 1] if found else 0

    def insert(self, server: Server, prompt: Prompt, now: float) -> None:
        """The prompt was sent to the server, which caches it while its KV cache has room."""
        if prompt.block_hashes:
            self.insert_blocks(server, prompt.block_hashes, now)

    def insert_blocks(self, server: Server, hashes: Sequence[int], now: float) -> None:
        """The server computes these blocks of a prompt, in their order."""
        capacity = int(self.kv_tokens(server) * BYTES_PER_TOKEN)
        self.table.insert(hashes, self.bit(server), capacity, now)

    def blocks(self, most: int) -> Iterator[tuple[Server, list[int]]]:
        """All blocks of all servers, for `insert_blocks` of another index, `most` at a time."""
        for server, bit in list(self._bits.items()):
            known = self.table.blocks(bit)
            for start in range(0, len(known), most):
                # The index that takes them inserts the last one first.
                yield server, known[start : start + most][::-1]

    def kv_tokens(self, server: Server) -> float:
        """The size of the server's KV cache in tokens, corrected by reported hits (`judge`)."""
        metrics = server.load_estimate.metrics
        tokens = (metrics.kv_tokens if metrics is not None else None) or UNKNOWN_KV_TOKENS
        return tokens * self._kv_share.get(server, 1.0)

    def known_blocks(self, server: Server, prompt: Prompt) -> int:
        """The number of leading blocks of the prompt that the server has."""
        found = self.table.match(prompt.block_hashes, self.bit(server))
        return found[0][0] if found else 0

    def unlearn(self, server: Server, prompt: Prompt, known: int) -> None:
        """Undo `insert`: the server has not computed the prompt beyond the first `known` blocks."""
        self.remove_blocks(server, prompt.block_hashes[known:])

    def remove_blocks(self, server: Server, hashes: Sequence[int]) -> None:
        """The server does not have these blocks after all."""
        self.table.remove(hashes, self.bit(server))

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""
        bit = self._bits.pop(server, None)
        self._restarts.pop(server, None)
        self._kv_share.pop(server, None)
        if bit is not None:
            self._taken ^= bit
            self.table.forget(bit)
            self._share_entries()

    def judge(self, server: Server, expected: float, found: int) -> None:
        """Compare expected with reported cached tokens of a response.

        A server that finds less than half evicts earlier than assumed, as generated tokens use its
        KV cache, too: its part of the index shrinks by 2 %, down to a fifth, and regrows slowly.
        """
        share = self._kv_share.get(server, 1.0)
        share = share * 0.98 if found < 0.5 * expected else share * 1.002
        self._kv_share[server] = min(max(share, 0.2), 1.0)

    # -- tokens -------------------------------------------------------------------------------

    def tokens_per_byte(self, model: str | None, prompt: Prompt) -> float:
        if prompt.tokens is not None:
            return prompt.tokens / prompt.size
        return 1.0 / self._bytes_per_token.get(model, BYTES_PER_TOKEN)

    def learn(self, model: str | None, prompt: Prompt, tokens: int) -> None:
        """A response reported the number of tokens of this prompt."""
        if prompt.tokens is not None or tokens <= 0 or not prompt.block_hashes:
            return
        known = self._bytes_per_token
        if model not in known and len(known) >= MAX_MODELS:
            known.clear()
        seen = min(max(prompt.size / tokens, 0.5), 16.0)
        old = known.get(model, BYTES_PER_TOKEN)
        known[model] = old + _EWMA_WEIGHT * (seen - old)
