"""What servers.toml may say, checked once and completely.

`kinds.py` says what values are accepted; `Settings` and `_SERVER_KEYS` here, `auth.py`,
`models_config.py` and `tls_config.py` say which key has which. Whatever passes `parse` is complete
and immutable, so nothing that uses it looks for missing keys.

A problem is one line, `source: key.path: expected ..., got ...`, and never holds a secret.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from vllm_router.config.auth import AUTH_KEYS, AuthConfig, KeyConfig, read_auth
from vllm_router.config.limits import LIMITS_KEYS, LimitsConfig
from vllm_router.config.log import LOG_KEYS, LogSettings
from vllm_router.config.memory import Memory, fitting
from vllm_router.config.model_aliases import ModelRule
from vllm_router.config.models import MODEL_KEYS, changed_models, read_models
from vllm_router.config.server_url import SHOWN_CHARS, escaped, quoted, server_name
from vllm_router.config.tls import (
    SERVER_TLS_KEYS,
    TLS_KEYS,
    File,
    ReadFile,
    TlsConfig,
    check_client_certificate,
    read_tls,
    take_files,
)
from vllm_router.config.toml_reader import Reader, load_document, shown_value
from vllm_router.config.types import (
    AddressOrNone,
    ApiKey,
    Count,
    CountOrZero,
    Flag,
    Growth,
    Hosts,
    Interval,
    Megabytes,
    Models,
    Name,
    Networks,
    Origins,
    PolicyName,
    Seconds,
    SecondsOrNone,
    SecondsOrZero,
    Secret,
    Share,
    Tokens,
    Url,
    Variable,
    Weight,
)
from vllm_router.errors import ConfigError


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One vLLM server. The URL is its identity across reloads.

    url: as `normalise_url` writes it; requests go to url + path.
    name: unique; in logs, metrics, response headers and `vllm-router drain`. Visible ASCII.
    max_concurrent_requests: what the server takes at once without queueing; routing compares
        load relative to it, and it is no hard limit.
    weight: so many times the share of requests that its max_concurrent_requests would give it.
    max_in_flight: its cap, from here or from `[limits]`; None for none.
    api_key: sent to this server as its bearer token, from `api_key` or the environment variable
        named by `api_key_env`; None sends what the client sent.
    models: the models it serves, instead of asking its `/v1/models`; None asks.
    ca: the authorities its certificate may come from; None for those that the system trusts.
    client_certificate, client_key: what the router shows it of itself.
    verify: false takes any certificate.
    """

    url: str
    name: str
    max_concurrent_requests: int = 3
    weight: float = 1.0
    max_in_flight: int | None = None
    api_key: Secret | None = None
    models: tuple[str, ...] | None = None
    ca: File | None = None
    client_certificate: File | None = None
    client_key: File | None = None
    verify: bool = True


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The `[config]` table. All durations in seconds.

    Active checks (probes), per server:
    health_check_interval: between two checks of `/health`.
    health_check_timeout: of one check; no answer in time is a failed check.
    health_check_consecutive_failures: failed checks in a row that take a server out.
    health_check_rise: good checks in a row that bring it back.
    enable_active_health_check: false leaves the verdict to real traffic alone.
    health_check_window_size: checks in the sliding window of the next two.
    health_check_min_success_rate: share of good checks in a full window, below which it is out.
    health_check_max_response_time: mean seconds per good check in a full window, above which it
        is out.
    metrics_interval: between two scrapes of `/metrics`.

    Real traffic:
    failure_threshold: consecutive failures by the server's fault until it is ejected.
    auto_recovery_threshold: the first ejection lasts so long; each further one this times the
        number of ejections, at most max(60, itself). Then one trial request decides. A server
        that keeps failing its checks is held back for as long, see docs/reliability.md.
    max_ejected_share: of the servers, may be ejected at a time; one may unless it is 0.
    max_retries: further attempts of a request on other servers, as long as nothing of an answer
        has reached the client.
    replay: whether a request that was already sent may be sent again to another server; a failed
        connect may always go elsewhere.
    policy: how a server is chosen, a name from `routing/policies/`.
    policy_header: whether a request may choose another one by `X-Router-Policy`.

    Knobs of the policies, see docs/routing.md:
    tokens_per_request: prompt tokens to be computed that weigh as much as one request.
    waste_growth: by how much of itself recomputing what another server has cached weighs more
        with each request on the server.
    prefix_memory_mb: memory for the record of cached prefixes, in MB of 10^6 bytes.
    prefix_expiry: an entry of it that was not used for so long is forgotten.
    slow_start: a server that comes back gets its full share again within so long.

    Timeouts of an exchange:
    connect_timeout: to connect to a server, TLS included.
    request_timeout: the ancestor's one timeout; here the default of the next two.
    first_byte_timeout: from the request sent to the first byte of the answer.
    idle_timeout: between two chunks of an answer; unset, the smaller of request_timeout and 300.
    total_timeout: of the whole exchange with all attempts; None for no limit.
    body_timeout: for a client to send its request body.
    write_stall_timeout: a client that takes no byte of its answer for so long is cut off.
    client_idle_timeout: a client's connection is kept open for so long between two requests.

    The router itself:
    max_body_mb: largest request body, in MB of 10^6 bytes.
    max_bodies_mb: all request bodies together that wait to be sent; 503 beyond.
    drain_grace: after SIGTERM, how long it still accepts while `/readyz` already says no.
    drain_timeout: how long running exchanges may then take to finish.
    config_reload_interval: between two looks at this file.
    feed_interval: between two snapshots on the websocket feed.
    allow_engine_control: forward paths such as `/sleep` and `/collective_rpc`, else 403.
    allow_kv_transfer_params: let clients send `kv_transfer_params` and `ec_transfer_params`, which
        name addresses that the engine connects to, else 400.
    allow_data_parallel_rank: let clients send `X-data-parallel-rank`, else 400.
    trusted_proxies: networks whose `X-Forwarded-*` and `Forwarded` headers are believed.
    admin_listen: administration, metrics, feed and page answer at this address only; None for
        the public one.
    cors_origins: whose pages in browsers may use the router, `*` for all; see `origins.py`.
    allowed_hosts: the names it answers to, besides addresses and localhost; none for all.
    """

    health_check_interval: Interval = 2.0
    health_check_timeout: Seconds = 2.0
    health_check_consecutive_failures: Count = 3
    health_check_rise: Count = 2
    enable_active_health_check: Flag = True
    health_check_max_response_time: Seconds = 10.0
    health_check_min_success_rate: Share = 0.8
    health_check_window_size: Count = 10
    failure_threshold: Count = 3
    auto_recovery_threshold: Seconds = 5.0
    max_ejected_share: Share = 0.5
    config_reload_interval: Interval = 1.0
    max_retries: CountOrZero = 3
    request_timeout: Seconds = 600.0
    metrics_interval: Interval = 0.5
    connect_timeout: Seconds = 2.0
    first_byte_timeout: Seconds = 600.0
    idle_timeout: Seconds = 300.0
    total_timeout: SecondsOrNone = None
    body_timeout: Seconds = 60.0
    policy: PolicyName = "adaptive"
    policy_header: Flag = False
    tokens_per_request: Tokens = 1000.0
    waste_growth: Growth = 0.5
    prefix_memory_mb: Megabytes = 64.0
    prefix_expiry: Seconds = 1800.0
    slow_start: SecondsOrZero = 10.0
    max_body_mb: Megabytes = 64.0
    max_bodies_mb: Megabytes = 512.0
    drain_timeout: SecondsOrZero = 30.0
    drain_grace: SecondsOrZero = 0.0
    feed_interval: Interval = 0.5
    replay: Flag = True
    allow_engine_control: Flag = False
    allow_kv_transfer_params: Flag = False
    allow_data_parallel_rank: Flag = False
    trusted_proxies: Networks = ()
    write_stall_timeout: Seconds = 60.0
    client_idle_timeout: Seconds = 75.0
    admin_listen: AddressOrNone = None
    cors_origins: Origins = ()
    allowed_hosts: Hosts = ()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole, valid configuration. `models` has the public names with their rules."""

    servers: tuple[ServerConfig, ...]
    settings: Settings
    models: tuple[tuple[str, ModelRule], ...] = ()
    auth: AuthConfig | None = None
    limits: LimitsConfig | None = None
    tls: TlsConfig | None = None
    log: LogSettings = LogSettings()


