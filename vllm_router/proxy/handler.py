"""The data path as an ASGI application: what all exchanges share."""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from urllib.parse import urlsplit

import trio

from vllm_router.config.limits import LimitsConfig
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.silence import STILL_FOR
from vllm_router.http.addresses import parse_networks
from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.http.client.client import Pool
from vllm_router.http.client.resolver import Resolver
from vllm_router.http.io.wires import Hub
from vllm_router.proxy.admission import Gate, PeersMaker
from vllm_router.proxy.exchange import Exchange, stopping
from vllm_router.proxy.failures import Failures
from vllm_router.proxy.headers import RequestHeads
from vllm_router.proxy.key_limits import Usage
from vllm_router.proxy.quarantine import Poison
from vllm_router.proxy.record import Record, Recorder, Tracer
from vllm_router.proxy.request import Bodies
from vllm_router.proxy.retry import Outcome, RetryBudget
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policy_set import PolicySet

TELL_EVERY = 0.005
TELL_AT = 64
"""Exchanges of which the recorders are told together, and no later than so many."""


@dataclass(slots=True)
class Link:
    """What it takes to talk to one server."""

    pool: Pool
    heads: RequestHeads
    name: bytes
    tls: ssl.SSLContext | None
    config: ServerConfig


class Proxy:
    """Serves inference requests. Constructed once; `apply` brings in a new configuration.

    Owns the connections to the servers: `close` closes the idle ones.
    `tell_every`: seconds between two tellings of the recorders on a busy router; see `tell`.
    `plain` says that all requests are chosen for alike, under the names that clients use.
    `make_peers` connects the waiting room with those of the router's other processes.
    `wants_usage`, `wants_prompt`: whether a recorder uses a record's tokens and its facts' prompt.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: Config,
        recorders: Sequence[Recorder],
        rng: Random,
        tls: ServerContexts | None = None,
        resolver: Resolver | None = None,
        make_peers: PeersMaker | None = None,
    ) -> None:
        self.fleet = fleet
        self.budget = RetryBudget()
        self.poison = Poison()
        self.failures = Failures()
        self.exchanges: set[Exchange] = set()
        self.links: dict[Server, Link] = {}
        self.now: Callable[[], float] = trio.lowlevel.current_clock().current_time
        """trio.current_time, without its two detours."""
        self.stopping = False
        self.wants_usage = self.wants_prompt = False
        self.tracer: Tracer | None = None
        self.bodies = Bodies()
        self.turns = trio.Lock()
        """Of long bodies that are read in slices."""
        self.usage = Usage()
        self.look_at_lists: Callable[[Callable[[], bool]], Awaitable[None]] | None = None
        """Reads the servers' lists of models again; returns once that is done, or what it is given
        says yes. None where nothing reads lists."""
        self.gate: Gate | None = None
        """There if `[limits]` are."""
        self._make_peers = make_peers
        self._empty = trio.Event()
        self._recorders = tuple(recorders)
        self.tell_every = TELL_EVERY
        self._told_at = -math.inf
        self._to_be_told = False
        self._ended_attempts: list[tuple[Server, Outcome]] = []
        self._ended: list[Record] = []
        self._rng = rng
        self._tls = tls
        self._resolver = resolver or Resolver()
        self.policies = PolicySet(
            rng, config.settings.policy, {}, PolicySettings.of(config.settings)
        )
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Follow the fleet and the settings; exchanges under way keep their connections."""
        self.settings = settings = config.settings
        self.max_body = int(settings.max_body_mb * 1_000_000)
        self.bodies.limit = int(settings.max_bodies_mb * 1_000_000)
        self.trusted = parse_networks(settings.trusted_proxies)
        own = {name: rule.policy for name, rule in config.models if rule.policy is not None}
        on_request = settings.policy_header
        self.policies.apply(
            settings.policy, own, PolicySettings.of(settings), on_request=on_request
        )
        self.plain = not (config.models or on_request)
        servers = self.fleet.all_servers()
        for server in servers:
            self.prepare(server)
        for server in self.links.keys() - set(servers):
            self.links.pop(server).pool.close()
        self._apply_limits(config.limits)

    def prepare(self, server: Server) -> None:
        """Have what it takes to talk to the server; called before it joins the fleet, too."""
        link = self.links.get(server)
        tls = self._context(server)
        if link is not None and link.tls is tls:
            if link.config is server.config:
                return
            pool = link.pool
        else:
            pool = Pool(server.url, tls, self._resolver)
            if link is not None:
                link.pool.close()  # other certificates are another server to talk to
        self.links[server] = _link(server, pool, tls)

    def _apply_limits(self, limits: LimitsConfig | None) -> None:
        """Whoever waits and may go on under the new ones does so at once."""
        gate = self.gate
        if limits is None:
            self.gate = None
            if gate is not None:
                gate.close()
        elif gate is None:
            self.gate = Gate(self, limits, self._make_peers)
        else:
            gate.apply(limits)

    def _context(self, server: Server) -> ssl.SSLContext | None:
        if self._tls is None or not server.url.startswith("https:"):
            return None
        return self._tls.of(server.config)

    def tick(self, server: Server, now: float) -> None:
        """What must happen now and then on a server; called by its probe on every scrape.

        Idle connections that have outlived their time are closed. On a server that is down,
        exchanges end that have heard nothing for as long as a check may take: those that still
        had a byte when it was found to be gone would wait for their idle timeout. One that is held
        back is there, and is asked if there is no other. On one that has been put to sleep those
        end that can go elsewhere.
        """
        link = self.links.get(server)
        if link is not None:
            link.pool.sweep(now)
        server.look_for_silence(now)
        if server.paused_at is not None or server.silence.since is not None:
            self._move_on(server, now)
        health = server.probe_health
        if (health.up is False and not health.held_back) or server.asleep:
            self.server_gone(server, now, self.settings.health_check_timeout)

    def forget(self, server: Server) -> None:
        """A removed server's last exchange has ended."""
        self.policies.forget(server)
        self.failures.forget(server)
        link = self.links.pop(server, None)
        if link is not None:
            link.pool.close()

    def close(self) -> None:
        self.tell()
        for link in self.links.values():
            link.pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One inference request (`http` scope). Returns without a last message to cut it."""
        exchange = Exchange(self, scope, receive, send)
        last = await exchange.run()
        if last is None:
            return
        start, outlet = exchange.start, exchange.outlet
        if start is None:
            await send(last)
        elif outlet is None:
            await send(start)
            await send(last)
        elif not outlet.send_whole(start, last):
            await outlet.caught_up()

    # -- what exchanges report ----------------------------------------------------------------

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        self._ended_attempts.append((server, outcome))
        if not self._to_be_told:
            self._tell_later()

    def ended(self, record: Record) -> None:
        self._ended.append(record)
        if not self._to_be_told:
            self._tell_later()
        if not self.exchanges:
            self._empty.set()

    def _tell_later(self) -> None:
        self._to_be_told = True
        Hub.of_this_run().at_turns_end(self._turn_has_ended)

    def _turn_has_ended(self) -> None:
        if len(self._ended) < TELL_AT and self.now() - self._told_at < self.tell_every:
            self._tell_later()
        else:
            self.tell()

    def tell(self) -> None:
        """Tell the recorders of what has ended.

        They hear at the end of the loop's turn, before the clients do, or, on a busy router, of
        what has ended in some milliseconds together; whoever reads what they have counted calls
        this first. One recorder after the other, not one exchange after the other: what takes
        15 µs by itself takes 5 where the processor's caches are warm.
        """
        self._told_at, self._to_be_told = self.now(), False
        attempts, self._ended_attempts = self._ended_attempts, []
        records, self._ended = self._ended, []
        for recorder in self._recorders:
            for server, outcome in attempts:
                recorder.attempt_ended(server, outcome)
            for record in records:
                recorder.exchange_ended(record)
        for record in records:
            record.facts = record.trace = None

    def jitter(self) -> float:
        """A factor for ejection times: servers that fell together must not return together."""
        return 0.9 + 0.2 * self._rng.random()

    # -- ending exchanges from outside --------------------------------------------------------

    def server_gone(self, server: Server, now: float, patience: float) -> int:
        """Probes say the server is gone: end the exchanges that have heard nothing for a while.

        Those without a byte for the client are replayed elsewhere. `patience` in seconds: a
        stream that has just had a byte is left to its idle timeout, and so is any other on a server
        that only sleeps.
        """
        ended = 0
        spared = bool(server.probe_health.up)
        for lease in server.leases:
            if lease.committed and spared:
                continue
            if lease.interrupt is not None and now - lease.last_byte_at >= patience:
                ended += lease.interrupt(Outcome.GONE.value)
        return ended

    def _move_on(self, server: Server, now: float) -> None:
        """Move requests that wait on a paused or silent server to other servers.

        On a silent one its trial is moved soon; the others once they have waited long and no
        request has had output since they were sent. What cannot go elsewhere stays.
        """
        paused = server.paused_at is not None
        most = self.settings.first_byte_timeout / 2
        of_trials = min(server.trial_patience(), most)
        of_others = min(max(STILL_FOR, of_trials), most)
        for lease in list(server.leases):
            if lease.interrupt is None or lease.committed:
                continue
            patience = self.settings.metrics_interval if paused else of_others
            if lease.trial and not paused:
                patience = of_trials
            elif not paused and server.output_since(lease.taken_at):
                continue
            if now - lease.taken_at >= patience:
                lease.interrupt(Outcome.SILENT.value)

    async def drained(self) -> None:
        """Wait until no exchange is left. Several may."""
        while self.exchanges:
            if self._empty.is_set():
                self._empty = trio.Event()
            await self._empty.wait()

    def stop(self) -> int:
        """End what is still running, honestly: an error event, or 503 where nothing was sent."""
        for exchange in self.exchanges:
            exchange.interrupt(Outcome.STOPPED.value)
        if self.gate is not None:
            self.gate.stop(stopping)
        return len(self.exchanges)


def _link(server: Server, pool: Pool, tls: ssl.SSLContext | None) -> Link:
    parts = urlsplit(server.url)
    authority = parts.netloc
    heads = RequestHeads(authority, parts.path, server.config.api_key)
    name = server.name.encode("latin-1", "replace").replace(b"\r", b"?").replace(b"\n", b"?")
    return Link(pool, heads, name, tls, server.config)
