"""Selection for a request about a stored response: only the server that has it can answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_router.errors import Refused
from vllm_router.fleet.candidates import choose
from vllm_router.proxy.retry import ANSWERED, Outcome
from vllm_router.proxy.selection import Selection

if TYPE_CHECKING:
    from vllm_router.fleet.fleet import Fleet
    from vllm_router.fleet.server import Server
    from vllm_router.proxy.record import Record
    from vllm_router.proxy.request import Request


class OwnerSelection(Selection):
    """The one server of a request that needs a stored response.

    The server is used as the only server of a model would be: also while it is ejected or full.
    `new_work` is False for a request that only reads, cancels or deletes the response: a server
    that drains serves those, too.
    """

    __slots__ = ("_new_work", "owner")

    def __init__(
        self, fleet: Fleet, request: Request, record: Record, owner: Server, *, new_work: bool
    ) -> None:
        super().__init__(fleet, request, record)
        self.owner = owner
        self._new_work = new_work

    def servers(self, now: float, tried: Sequence[Server]) -> tuple[Server, ...]:
        """The owner, unless it is down or was tried."""
        owner = self.owner
        if not self._new_work and owner.draining and owner.active_health.up:
            return () if owner in tried else (owner,)
        return choose((owner,), None, now, tried)

    def unfit(self, now: float) -> frozenset[Server]:
        return frozenset()

    def among(self, servers: frozenset[Server]) -> frozenset[Server]:
        return frozenset({self.owner})

    def judge(
        self,
        tried: Sequence[Server],
        now: float,
        status: int,
        content_type: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | None,
        *,
        client_key: bool,
    ) -> Outcome:
        """No other server can answer: what this one says is the client's, unless it redirects."""
        outcome = super().judge(
            tried, now, status, content_type, headers, body, client_key=client_key
        )
        return outcome if outcome is Outcome.MISDIRECTED else ANSWERED

    def unavailable(self, now: float) -> Refused:
        """The refusal while the server can take no request."""
        name, why = self.owner.name, self.owner.current_state(now)
        what = "is draining" if self.owner.draining else f"is not available ({why[0]})"
        return Refused(
            503,
            "response_unavailable",
            f"The server {name}, which has the stored response, {what}. No other server has it.",
            retry_after=self._fleet.retry_after(None, now),
        )
