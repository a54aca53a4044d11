"""What the router counts as attempts and exchanges end.

An exchange costs one dictionary look-up and a few additions at its end; a chunk costs nothing.

The number of series is bounded: a model becomes a label only if the fleet knows it, and at most
MAX_MODELS are: then the models that it no longer knows are dropped; unknown paths are `other`;
series of removed servers are removed.
"""

from __future__ import annotations

from http import HTTPStatus

from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import Transition
from vllm_router.observability import counted_families as counted
from vllm_router.observability.decisions import outcome_label
from vllm_router.observability.demand import (
    WANT_OF_SERVER,
    RecentRefusals,
)
from vllm_router.observability.key_usage import Usage
from vllm_router.observability.prometheus_text import Counter, Counters, Histogram
from vllm_router.observability.server_lines import ServerKeys
from vllm_router.proxy.record import DONE, Phase, Record
from vllm_router.proxy.retry import ANSWERED, RULES, Outcome, RetryDecision
from vllm_router.routing.paths import path_label

MAX_MODELS = 100
OTHER = "other"
NONE = "none"
"""The label value if no model was named or no server tried."""

_STATUSES = frozenset(HTTPStatus)


class _Requests:
    """One series of REQUESTS, and the histograms that its exchanges update."""

    __slots__ = ("count", "duration", "first_token", "tokens")

    def __init__(
        self, count: Counter, first_token: Histogram, duration: Histogram, tokens: Counters
    ) -> None:
        self.count, self.first_token, self.duration = count, first_token, duration
        self.tokens = tokens


def _count_tokens(tokens: Counters, record: Record) -> None:
    """Count the tokens of a record that has them; which are cached is not always known."""
    tokens["prompt"].value += record.prompt_tokens or 0
    if record.cached_tokens is not None:
        tokens["cached"].value += record.cached_tokens
    if record.completion_tokens is not None:
        tokens["completion"].value += record.completion_tokens


