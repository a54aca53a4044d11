"""The servers that one request may be sent to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import trio

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import Refused
from vllm_router.fleet.candidates import is_fully_healthy
from vllm_router.fleet.server import Server
from vllm_router.proxy.context import ProxyContext, router_stopping
from vllm_router.proxy.identity import CREDENTIALS
from vllm_router.proxy.owner_selection import OwnerSelection
from vllm_router.proxy.record import Record
from vllm_router.proxy.refusal import names_shown
from vllm_router.proxy.request import Request
from vllm_router.proxy.retry import Outcome
from vllm_router.proxy.selection import Selection
from vllm_router.routing.queue.entry import Route

SHOWN_MODEL = 200
"""Characters of an unknown model's name that are repeated to the client."""


class Candidates:
    """The servers for one request: without servers that were tried, for its model or a fallback.

    `falls_back` says that the configuration names fallback models; `tried` are the servers of
    earlier attempts, the last one included.
    """

    __slots__ = ("_context", "_key", "_record", "_request", "falls_back", "selection", "tried")

    def __init__(
        self, context: ProxyContext, request: Request, record: Record, key: KeyConfig | None
    ) -> None:
        self._context = context
        self._request = request
        self._record = record
        self._key = key
        self.tried: list[Server] = []
        self.falls_back = False
        self.selection: Selection | None = None

    def use_names(self, public: str) -> None:
        """Translate the model name of the client. Raises Refused."""
        self.ask_for(public)
        rule = self._context.fleet.names.rules.get(public)
        self.falls_back = rule is not None and rule.fallback is not None

    def ask_for(self, public: str) -> None:
        """Ask for the model with this public name from now on. Raises Refused."""
        record, request = self._record, self._request
        request.ask_for(public, self._context.fleet.names)
        served = request.info.model
        record.served_model = served if served != record.model else None

    def find(self, now: float) -> tuple[Server, ...]:
        """The servers to choose from now. With a fallback this may change the model asked for.

        Ejected servers are no reason to stay with a model. A request that waits returns to its own
        model when that has servers again. The key's list of models does not apply: the fallback is
        the operator's choice, not the client's.
        """
        fleet = self._context.fleet
        if not (self.tried or self.falls_back or fleet.selective or self.selection is not None):
            return fleet.candidates(self._request.info.model, now)
        if self.falls_back and fleet.probed:
            name = self._first_available(now)
            if name is not None and fleet.names.served(name) != self._request.info.model:
                self._request.note_origin()
                self.ask_for(name)
        return self.untried(now)

    def untried(self, now: float) -> tuple[Server, ...]:
        """The same for the model that is asked for at the moment."""
        fleet, model = self._context.fleet, self._request.info.model
        if fleet.selective or self.selection is not None:
            found = self.select().servers(now, self.tried)
        elif self.tried:
            found = fleet.others(model, now, self.tried)
        else:
            return fleet.candidates(model, now)
        if not self.tried:
            return found
        found = self.known_good(found, now) or found
        return self._on_other_machines(found, now) or found

    def _on_other_machines(self, servers: Sequence[Server], now: float) -> tuple[Server, ...]:
        """The servers on machines where no server may have died under this request.

        Servers of one machine die together. A request that was on two of them when they died would
        look like the cause; see `quarantine.py`.
        """
        died = self._context.failures.may_have_died
        machines = {server.machine for server in self.tried if died(server, now)}
        return tuple([server for server in servers if server.machine not in machines])

    def known_good(self, servers: Sequence[Server], now: float) -> tuple[Server, ...]:
        """The servers among these that are up, not full, and have failed nothing recently."""
        failures = self._context.failures
        return tuple([s for s in servers if failures.is_free(s, now) and is_fully_healthy(s, now)])

    def has_fallback(self, now: float) -> bool:
        """Whether some model, its own or a fallback, has servers left."""
        return self.falls_back and self._first_available(now) is not None

    def _first_available(self, now: float) -> str | None:
        """The public name of the first model, its own or a fallback, that has servers left."""
        fleet, model = self._context.fleet, self._record.model
        assert model is not None
        return fleet.names.first_available(
            model, lambda served: fleet.available(served, now, self.tried)
        )

    def select(self) -> Selection:
        """The selection by what servers accept; made when it is needed."""
        selection = self.selection
        if selection is None:
            selection = Selection(self._context.fleet, self._request, self._record)
            self.selection = selection
        return selection

    def route(self, serving: Callable[[str | None], frozenset[Server]], now: float) -> Route:
        """Everything about the request that `find` depends on.

        Of two requests with equal routes both have a server to go to, or none has.

        `serving` returns the servers that have a model, whatever their state.
        """
        model, public = self._request.info.model, self._record.model
        names = self._context.fleet.names
        if self.falls_back and public is not None:
            servers = serving(names.served(public)).union(
                *(serving(names.served(name)) for name in names.fallbacks(public))
            )
        else:
            public, servers = None, serving(model)
        selection = None
        if self._context.fleet.selective or self.selection is not None:
            made = self.select()
            servers = made.among(servers)
            selection = made.unfit(now), made.longer_than > 0
        if not self.tried and selection is None:
            return Route(servers, public)
        tried = frozenset(self.tried)
        return Route(servers - tried, (public, tried, selection))

    @property
    def shows_client_key(self) -> bool:
        """Whether the server of the last attempt got a key of the client's own."""
        return self.tried[-1].config.api_key is None and any(
            name in CREDENTIALS for name, _ in self._request.headers
        )

    def judge_response(
        self,
        status: int,
        content_type: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | None,
    ) -> Outcome:
        """The outcome of a response that is no result; see `Selection.judge`."""
        return self.select().judge(
            self.tried,
            trio.current_time(),
            status,
            content_type,
            headers,
            body,
            client_key=self.shows_client_key,
        )

    async def wait(self) -> tuple[Server, ...]:
        """Called when there is no candidate: waits for servers that were not probed yet.

        Returns none if the request may wait in the admission queue. Raises Refused.
        """
        context, model = self._context, self._request.info.model
        fleet, settings = context.fleet, context.settings
        with trio.move_on_after(settings.connect_timeout + settings.health_check_timeout):
            while not (fleet.probed or context.stopping):
                await trio.sleep(0.02)
                candidates = self.untried(trio.current_time())
                if candidates:
                    return candidates
        if context.stopping:
            raise router_stopping()
        if self.falls_back:
            candidates = self.find(trio.current_time())
            if candidates:
                return candidates
        bound = isinstance(self.selection, OwnerSelection)
        unknown = model is not None and not fleet.knows(model)
        if unknown and not bound and context.refresh_models is not None:
            await context.refresh_models(lambda: model is None or fleet.knows(model))
            candidates = self.find(trio.current_time())
            if candidates:
                return candidates
        if context.admission is not None and (model is None or fleet.knows(model)):
            return ()
        raise self.no_server()

    def bind(self, owner: OwnerSelection) -> None:
        """Use the server that has a stored response, and no other."""
        self.selection = owner
        self.falls_back = False

    def no_server(self) -> Refused:
        """The refusal of a request whose model no server can serve now."""
        fleet, key = self._context.fleet, self._key
        if isinstance(self.selection, OwnerSelection):
            return self.selection.unavailable(trio.current_time())
        model, asked = self._request.info.model, self._record.model
        shown = repr(asked if asked is None else asked[:SHOWN_MODEL])
        if model is not None and not fleet.knows(model):
            known, unheard = fleet.public_models(), fleet.without_models
            listed = names_shown([name for name in known if key is None or key.allows(name)])
            if known and unheard:
                # One of those servers may have the model: a 404 would be a guess.
                return Refused(
                    503,
                    "no_server_available",
                    f"No server is known to have the model {shown}, and {len(unheard)} could not "
                    f"be asked yet. Available models: {listed}.",
                    param="model",
                    retry_after=fleet.retry_after(model, trio.current_time()),
                )
            if known:
                return Refused(
                    404,
                    "model_not_found",
                    f"The model {shown} does not exist. Available models: {listed}.",
                    param="model",
                )
        what = f"for the model {shown} " if model is not None else ""
        return Refused(
            503,
            "no_server_available",
            f"No server {what}is available at the moment.",
            retry_after=fleet.retry_after(model, trio.current_time()),
        )
