"""The structs that a valid servers.toml becomes: immutable, and complete with all defaults.

`types.py` defines the accepted values, `parser.py` fills the structs, `changes.py` compares them.
The tables `[auth]`, `[limits]`, `[log]`, `[models]`, `[run]` and `[tls]` have modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vllm_router.config.auth import AuthConfig
from vllm_router.config.discovery import DiscoveryConfig, Targets
from vllm_router.config.limits import LimitsConfig
from vllm_router.config.log import LogSettings
from vllm_router.config.model_aliases import ModelRule, Models
from vllm_router.config.run_options import RunOptions
from vllm_router.config.session_sources import SESSION_SOURCES
from vllm_router.config.shared import SharedConfig
from vllm_router.config.slo import SloConfig
from vllm_router.config.tls import File, TlsConfig
from vllm_router.config.types import (
    AddressOrNone,
    Bool,
    Growth,
    Hosts,
    Interval,
    Megabytes,
    Networks,
    NonNegativeInt,
    Origins,
    PolicyName,
    PositiveInt,
    Seconds,
    SecondsOrNone,
    SecondsOrZero,
    Secret,
    SessionSources,
    Share,
    Tokens,
)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One vLLM server. The URL is its identity across reloads.

    url: as `normalise_url` writes it; requests go to url + path.
    name: unique; in logs, metrics, response headers and `vllm-router drain`. Visible ASCII.
    max_concurrent_requests: requests that the server runs at once without queueing. Routing
        measures load against it; it is not a hard limit. None to learn it.
    weight: factor on the share of requests that follows from max_concurrent_requests.
    max_in_flight: hard limit of concurrent requests, from here or from `[limits]`; None for
        no limit.
    api_key: bearer token sent to this server, from `api_key` or the environment variable named
        by `api_key_env`; None forwards the client's token.
    models: models that the server serves; None reads them from its `/v1/models`.
    ca: certificate authorities that the server's certificate is verified with; None for the
        system's.
    client_certificate, client_key: the router's own certificate for this server.
    verify: whether the server's certificate is verified.
    source: the discovery source that found the server; None for the file and the command line.
    """

    url: str
    name: str
    max_concurrent_requests: int | None = None
    weight: float = 1.0
    max_in_flight: int | None = None
    api_key: Secret | None = None
    models: tuple[str, ...] | None = None
    ca: File | None = None
    client_certificate: File | None = None
    client_key: File | None = None
    verify: bool = True
    source: str | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The `[config]` table. All durations in seconds.

    Active checks (probes), per server:
    health_check_interval: between two checks of `/health`.
    health_check_timeout: of one check; a check without a response in time has failed.
    health_check_consecutive_failures: failed checks in a row until the server is down.
    health_check_rise: good checks in a row until the server is up again.
    enable_active_health_check: false judges servers by real traffic alone.
    health_check_window_size: checks in the sliding window of the next two.
    health_check_min_success_rate: with a smaller share of good checks in a full window the
        server is down.
    health_check_max_response_time: with a longer mean time of the good checks in a full window
        the server is down.
    metrics_interval: between two scrapes of `/metrics`.
    idle_probes_per_second: how often all servers without requests are asked together, for each of
        `/health`, `/metrics` and `/v1/models`; in a larger fleet the intervals above grow for them.
    busy_servers_at_full_rate: servers with requests that are probed at the intervals above; if more
        have some, the intervals grow so that all together are asked as often as so many.

    Real traffic:
    failure_threshold: consecutive failures by the server's fault until it is ejected.
    auto_recovery_threshold: length of the first ejection; the n-th one takes n times as long, at
        most max(60, auto_recovery_threshold). Then one probation request decides. A server that
        flaps (goes down again and again) is damped for as long, see docs/reliability.md.
    max_ejected_share: largest share of servers that may be ejected at a time; one server may be
        unless it is 0.
    max_retries: further attempts of a request on other servers, as long as no byte of a response
        has reached the client. Servers that are full or cannot be reached do not count while
        another one is known good. 0: none at all.
    replay: whether a request that was already sent may be sent to another server. A failed
        connect is always retried.
    policy: name of the policy that chooses servers, see `routing/policies/`.
    policy_header: whether a request may choose another policy by `X-Router-Policy`.
    session_sources: headers and body fields that name a request's session, the first one counts.

    Settings of the policies, see docs/routing.md:
    tokens_per_request: uncached prompt tokens that weigh as much as one request.
    waste_growth: how much more a token that another server has cached weighs per request on the
        server that would recompute it.
    prompt_growth: how much more a token that no server has cached weighs per request on the server.
    adapter_swap_tokens: prompt tokens that loading a LoRA adapter costs, until it is known.
    working_set_window: seconds for which a conversation is expected to come back; 0 for none.
    prefix_memory_mb: memory of the prefix index, in MB of 10^6 bytes.
    prefix_expiry: an unused entry of the prefix index is dropped after this time.
    slow_start: time in which a server that comes back ramps up to its full share.

    Timeouts of an exchange:
    connect_timeout: to connect to a server, TLS included.
    request_timeout: the ancestor's only timeout; here the default of the next two.
    first_byte_timeout: from the request sent to the first byte of the response.
    idle_timeout: between two chunks of a response; unset, the smaller of request_timeout and 300.
    total_timeout: of the whole exchange with all attempts; None for no limit.
    body_timeout: for the client to send its request body.
    write_stall_timeout: a client that reads nothing of its response for this time is cut off.
    client_idle_timeout: an idle client connection is closed after this time.

    The router itself:
    max_body_mb: largest request body, in MB of 10^6 bytes.
    max_bodies_mb: all request bodies in memory together; 503 beyond.
    drain_grace: after SIGTERM, time in which requests are still accepted while `/readyz` is 503.
    drain_timeout: time in which running exchanges may then finish.
    config_reload_interval: between two polls of this file.
    feed_interval: between two snapshots on the websocket feed.
    allow_engine_control: forward paths such as `/sleep` and `/collective_rpc`, else 403.
    allow_kv_transfer_params: let clients send `kv_transfer_params` and `ec_transfer_params`, which
        name addresses that the engine connects to, else 400.
    allow_data_parallel_rank: let clients send `X-data-parallel-rank`, else 400.
    trusted_proxies: networks whose `X-Forwarded-*` and `Forwarded` headers are believed.
    admin_listen: the only address that serves administration, metrics, feed and dashboard; None
        for the public address.
    cors_origins: origins of web pages that may use the router, `*` for all; see `origins.py`.
    allowed_hosts: host names that the router answers to, besides addresses and localhost; empty
        for all.
    """

    health_check_interval: Interval = 2.0
    health_check_timeout: Seconds = 2.0
    health_check_consecutive_failures: PositiveInt = 3
    health_check_rise: PositiveInt = 2
    enable_active_health_check: Bool = True
    health_check_max_response_time: Seconds = 10.0
    health_check_min_success_rate: Share = 0.8
    health_check_window_size: PositiveInt = 10
    failure_threshold: PositiveInt = 3
    auto_recovery_threshold: Seconds = 5.0
    max_ejected_share: Share = 0.5
    config_reload_interval: Interval = 1.0
    max_retries: NonNegativeInt = 3
    request_timeout: Seconds = 600.0
    metrics_interval: Interval = 0.5
    idle_probes_per_second: PositiveInt = 50
    busy_servers_at_full_rate: PositiveInt = 200
    connect_timeout: Seconds = 2.0
    first_byte_timeout: Seconds = 600.0
    idle_timeout: Seconds = 300.0
    total_timeout: SecondsOrNone = None
    body_timeout: Seconds = 60.0
    policy: PolicyName = "adaptive"
    policy_header: Bool = False
    session_sources: SessionSources = SESSION_SOURCES
    tokens_per_request: Tokens = 1000.0
    waste_growth: Growth = 0.5
    prompt_growth: Growth = 0.0
    adapter_swap_tokens: Tokens = 5000.0
    working_set_window: SecondsOrZero = 300.0
    prefix_memory_mb: Megabytes = 64.0
    prefix_expiry: Seconds = 1800.0
    slow_start: SecondsOrZero = 10.0
    max_body_mb: Megabytes = 64.0
    max_bodies_mb: Megabytes = 512.0
    drain_timeout: SecondsOrZero = 30.0
    drain_grace: SecondsOrZero = 0.0
    feed_interval: Interval = 0.5
    replay: Bool = True
    allow_engine_control: Bool = False
    allow_kv_transfer_params: Bool = False
    allow_data_parallel_rank: Bool = False
    trusted_proxies: Networks = ()
    write_stall_timeout: Seconds = 60.0
    client_idle_timeout: Seconds = 75.0
    admin_listen: AddressOrNone = None
    cors_origins: Origins = ()
    allowed_hosts: Hosts = ()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A valid servers.toml. `models` maps public names to their rules.

    `auth`, `limits`, `tls`, `discovery`, `slo` and `shared` are None where the file has no such
    table.
    `found` has the targets of each discovery source that has answered; `servers` has the servers
    made of them, see `discovered.py`.
    """

    servers: tuple[ServerConfig, ...]
    settings: Settings
    models: tuple[tuple[str, ModelRule], ...] = ()
    auth: AuthConfig | None = None
    limits: LimitsConfig | None = None
    tls: TlsConfig | None = None
    log: LogSettings = LogSettings()
    discovery: DiscoveryConfig | None = None
    shared: SharedConfig | None = None
    found: tuple[tuple[str, Targets], ...] = ()
    slo: SloConfig | None = None
    run: RunOptions = RunOptions()

    @property
    def awaited(self) -> tuple[str, ...]:
        """The discovery sources that have not answered yet."""
        if self.discovery is None:
            return ()
        answered = dict(self.found)
        return tuple([one.name for one in self.discovery.sources if one.name not in answered])

    @property
    def expected_models(self) -> frozenset[str]:
        """Models that requests may wait for though no server has them, by the servers' names.

        With `[discovery]` a model may be scaled to zero: these are the models of `[models]` and of
        the defaults of found servers.
        """
        if self.discovery is None:
            return frozenset()
        models = Models(self.models)
        public = [*models.rules, *(one for name in models.rules for one in models.fallbacks(name))]
        names = set(map(models.served, public))
        for source in self.discovery.sources:
            names.update(dict(source.defaults).get("models") or ())
        return frozenset(names)


RESTART_SETTINGS = ("admin_listen",)
"""Keys of `[config]` that are read at the start only."""

DERIVED_TIMEOUTS: dict[str, Callable[[float], float]] = {
    "first_byte_timeout": lambda request_timeout: request_timeout,
    "idle_timeout": lambda request_timeout: min(request_timeout, 300.0),
}
"""Defaults of timeouts that follow from `request_timeout`."""