class ServerSeries:
    """All series of one server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_request: dict[tuple[str | None, bytes, int, Outcome | None], _Requests] = {}
        self.requests: dict[tuple[str, str, str, str], Counter] = {}
        self.first_token: dict[str, Histogram] = {}
        self.duration: dict[str, Histogram] = {}
        self.attempts = Counters(counted.ATTEMPTS, name)
        self.transitions = Counters(counted.TRANSITIONS, name)
        self.received = counted.RECEIVED.counter(name)
        self.sent = counted.SENT.counter(name)
        self.chunks = counted.CHUNKS.counter(name)
        self.keys = ServerKeys(name)

    def forget_models(self, models: set[str]) -> None:
        self.by_request.clear()
        for key in [key for key in self.requests if key[0] in models]:
            del self.requests[key]
        for model in models:
            self.first_token.pop(model, None)
            self.duration.pop(model, None)


class ExchangeCounts:
    """A recorder of the proxy that counts: the counters and histograms of all servers and keys."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._servers: dict[str, ServerSeries] = {}
        self._models: set[str] = set()
        self._retries = Counters(counted.RETRIES)
        self._saved = counted.SAVED.counter()
        self._disconnects = Counters(counted.DISCONNECTS)
        self._refusals = Counters(counted.REFUSALS)
        self._keys: dict[str, Counters] = {}
        self._tokens: dict[str, Counters] = {}
        self._key_tokens: dict[str, Counters] = {}
        self._key_refusals: dict[str, int] = {}
        # A counter that exists from the start shows its first event as an increase.
        for outcome, rule in RULES.items():
            if rule.retry is not RetryDecision.NO:
                self._retries[outcome.value].value = 0
        for phase in (Phase.BODY, Phase.QUEUE, Phase.CONNECT, Phase.WAIT, Phase.STREAM):
            self._disconnects[phase.value].value = 0
        self._refused_lately: dict[str, RecentRefusals] = {}
        self._overhead = counted.OVERHEAD.histogram()
        self._waits: dict[str, Histogram] = {}

    # -- counting -----------------------------------------------------------------------------

    def exchange_ended(self, record: Record) -> None:
        """One look-up, then additions; a new combination of labels costs more, once."""
        server = record.server
        name = server.name if server is not None else NONE
        series = self._servers.get(name) or self._series(name)
        outcome = record.outcome
        requests = series.by_request.get((record.model, record.path, record.status, outcome))
        if requests is None:
            requests = self._find_requests(series, record)
        requests.count.value += 1
        series.received.value += record.bytes_in
        if record.first_byte_at:
            series.sent.value += record.bytes_out
            series.chunks.value += record.chunks
            if record.stream and record.status < 400:
                requests.first_token.observe(record.first_byte_at - record.started_at)
        if outcome is ANSWERED and record.phase is DONE:
            requests.duration.observe(record.ended_at - record.started_at)
        if record.waited:
            self._waited(record)
        elif record.sent_at:
            self._overhead.observe(record.sent_at - record.body_read_at)
        if record.retries:
            self._retried(record)
        if record.key_name:
            by_status = self._keys.get(record.key_name)
            if by_status is None:
                by_status = self._keys[record.key_name] = Counters(
                    counted.KEY_REQUESTS, record.key_name
                )
            by_status[f"{record.status // 100}xx" if record.status else "0"].value += 1
        if record.prompt_tokens is not None:
            _count_tokens(requests.tokens, record)
            if record.key_name:
                self._count_tokens_of_key(record)
        if record.code:
            self._refusals[record.code].value += 1
            if record.key_name and outcome is None:
                refused = self._key_refusals.get(record.key_name, 0)
                self._key_refusals[record.key_name] = refused + 1
            if record.code in WANT_OF_SERVER:
                self._wanted(record)
        if outcome is Outcome.CLIENT_GONE:
            self._disconnects[record.phase.value].value += 1

    def _count_tokens_of_key(self, record: Record) -> None:
        tokens = self._key_tokens.get(record.key_name)
        if tokens is None:
            tokens = self._key_tokens[record.key_name] = Counters(
                counted.KEY_TOKENS, record.key_name
            )
        _count_tokens(tokens, record)

    def _retried(self, record: Record) -> None:
        for reason in record.retries:
            self._retries[reason.value].value += 1
        if record.outcome is ANSWERED:
            self._saved.value += 1

    def _wanted(self, record: Record) -> None:
        """A request was refused because no server was free."""
        model = record.served_model or record.model
        if model is not None and self._fleet.knows(model):
            refused = self._refused_lately.get(model)
            if refused is None:
                refused = self._refused_lately[model] = RecentRefusals()
            refused.add(record.ended_at)

    def _waited(self, record: Record) -> None:
        model = self._model_label(record.served_model or record.model)
        waits = self._waits.get(model)
        if waits is None:
            waits = self._waits[model] = counted.QUEUE_WAIT.histogram(model)
        waits.observe(record.waited)

    def refused(self, code: str) -> None:
        """Count a request that was rejected before an exchange began, by its error code."""
        self._refusals[code].value += 1

    def refused_by_code(self) -> dict[str, int]:
        """Number of requests so far that got an error of the router, by its code."""
        return {code: int(counter.value) for code, counter in self._refusals.items()}

    def key_totals(self) -> dict[str, Usage]:
        """Usage of each client key since the router's start, by its name."""
        return {
            name: Usage(
                requests=sum(int(one.value) for one in by_status.values()),
                refused=self._key_refusals.get(name, 0),
                tokens=sum(
                    int(counter.value)
                    for kind, counter in self._key_tokens.get(name, {}).items()
                    if kind != "cached"
                ),
            )
            for name, by_status in self._keys.items()
        }

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        series = self._servers.get(server.name) or self._series(server.name)
        series.attempts[outcome.value].value += 1

    def transition(self, change: Transition) -> None:
        """Count a server's change of state."""
        self._series(change.server).transitions[change.new].value += 1

    def _series(self, name: str) -> ServerSeries:
        series = self._servers.get(name)
        if series is None:
            series = self._servers[name] = ServerSeries(name)
        return series

    def _find_requests(self, series: ServerSeries, record: Record) -> _Requests:
        """The series of an exchange.

        It is remembered only for label values that are the record's own: names, paths and ids of
        stored responses, of which clients send any number, must not fill the memory.
        """
        model, path = self._model_label(record.model), path_label(record.path)
        status = str(record.status)
        if record.status and record.status not in _STATUSES:
            status = f"{status[0]}xx"
        labels = (model, path, outcome_label(record), status)
        count = series.requests.get(labels)
        if count is None:
            count = series.requests[labels] = counted.REQUESTS.counter(series.name, *labels)
        first_token = series.first_token.get(model)
        if first_token is None:
            first_token = series.first_token[model] = counted.FIRST_TOKEN.histogram(
                series.name, model
            )
            series.duration[model] = counted.DURATION.histogram(series.name, model)
        tokens = self._tokens.get(model)
        if tokens is None:
            tokens = self._tokens[model] = Counters(counted.TOKENS, model)
        found = _Requests(count, first_token, series.duration[model], tokens)
        if model != OTHER and path.encode() == record.path and status == str(record.status):
            key = (record.model, record.path, record.status, record.outcome)
            series.by_request[key] = found
        return found

    def _model_label(self, model: str | None) -> str:
        if model is None:
            return NONE
        if model in self._models:
            return model
        if len(self._models) < MAX_MODELS and self._fleet.knows_public(model):
            self._models.add(model)
            return model
        return OTHER

    # -- forgetting ---------------------------------------------------------------------------

    def prune(self) -> None:
        """Drop the series of removed servers, and models beyond the limit.

        Called before each rendering, and by the feed once a second.
        """
        names = {server.name for server in self._fleet.all_servers()}
        names.add(NONE)
        for name in self._servers.keys() - names:
            del self._servers[name]
        for model in [name for name in self._refused_lately if not self._fleet.knows(name)]:
            del self._refused_lately[model]
        if len(self._models) >= MAX_MODELS:
            gone = {name for name in self._models if not self._fleet.knows_public(name)}
            self._models -= gone
            for series in self._servers.values():
                series.forget_models(gone)
            for model in gone:
                self._waits.pop(model, None)
                self._tokens.pop(model, None)