_OF_MEMORY = ("max_body_mb", "max_bodies_mb", "prefix_memory_mb")

RESTART = ("admin_listen",)
"""Settings that hold from the next start on."""

_FOLLOWS: dict[str, Callable[[float], float]] = {
    "first_byte_timeout": lambda request_timeout: request_timeout,
    "idle_timeout": lambda request_timeout: min(request_timeout, 300.0),
}
"""What these are, by `request_timeout`, where the file does not say."""

_SERVER_KEYS: dict[str, Any] = {
    "url": Url,
    "name": Name,
    "max_concurrent_requests": Count,
    "weight": Weight,
    "max_in_flight": Count,
    "api_key": ApiKey,
    "api_key_env": Variable,
    "models": Models,
    **SERVER_TLS_KEYS,
}
_SETTING_KEYS: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(Settings)
}
_TABLES = {
    "config": _SETTING_KEYS,
    "servers.servers": _SERVER_KEYS,
    "models.<name>": MODEL_KEYS,
    "auth": AUTH_KEYS,
    "limits": LIMITS_KEYS,
    "tls": TLS_KEYS,
    "log": LOG_KEYS,
}
_KNOWN_TABLES = ("servers", "config", "models", "auth", "limits", "tls", "log")


# -- reading ----------------------------------------------------------------------------------


