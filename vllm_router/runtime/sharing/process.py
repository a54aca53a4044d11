"""The announcements of one process to other processes, and theirs to it."""

from __future__ import annotations

from secrets import token_hex

import trio

from vllm_router.proxy.context import ProxyContext
from vllm_router.routing.sharing.messages import About, Batch, ServerLevel
from vllm_router.routing.sharing.outbox import Outbox
from vllm_router.routing.sharing.peers import Peers
from vllm_router.runtime.sharing.effects import ProcessEffects

NOT_SHOWN = About("", "", "", 0.0, 0)
"""The batches of a router's own processes; they are not shown as routers."""


class ProcessShare:
    """One process's outbox and peers, connected with its policies and its quarantine."""

    def __init__(self, context: ProxyContext, kind: str, effects: ProcessEffects) -> None:
        self.effects = effects
        self.outbox = Outbox(f"{kind}-{token_hex(8)}")
        self.peers = Peers(self.outbox.router, context.policies, context.fleet.by_url, effects)
        self._context = context
        self._had_levels = False
        context.policies.tell(self.outbox)
        context.quarantine.on_new = self.outbox.quarantined

    def settle(self, now: float) -> None:
        """Apply the levels of the others, and what was spent before this process listened."""
        self.peers.settle(now)
        self.effects.settle_past()

    def queued(self) -> dict[str, ServerLevel]:
        """The prompt tokens of this process that wait on servers, by URL."""
        queued = self._context.policies.queued_tokens()
        return {server.url: ServerLevel(round(tokens), 0) for server, tokens in queued.items()}

    def due(self) -> Batch | None:
        """The batch of this period for the router's other processes; None if it would be empty."""
        now = trio.current_time()
        self.settle(now)
        levels = self.queued()
        if not (levels or self._had_levels or self.outbox.waiting):
            return None
        self._had_levels = bool(levels)
        return self.outbox.batch(NOT_SHOWN, levels, {}, now)
