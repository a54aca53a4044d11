"""The data path as an ASGI application."""

from __future__ import annotations

import ssl
from random import Random
from urllib.parse import urlsplit

import trio

from vllm_router.config.limits import LimitsConfig
from vllm_router.config.schema import Config
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.silence import STILL_FOR
from vllm_router.http.addresses import parse_networks
from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.http.client.pool import Pool
from vllm_router.http.client.resolver import Resolver
from vllm_router.http.head_cache import KnownResponses
from vllm_router.proxy.admission import AdmissionQueue, PeersMaker
from vllm_router.proxy.batched_recorder import BatchedRecorder
from vllm_router.proxy.context import ProxyContext, Upstream, router_stopping
from vllm_router.proxy.exchange import Exchange
from vllm_router.proxy.headers import RequestHeads
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policy_set import PolicySet


class Proxy:
    """Serves inference requests. Constructed once; `apply` brings in a new configuration.

    Owns the connections to the servers: `close` closes the idle ones. `context` is what the
    exchanges share.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: Config,
        recorder: BatchedRecorder,
        rng: Random,
        tls: ServerContexts | None = None,
        resolver: Resolver | None = None,
        make_peers: PeersMaker | None = None,
    ) -> None:
        """`make_peers` connects the admission queue with the router's other processes."""
        self._make_peers = make_peers
        self._empty = trio.Event()
        self._tls = tls
        self._resolver = resolver or Resolver()
        self._responses = KnownResponses()
        settings = config.settings
        self.context = ProxyContext(
            fleet=fleet,
            policies=PolicySet(rng, settings.policy, {}, PolicySettings.of(settings)),
            settings=settings,
            recorder=recorder,
            now=trio.lowlevel.current_clock().current_time,
            # Servers that went down together must not return together.
            jitter=lambda: 0.9 + 0.2 * rng.random(),
        )
        self.apply(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (scope `http`). Returns without a last message to have it cut."""
        context = self.context
        exchange = Exchange(context, scope, receive, send)
        try:
            ending = await exchange.run()
        finally:
            if not context.exchanges:
                self._empty.set()
        if ending is not None:
            await exchange.downstream.finish(ending)

    # -- configuration ------------------------------------------------------------------------

    def apply(self, config: Config) -> None:
        """Follow the fleet and the settings; running exchanges keep their connections."""
        context = self.context
        context.settings = settings = config.settings
        context.max_body = int(settings.max_body_mb * 1_000_000)
        context.bodies.limit = int(settings.max_bodies_mb * 1_000_000)
        context.trusted = parse_networks(settings.trusted_proxies)
        own = {name: rule.policy for name, rule in config.models if rule.policy is not None}
        on_request = settings.policy_header
        context.policies.apply(
            settings.policy, own, PolicySettings.of(settings), on_request=on_request
        )
        context.per_request_rules = bool(config.models or on_request)
        servers = context.fleet.all_servers()
        for server in servers:
            self.prepare(server)
        for server in context.upstreams.keys() - set(servers):
            context.upstreams.pop(server).pool.close()
        self._apply_limits(config.limits)

    def prepare(self, server: Server) -> None:
        """Make ready to send requests to the server; also called before it joins the fleet."""
        upstreams = self.context.upstreams
        upstream = upstreams.get(server)
        tls = self._tls_context(server)
        if upstream is not None and upstream.tls is tls:
            if upstream.config is server.config:
                return
            pool = upstream.pool
        else:
            pool = Pool(server.url, tls, self._resolver, responses=self._responses)
            if upstream is not None:
                upstream.pool.close()  # its connections use other certificates
        if upstream is not None and upstream.config.api_key == server.config.api_key:
            heads = upstream.heads
        else:
            parts = urlsplit(server.url)
            heads = RequestHeads(parts.netloc, parts.path, server.config.api_key)
        name = server.name.encode("latin-1", "replace").replace(b"\r", b"?").replace(b"\n", b"?")
        upstreams[server] = Upstream(pool, heads, name, tls, server.config)

    def _apply_limits(self, limits: LimitsConfig | None) -> None:
        """Waiting requests that are admitted under the new limits go on at once."""
        context = self.context
        admission = context.admission
        if limits is None:
            context.admission = None
            if admission is not None:
                admission.close()
        elif admission is None:
            context.admission = AdmissionQueue(context.fleet, limits, self._make_peers)
        else:
            admission.apply(limits)

    def _tls_context(self, server: Server) -> ssl.SSLContext | None:
        if self._tls is None or not server.url.startswith("https:"):
            return None
        return self._tls.of(server.config)

    def forget(self, server: Server) -> None:
        """The last exchange of a removed server has ended."""
        context = self.context
        context.policies.forget(server)
        context.failures.forget(server)
        upstream = context.upstreams.pop(server, None)
        if upstream is not None:
            upstream.pool.close()

    def close(self) -> None:
        """Flush the recorders, and close the idle connections."""
        self.context.recorder.flush()
        for upstream in self.context.upstreams.values():
            upstream.pool.close()

    # -- ending exchanges from outside --------------------------------------------------------

    def maintain(self, server: Server, now: float) -> None:
        """Periodic upkeep of a server, called after each scrape.

        Closes expired idle connections. If the server is down or asleep, ends requests that have
        been silent for `health_check_timeout`, so that they are retried instead of waiting for
        their idle timeout. A server that is held back is up, and is used if there is no other.
        """
        context = self.context
        upstream = context.upstreams.get(server)
        if upstream is not None:
            upstream.pool.close_expired(now)
        server.look_for_silence(now)
        if server.paused_at is not None or server.silence.since is not None:
            self._move_on(server, now)
        health = server.active_health
        if (health.up is False and not health.damped) or server.asleep:
            self.server_gone(server, now, context.settings.health_check_timeout)

    def server_gone(self, server: Server, now: float, patience: float) -> int:
        """End the requests on a server that is down and silent for `patience` seconds.

        Uncommitted ones are retried on other servers. A stream with recent bytes is left to its
        idle timeout, and so is any stream on a server that only sleeps. Returns how many ended.
        """
        ended = 0
        spared = bool(server.active_health.up)
        for lease in server.leases:
            if lease.committed and spared:
                continue
            if lease.interrupt is not None and now - lease.last_byte_at >= patience:
                ended += lease.interrupt(Outcome.SERVER_DOWN.value)
        return ended

    def _move_on(self, server: Server, now: float) -> None:
        """Retry elsewhere the requests that wait on a paused or silent server.

        On a silent server its trial moves soon, other requests once they have waited long and no
        request has had output since they were sent. Requests that cannot go elsewhere stay.
        """
        paused = server.paused_at is not None
        settings = self.context.settings
        most = settings.first_byte_timeout / 2
        of_trials = min(server.trial_patience(), most)
        of_others = min(max(STILL_FOR, of_trials), most)
        for lease in list(server.leases):
            if lease.interrupt is None or lease.committed:
                continue
            patience = settings.metrics_interval if paused else of_others
            if lease.trial and not paused:
                patience = of_trials
            elif not paused and server.output_since(lease.taken_at):
                continue
            if now - lease.taken_at >= patience:
                lease.interrupt(Outcome.SILENT.value)

    async def drained(self) -> None:
        """Wait until no exchange is running. Several tasks may wait."""
        while self.context.exchanges:
            if self._empty.is_set():
                self._empty = trio.Event()
            await self._empty.wait()

    def stop(self) -> int:
        """End the running exchanges: with an error event, or 503 where nothing was sent.

        Returns how many there were.
        """
        context = self.context
        for exchange in context.exchanges:
            exchange.interrupt(Outcome.STOPPED.value)
        if context.admission is not None:
            context.admission.stop(router_stopping)
        return len(context.exchanges)