def parse(
    data: bytes,
    source: str,
    environ: Mapping[str, str],
    read: Callable[[str], bytes] | None = None,
    memory: Memory = Memory(),  # noqa: B008 (never changes)
    policies: Collection[str] | None = None,
) -> Config:
    """The configuration in the bytes of a file called `source`.

    `environ` answers `api_key_env` and the like. `read` gives the bytes of the files that are
    named in it, and raises ConfigError; without it there are none. Defaults fit into `memory`.
    `policies` are the names of the policies that exist; None accepts any name.
    Raises ConfigError with every problem found (at most MAX_PROBLEMS lines), or with the one that
    keeps the bytes from being read as TOML.
    """
    document = load_document(data, source)
    reader = Reader(source, _TABLES, {} if policies is None else {"policies": policies})
    for key in document:
        if key not in _KNOWN_TABLES:
            reader.unknown_key("", key, _KNOWN_TABLES)
    read_file = _files_beside(source, read)
    tls: TlsConfig | None = None
    common: dict[str, Any] = {}
    if "tls" in document:
        tls, common = read_tls(reader, document["tls"], read_file)
    limits: LimitsConfig | None = None
    if "limits" in document:
        limits = LimitsConfig(**reader.table("limits", document["limits"], LIMITS_KEYS))
    servers = _servers(reader, document.get("servers", {}), environ, common, read_file, limits)
    auth = None
    if "auth" in document:
        auth = read_auth(reader, document["auth"], environ, read_file)
        if limits is not None:
            auth = _with_limits(auth, limits)
    models = read_models(reader, document.get("models", {}))
    settings = reader.table("config", document.get("config", {}), _SETTING_KEYS)
    log = reader.table("log", document.get("log", {}), LOG_KEYS)
    _check_bodies(reader, settings, memory)
    reader.raise_problems()
    request_timeout = settings.get("request_timeout", Settings().request_timeout)
    following = {key: follow(request_timeout) for key, follow in _FOLLOWS.items()}
    return Config(
        servers=servers,
        settings=Settings(**{**following, **settings}),
        models=models,
        auth=auth,
        limits=limits,
        tls=tls,
        log=LogSettings(**log),
    )


def _files_beside(source: str, read: Callable[[str], bytes] | None) -> ReadFile:
    """How the files are read that a configuration names: their paths start where it lies."""

    def read_file(path: str) -> tuple[str, bytes]:
        where = os.path.join(os.path.dirname(source), path)
        if read is None:
            raise ConfigError([f"{where}: cannot be read here"])
        return where, read(where)

    return read_file


