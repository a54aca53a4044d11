"""From the bytes of servers.toml to a `Config`, checked once and completely.

A problem is one line, `source:line:column: key.path: expected ..., got ...`, and never holds a
secret.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from vllm_router.config.auth import AUTH_KEYS, KEY_KEYS, AuthConfig, KeyConfig, read_auth
from vllm_router.config.discovery import DiscoveryConfig
from vllm_router.config.discovery_tables import (
    DEFAULT_KEYS,
    DISCOVERY_KEYS,
    KINDS,
    Surroundings,
    read_discovery,
)
from vllm_router.config.limits import LIMITS_KEYS, LimitsConfig
from vllm_router.config.log import LOG_KEYS, LogSettings
from vllm_router.config.memory import MEMORY_SETTINGS, Memory, fit_sizes
from vllm_router.config.models import MODEL_KEYS, read_models
from vllm_router.config.run_options import RUN_KEYS, RunOptions
from vllm_router.config.schema import DERIVED_TIMEOUTS, Config, Settings
from vllm_router.config.server_url import joined, quoted
from vllm_router.config.servers import SERVER_KEYS, read_servers
from vllm_router.config.shared import SHARED_KEYS, SharedConfig, read_shared
from vllm_router.config.slo import OBJECTIVE_KEYS, SLO_KEYS, SloConfig, read_slo
from vllm_router.config.tls import TLS_KEYS, ReadFile, TlsConfig, read_tls
from vllm_router.config.toml_reader import Reader, load_document
from vllm_router.errors import ConfigError

SETTING_KEYS: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(Settings)
}
TABLES = {
    "config": SETTING_KEYS,
    "run": RUN_KEYS,
    "servers.servers": SERVER_KEYS,
    "models.<name>": MODEL_KEYS,
    "auth": AUTH_KEYS,
    "limits": LIMITS_KEYS,
    "tls": TLS_KEYS,
    "log": LOG_KEYS,
    "slo": SLO_KEYS,
    "slo.models.<name>": OBJECTIVE_KEYS,
    "shared": SHARED_KEYS,
    "discovery": DISCOVERY_KEYS,
    **{f"discovery.{kind}": keys for kind, (keys, _) in KINDS.items()},
    "discovery.defaults": DEFAULT_KEYS,
    "auth.keys": KEY_KEYS,
}
_KNOWN_TABLES = (
    *("servers", "discovery", "config", "models", "auth", "limits", "tls", "log", "run", "slo"),
    "shared",
)


def parse(
    data: bytes,
    source: str,
    environ: Mapping[str, str],
    read: Callable[[str], bytes] | None = None,
    memory: Memory = Memory(),  # noqa: B008 (never changes)
    policies: Collection[str] | None = None,
) -> Config:
    """Parse and validate the bytes of a file called `source`.

    `environ` is looked up for `${NAME}`, `api_key_env` and the like. `read` returns the bytes of
    another file that the configuration names, or raises ConfigError; None refuses all such files.
    Defaults are chosen to fit into `memory`. `policies` are the accepted policy names; None
    accepts any name.
    Raises ConfigError with every problem found (at most MAX_PROBLEMS lines), or with one problem
    if the bytes are not TOML.
    """
    document = load_document(data, source, TABLES)
    names = {} if policies is None else {"policies": policies}
    reader = Reader(source, TABLES, names, data)
    document = reader.expand("", document, environ)
    for key, table in document.items():
        if key in _KNOWN_TABLES:
            continue
        if isinstance(table, dict) and table and RUN_KEYS.keys() >= table.keys():
            text = f"unknown table {quoted(key)}, write [run] for {' and '.join(table)}"
            reader.problem(joined("", key), text, at_key=True)
        else:
            reader.unknown_key("", key, _KNOWN_TABLES)
    read_file = _relative_reader(source, read)
    tls: TlsConfig | None = None
    common: dict[str, Any] = {}
    if "tls" in document:
        tls, common = read_tls(reader, document["tls"], read_file)
    limits: LimitsConfig | None = None
    if "limits" in document:
        limits = LimitsConfig(**reader.table("limits", document["limits"], LIMITS_KEYS))
    discovery: DiscoveryConfig | None = None
    if "discovery" in document:
        around = Surroundings(source, environ, read_file, common)
        discovery = read_discovery(reader, document["discovery"], around)
    servers = read_servers(
        reader,
        document.get("servers", {}),
        environ,
        common,
        read_file,
        limits,
        may_be_empty="discovery" in document,
    )
    auth = None
    if "auth" in document:
        auth = read_auth(reader, document["auth"], environ, read_file)
        if limits is not None:
            auth = _with_limits(auth, limits)
    shared: SharedConfig | None = None
    if "shared" in document:
        shared = read_shared(reader, document["shared"], environ, read_file)
    models = read_models(reader, document.get("models", {}))
    settings = reader.table("config", document.get("config", {}), SETTING_KEYS)
    log = reader.table("log", document.get("log", {}), LOG_KEYS)
    slo: SloConfig | None = None
    if "slo" in document:
        slo = read_slo(reader, document["slo"])
    run = reader.table("run", document.get("run", {}), RUN_KEYS)
    _check_run(reader, run)
    _set_sizes(reader, settings, memory)
    reader.raise_problems()
    request_timeout = settings.get("request_timeout", Settings().request_timeout)
    derived = {key: derive(request_timeout) for key, derive in DERIVED_TIMEOUTS.items()}
    return Config(
        servers=servers,
        settings=Settings(**{**derived, **settings}),
        models=models,
        auth=auth,
        limits=limits,
        tls=tls,
        log=LogSettings(**log),
        discovery=discovery,
        slo=slo,
        run=RunOptions(**run),
        shared=shared,
    )


def _check_run(reader: Reader, run: Mapping[str, Any]) -> None:
    if run.get("workers", 1) > 1 and run.get("front", "lane") != "lane":
        reader.problem(
            "run.workers", 'expected 1 with front = "hypercorn", which serves in one process only'
        )


def _relative_reader(source: str, read: Callable[[str], bytes] | None) -> ReadFile:
    """Read files by paths relative to the directory of `source`."""

    def read_file(path: str) -> tuple[str, bytes]:
        where = os.path.join(os.path.dirname(source), path)
        if read is None:
            raise ConfigError([f"{where}: other files cannot be read here"])
        return where, read(where)

    return read_file


def _with_limits(auth: AuthConfig, limits: LimitsConfig) -> AuthConfig:
    """Apply the defaults of `[limits]` to keys without limits of their own."""

    def limited(key: KeyConfig) -> KeyConfig:
        rate, most = key.requests_per_minute, key.max_concurrent_requests
        return msgspec.structs.replace(
            key,
            requests_per_minute=limits.key_requests_per_minute if rate is None else rate,
            max_concurrent_requests=limits.key_max_concurrent_requests if most is None else most,
        )

    return msgspec.structs.replace(auth, keys=tuple(map(limited, auth.keys)))


def default_settings(memory: Memory) -> Settings:
    """The settings of a router without a configuration file."""
    return msgspec.structs.replace(Settings(), **_default_sizes(memory))


def _default_sizes(memory: Memory) -> dict[str, float]:
    defaults = Settings()
    return fit_sizes({key: getattr(defaults, key) for key in MEMORY_SETTINGS}, memory)


def _set_sizes(reader: Reader, settings: dict[str, Any], memory: Memory) -> None:
    """Add the sizes that the file leaves out; check that the largest body fits among all."""
    defaults = _default_sizes(memory)
    settings.setdefault("prefix_memory_mb", defaults["prefix_memory_mb"])
    one = settings.setdefault("max_body_mb", defaults["max_body_mb"])
    together = settings.setdefault("max_bodies_mb", max(defaults["max_bodies_mb"], one))
    if together < one:
        reader.problem(
            "config.max_bodies_mb", f"expected at least max_body_mb ({one:g}), got {together:g}"
        )
