"""The announcements of one process to other processes, and theirs to it."""

from __future__ import annotations

from secrets import token_hex

import trio

from vllm_router.proxy.context import ProxyContext
from vllm_router.routing.sharing.messages import About, Batch, ServerLevel, announced
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

    def levels(self) -> dict[str, ServerLevel]:
        """The uncached prompt tokens and the adapters' requests of this process, by URL."""
        policies = self._context.policies
        queued, adapters = policies.queued_tokens(), policies.adapter_requests()
        return {
            server.url: ServerLevel(
                round(queued.get(server, 0.0)), 0, announced(adapters.get(server, {}))
            )
            for server in {**queued, **adapters}
        }

    def due(self) -> Batch | None:
        """The batch of this period for the router's other processes; None if it would be empty."""
        now = trio.current_time()
        self.settle(now)
        levels = self.levels()
        if not (levels or self._had_levels or self.outbox.waiting):
            return None
        self._had_levels = bool(levels)
        return self.outbox.batch(NOT_SHOWN, levels, {}, now)