def _with_limits(auth: AuthConfig, limits: LimitsConfig) -> AuthConfig:
    """The limits of `[limits]` for every key without its own."""

    def limited(key: KeyConfig) -> KeyConfig:
        rate, most = key.requests_per_minute, key.max_concurrent_requests
        return msgspec.structs.replace(
            key,
            requests_per_minute=limits.key_requests_per_minute if rate is None else rate,
            max_concurrent_requests=limits.key_max_concurrent_requests if most is None else most,
        )

    return msgspec.structs.replace(auth, keys=tuple(map(limited, auth.keys)))


def default_settings(memory: Memory) -> Settings:
    """The settings where there is no file."""
    return msgspec.structs.replace(Settings(), **_fitting(memory))


def _fitting(memory: Memory) -> dict[str, float]:
    usual = Settings()
    return fitting({key: getattr(usual, key) for key in _OF_MEMORY}, memory)


def _check_bodies(reader: Reader, settings: dict[str, Any], memory: Memory) -> None:
    """All bodies together may be as large as one, or none of that size could ever pass."""
    defaults = _fitting(memory)
    settings.setdefault("prefix_memory_mb", defaults["prefix_memory_mb"])
    one = settings.setdefault("max_body_mb", defaults["max_body_mb"])
    together = settings.setdefault("max_bodies_mb", max(defaults["max_bodies_mb"], one))
    if together < one:
        reader.problem(
            "config.max_bodies_mb", f"expected at least max_body_mb, {one:g}, got {together:g}"
        )


def _servers(
    reader: Reader,
    table: object,
    environ: Mapping[str, str],
    common: Mapping[str, Any],
    read_file: ReadFile,
    limits: LimitsConfig | None,
) -> tuple[ServerConfig, ...]:
    if isinstance(table, list):
        reader.problem("servers", "expected table, got an array: write [[servers.servers]]")
        return ()
    if not isinstance(table, dict):
        reader.table("servers", table, {})
        return ()
    for key in table:
        if key != "servers":
            reader.unknown_key("servers", key, ("servers",))
    listed = table.get("servers", [])
    if not isinstance(listed, list):
        reader.problem("servers.servers", f"expected array of tables, got {shown_value(listed)}")
        return ()
    if not listed:
        reader.problem("servers.servers", "expected at least one server, got no servers")
    servers: list[ServerConfig] = []
    by_url: dict[str, tuple[str, str]] = {}
    by_name: dict[str, str] = {}
    for n, entry in enumerate(listed):
        path = f"servers.servers[{n}]"
        server = _server(reader, path, entry, environ, common, read_file, limits)
        if server is None:
            continue
        if server.url in by_url:
            first, written = by_url[server.url]
            reader.problem(
                f"{path}.url",
                f"expected every server once, got {quoted(entry['url'])}, "
                f"the same server as {first} ({quoted(written)})",
            )
            continue
        if server.name in by_name:
            reader.problem(
                f"{path}.name",
                f"expected a name of its own, got {quoted(server.name)}, "
                f"which {by_name[server.name]} has",
            )
        by_url[server.url] = path, entry["url"]
        by_name[server.name] = path
        servers.append(server)
    return tuple(servers)


def _server(
    reader: Reader,
    path: str,
    entry: object,
    environ: Mapping[str, str],
    common: Mapping[str, Any],
    read_file: ReadFile,
    limits: LimitsConfig | None,
) -> ServerConfig | None:
    if not isinstance(entry, dict):
        reader.problem(
            path, f'expected table like {{ url = "http://host:8000" }}, got {shown_value(entry)}'
        )
        return None
    values = reader.table(path, entry, _SERVER_KEYS)
    if "url" not in entry:
        reader.problem(f"{path}.url", 'expected a URL like "http://host:8000", got none')
    if "api_key" in entry and "api_key_env" in entry:
        reader.problem(f"{path}.api_key_env", "expected api_key or api_key_env, got both")
    variable = values.pop("api_key_env", None)
    if variable is not None:
        values["api_key"] = reader.variable(f"{path}.api_key_env", variable, environ, ApiKey)
    take_files(reader, path, values, read_file)
    values = {**common, **values}
    check_client_certificate(reader, path, values)
    if "url" not in values:
        return None
    if values.get("api_key") is not None:
        values["api_key"] = Secret(values["api_key"])
    server = ServerConfig(**{"name": server_name(values["url"]), **values})
    if server.max_in_flight is not None and limits is None:
        reader.problem(f"{path}.max_in_flight", "expected a [limits] table beside it, got none")
    if server.max_in_flight is None and limits is not None:
        cap = limits.cap_of(server.max_concurrent_requests)
        server = msgspec.structs.replace(server, max_in_flight=cap)
    return server


