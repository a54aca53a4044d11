"""Selection of servers for one exchange where servers differ in the requests they accept.

Made only for an exchange that needs it: a server has refused it, or the fleet has servers that do
not accept every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vllm_router.fleet.refusals import MODEL, RequestKind
from vllm_router.proxy.headers import is_packed
from vllm_router.proxy.quarantine import fingerprint
from vllm_router.proxy.retry import ANSWERED, Outcome
from vllm_router.proxy.status_rules import ITS_ANSWER, Judgement, Scope, judge_answer
from vllm_router.routing.prompt.lengths import sure_tokens

if TYPE_CHECKING:
    from vllm_router.fleet.fleet import Fleet
    from vllm_router.fleet.server import Server
    from vllm_router.proxy.record import Record
    from vllm_router.proxy.request import Request

LONGEST_PATH = 200
"""Characters of a path that distinguish refusals."""


class _Refused(NamedTuple):
    """A refusal of the request by a server; see `Fleet.accepted_elsewhere`."""

    server: Server
    name: str
    size: int
    words: str
    body: int
    sure: bool


class Selection:
    """The servers for one exchange, by the refusals of it and of earlier requests."""

    __slots__ = (
        "_fleet",
        "_judgement",
        "_record",
        "_refused",
        "_request",
        "_tokens",
        "longer_than",
    )

    def __init__(self, fleet: Fleet, request: Request, record: Record) -> None:
        self._fleet = fleet
        self._request = request
        self._record = record
        self._judgement: Judgement = ITS_ANSWER
        self._refused: list[_Refused] = []
        self._tokens: int | None = None
        self.longer_than = 0
        """The longest context in tokens that has proved too short; 0 if none has."""

    def asked(self) -> RequestKind:
        """The properties of the request that servers accept or refuse."""
        path = self._record.path[:LONGEST_PATH].decode("latin-1")
        return RequestKind(path, self._request.info.model, self._record.bytes_in)

    def servers(self, now: float, tried: Sequence[Server]) -> tuple[Server, ...]:
        """The servers that may accept the request; see `Fleet.fitting`."""
        model, tokens = self._request.info.model, self._needed()
        return self._fleet.fitting(model, now, tried, self.asked(), tokens, self.longer_than)

    def unfit(self, now: float) -> frozenset[Server]:
        """The servers that are known to refuse such a request now."""
        asked, tokens = self.asked(), self._needed()
        servers = self._fleet.servers.values()
        return frozenset([s for s in servers if not s.fits(asked, now, tokens, self.longer_than)])

    def among(self, servers: frozenset[Server]) -> frozenset[Server]:
        """The servers among these that may ever take the request."""
        return servers

    def _needed(self) -> int:
        """The least tokens of context that the request needs; 0 if all servers have equal ones."""
        if self._tokens is None and self._fleet.lengths_differ:
            self._tokens = sure_tokens(self._request.body)
        return self._tokens or 0

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
        """Judge a response that is no result, of the last server tried.

        `body` is None if it has not arrived whole. A server that turns out not to have the model
        is no candidate for it any more. A context that is too short counts only if another server
        has a longer one.
        """
        server, model = tried[-1], self._request.info.model
        if is_packed(headers):
            body = None
        self._judgement = judgement = judge_answer(
            status, content_type, body, client_key=client_key, asked_model=model is not None
        )
        if judgement.outcome is Outcome.NO_MODEL and model is not None:
            if not server.serves(model):
                return ANSWERED
            self._fleet.unlist(server, model)
        elif judgement.outcome is Outcome.TOO_LONG:
            known = server.lengths.get(model, 0) if model is not None else 0
            length = known or judgement.length
            if not length:
                return ANSWERED
            self.longer_than = max(length, self.longer_than)
            if not self.servers(now, tried):
                return ANSWERED
        return judgement.outcome

    def note_refusal(self, server: Server, now: float) -> None:
        """Note a refusal: it is the server's fault if another server accepts the request."""
        judgement, asked, request = self._judgement, self.asked(), self._request
        if judgement.outcome is Outcome.TOO_LONG:
            return
        scope = judgement.scope
        name = f"{MODEL}{asked.model}" if scope is Scope.MODEL else asked.path
        size = asked.size if scope is Scope.SIZE else 0
        body = fingerprint(request.target, request.body)
        sure = scope in (Scope.ROUTE, Scope.SIZE)
        self._refused.append(_Refused(server, name, size, judgement.words, body, sure))
        if server.refusals.known:
            self._fleet.refused_again(server, name, now)

    def taken(self, now: float) -> None:
        """A server has accepted the request that others have refused."""
        for server, name, size, words, body, sure in self._refused:
            self._fleet.accepted_elsewhere(server, name, size, words, now, body=body, sure=sure)
