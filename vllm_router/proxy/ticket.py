"""An exchange as the admission queue sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vllm_router.errors import Refused
from vllm_router.fleet.server import Server
from vllm_router.proxy.attempt_history import AttemptHistory
from vllm_router.proxy.client_head import ClientHead
from vllm_router.routing.policies import Policy
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.queue.entry import Route

_PRIORITY = re.compile(rb"[+-]?[0-9]{1,18}")


class ExchangeTicket:
    """Implements `waiter.Ticket` for an exchange. Made for an attempt, where limits are set."""

    __slots__ = ("_attempts", "_head")

    def __init__(self, attempts: AttemptHistory, head: ClientHead) -> None:
        self._attempts = attempts
        self._head = head

    @property
    def policy(self) -> Policy:
        return self._attempts.request.policy

    @property
    def info(self) -> RoutingInfo:
        return self._attempts.request.info

    @property
    def priority(self) -> int:
        """As in vLLM the header has precedence over the body."""
        given = self._head.fields.get(b"x-vllm-priority", b"")
        return int(given) if _PRIORITY.fullmatch(given) else self.info.priority

    @property
    def key(self) -> str:
        return self._attempts.record.key_name

    @property
    def public_model(self) -> str | None:
        record, candidates = self._attempts.record, self._attempts.candidates
        return record.model if candidates.falls_back else None

    @property
    def deadline(self) -> float:
        return self._attempts.deadline

    @property
    def returning(self) -> bool:
        return self._attempts.record.attempts > 0

    def candidates(self, now: float) -> Sequence[Server]:
        return self._attempts.candidates.find(now)

    def route(self, serving: Callable[[str | None], frozenset[Server]], now: float) -> Route:
        return self._attempts.candidates.route(serving, now)

    def rejection(self, now: float) -> Refused | None:
        return self._attempts.quarantined(now)

    def no_server(self) -> Refused:
        return self._attempts.candidates.no_server()

    def waited(self, seconds: float) -> None:
        self._attempts.record.waited += seconds