# -- the difference of two --------------------------------------------------------------------

_SHOWN_CHANGES = 10


def changes(old: Config, new: Config) -> str:
    """What a reload changes, for the log: `+1 server, -1, request_timeout 120 → 60`.

    Timeouts that only follow `request_timeout` are left out; of keys it says only that they
    changed. Long lists are cut.
    """
    before = {server.url: server for server in old.servers}
    after = {server.url: server for server in new.servers}
    parts = []
    if added := len(after.keys() - before.keys()):
        parts.append(f"+{added} server{'s' if added > 1 else ''}")
    if removed := len(before.keys() - after.keys()):
        parts.append(f"-{removed}" if added else f"-{removed} server{'s' if removed > 1 else ''}")
    details = [
        f"{before[url].name} {change}"
        for url, server in after.items()
        if url in before
        for change in _changed_fields(before[url], server)
    ]
    kept = [url for url in after if url in before]
    if kept != [url for url in before if url in after]:
        details.append("order of servers")
    details += _changed_fields(old.settings, new.settings, ignore=_following(old) & _following(new))
    details += changed_models(old.models, new.models)
    details += _changed_auth(old.auth, new.auth)
    details += _changed_table("limits", old.limits, new.limits)
    details += _changed_table("tls", old.tls, new.tls)
    details += [f"log {change}" for change in _changed_fields(old.log, new.log)]
    parts += details[:_SHOWN_CHANGES]
    if len(details) > _SHOWN_CHANGES:
        parts.append(f"and {len(details) - _SHOWN_CHANGES} more")
    return ", ".join(parts) or "nothing changed"


def _changed_auth(old: AuthConfig | None, new: AuthConfig | None) -> list[str]:
    """Keys by their names; what they are is not shown."""
    if old is None or new is None:
        return [] if old is new else [f"auth {'off' if new is None else 'on'}"]
    before, after = ({key.name: key for key in auth.keys} for auth in (old, new))
    parts = [f"key +{name}" for name in after if name not in before]
    parts += [f"key -{name}" for name in before if name not in after]
    for name in (name for name in after if name in before):
        parts += [f"key {name} {change}" for change in _changed_fields(before[name], after[name])]
    return parts + [f"auth {it}" for it in _changed_fields(old, new, ignore=("keys",))]


def _changed_table(name: str, old: msgspec.Struct | None, new: msgspec.Struct | None) -> list[str]:
    """Of a table that may be missing."""
    if old is None or new is None:
        return [] if old is new else [f"{name} {'off' if new is None else 'on'}"]
    return [f"{name} {change}" for change in _changed_fields(old, new)]


def _following(config: Config) -> set[str]:
    """The timeouts that have the value they would have if the file did not name them."""
    settings = config.settings
    return {
        key
        for key, follow in _FOLLOWS.items()
        if getattr(settings, key) == follow(settings.request_timeout)
    }


def _changed_fields(
    old: msgspec.Struct, new: msgspec.Struct, ignore: Collection[str] = ()
) -> list[str]:
    if old is new or old == new:
        return []
    changed = []
    for field in old.__struct_fields__:
        a, b = getattr(old, field), getattr(new, field)
        if a == b or field in ignore:
            continue
        secret = isinstance(a, Secret) or isinstance(b, Secret)
        if isinstance(a, File) and isinstance(b, File) and a.path == b.path:
            secret = True  # as it was, with something else in it
        changed.append(f"{field} changed" if secret else f"{field} {_brief(a)} → {_brief(b)}")
    return changed


def _brief(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.12g}"
        case tuple():
            text = "".join(map(escaped, f"[{', '.join(value)}]"))
            return text if len(text) <= SHOWN_CHARS else f"[{len(value)} entries]"
    return str(value)
