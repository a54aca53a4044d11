"""The `[[servers.servers]]` tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_router.config.limits import LimitsConfig
from vllm_router.config.schema import ServerConfig
from vllm_router.config.server_url import quoted, server_name
from vllm_router.config.tls import (
    SERVER_TLS_KEYS,
    ReadFile,
    check_client_certificate,
    take_files,
)
from vllm_router.config.toml_reader import Reader, shown_value
from vllm_router.config.types import (
    ApiKey,
    Models,
    Name,
    PositiveInt,
    Secret,
    Url,
    Variable,
    Weight,
)

SERVER_KEYS: dict[str, Any] = {
    "url": Url,
    "name": Name,
    "max_concurrent_requests": PositiveInt,
    "weight": Weight,
    "max_in_flight": PositiveInt,
    "api_key": ApiKey,
    "api_key_env": Variable,
    "models": Models,
    **SERVER_TLS_KEYS,
}


def read_servers(
    reader: Reader,
    table: object,
    environ: Mapping[str, str],
    common: Mapping[str, Any],
    read_file: ReadFile,
    limits: LimitsConfig | None,
    *,
    may_be_empty: bool = False,
) -> tuple[ServerConfig, ...]:
    """Read the servers; problems go to `reader`. `may_be_empty`: there are other sources."""
    if isinstance(table, list):
        reader.problem(
            "servers",
            "expected table, got an array: write [[servers.servers]], or put it below [servers]",
        )
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
    if not listed and not may_be_empty:
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
    values = read_values(reader, path, entry, SERVER_KEYS, environ, read_file)
    if "url" not in entry:
        reader.problem(f"{path}.url", 'expected a URL like "http://host:8000", got none')
    values = {**common, **values}
    check_client_certificate(reader, path, values)
    if "url" not in values:
        return None
    if values.get("max_in_flight") is not None and limits is None:
        reader.problem(f"{path}.max_in_flight", "expected a [limits] table beside it, got none")
    return make_server(values, limits)


def read_values(
    reader: Reader,
    path: str,
    table: Mapping[str, Any],
    keys: Mapping[str, Any],
    environ: Mapping[str, str],
    read_file: ReadFile,
) -> dict[str, Any]:
    """The valid values of some keys of a server; `api_key_env` becomes `api_key`."""
    values = reader.table(path, table, keys)
    if "api_key" in table and "api_key_env" in table:
        reader.problem(f"{path}.api_key_env", "expected api_key or api_key_env, got both")
    variable = values.pop("api_key_env", None)
    if variable is not None:
        values["api_key"] = reader.variable(f"{path}.api_key_env", variable, environ, ApiKey)
    take_files(reader, path, values, read_file)
    if values.get("api_key") is not None:
        values["api_key"] = Secret(values["api_key"])
    return values


def make_server(values: Mapping[str, Any], limits: LimitsConfig | None) -> ServerConfig:
    """A server of valid values, with the cap that `[limits]` sets."""
    server = ServerConfig(**{"name": server_name(values["url"]), **values})
    if server.max_in_flight is None and limits is not None:
        cap = limits.cap_of(server.max_concurrent_requests)
        server = msgspec.structs.replace(server, max_in_flight=cap)
    return server
