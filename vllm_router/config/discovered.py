"""From what sources find to servers: checks of targets, and the merge with `[servers]`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from vllm_router.config.discovery import (
    DiscoveryConfig,
    Found,
    Options,
    SourceConfig,
    Target,
    Targets,
    TargetState,
)
from vllm_router.config.limits import LimitsConfig
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.config.server_url import normalise_url, quoted, server_name
from vllm_router.config.servers import SERVER_KEYS, make_server
from vllm_router.config.toml_reader import Reader
from vllm_router.config.types import Name
from vllm_router.errors import ConfigError

MAX_TARGETS = 10_000
"""Targets of one source that are used."""

LABELS: dict[str, Any] = {
    key: SERVER_KEYS[key]
    for key in ("max_concurrent_requests", "weight", "max_in_flight", "api_key_env", "models")
}
"""Keys of a server that labels may set, besides `name`, `scheme` and `state`.

Not among them: files and `verify`, which decide what the router trusts.
"""

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?")


class Read(NamedTuple):
    """The valid targets of a set, by URL, and a line for each problem."""

    targets: Targets
    problems: tuple[str, ...]


def read_targets(found: Iterable[Found], source: SourceConfig, discovery: DiscoveryConfig) -> Read:
    """Check the targets of a source. A bad target is a problem, and left out.

    Of several targets with one URL, the first one in the best state is used: UP, else WAIT, else
    DRAIN; of these one with the lowest priority number.
    """
    keys = dict(discovery.label_keys)
    targets: dict[str, Target] = {}
    problems: list[str] = []
    for number, one in enumerate(found):
        if number >= MAX_TARGETS:
            problems.append(f"expected at most {MAX_TARGETS} targets, got more: left out the rest")
            break
        try:
            target = _read_target(one, source, keys)
        except ConfigError as error:
            problems += error.problems
            continue
        known = targets.get(target.url)
        if known is None or _rank(target) < _rank(known):
            targets[target.url] = target
    return Read(tuple([targets[url] for url in sorted(targets)]), tuple(problems))


_RANKS = {TargetState.UP: 0, TargetState.WAIT: 1, TargetState.DRAIN: 2}


def _rank(target: Target) -> tuple[int, int]:
    return _RANKS[target.state], target.priority


def _read_target(found: Found, source: SourceConfig, keys: Mapping[str, Any]) -> Target:
    """Raises ConfigError with one line per problem, which names the target."""
    reader = Reader(quoted(found.address), {"the labels of a target": LABELS})
    labels = dict(found.labels)
    scheme = labels.pop("scheme", source.scheme).lower()
    url = found.address if "://" in found.address else f"{scheme}://{found.address}"
    try:
        url = normalise_url(url)
    except ValueError as error:
        reader.problem("address", str(error))
    name = labels.pop("name", None) or found.name
    state = labels.pop("state", found.state)
    if state not in TargetState.__members__.values():
        reader.problem("state", f'expected "up", "drain" or "wait", got {quoted(state)}')
        state = TargetState.UP
    options = _read_labels(reader, labels)
    if "api_key_env" in options:
        variable = options.pop("api_key_env")
        if variable in keys:
            options["api_key"] = keys[variable]
        else:
            reader.problem("api_key_env", "expected one of discovery.label_key_envs, got another")
    if name is not None:
        reader.value("name", name, Name)
    reader.raise_problems()
    return Target(url, name, TargetState(state), tuple(options.items()), found.priority)


def _read_labels(reader: Reader, labels: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, object] = {}
    for key, text in labels.items():
        text = text.strip()
        if key == "models":
            values[key] = [name.strip() for name in text.split(",")]
        elif _NUMBER.fullmatch(text) and key != "api_key_env":
            values[key] = float(text) if "." in text else int(text)
        else:
            values[key] = text
    return reader.table("", values, LABELS)


# -- merge ------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """A configuration with the servers of all sources; the problems of targets by source."""

    config: Config
    problems: Mapping[str, tuple[str, ...]]


def merge(config: Config, found: Mapping[str, Targets]) -> Merged:
    """Add the servers that the sources have found to the servers of the file.

    Where both name a URL the file wins, then the earlier source. Only targets that are UP become
    servers. A name that another server has is replaced by host:port. Servers of an earlier merge
    are replaced. `found` may have sources that the configuration does not.
    """
    base = without_discovered(config)
    if base.discovery is None:
        return Merged(base, {})
    servers = {server.url: server for server in base.servers}
    names = {server.name for server in base.servers}
    problems: dict[str, tuple[str, ...]] = {}
    answered: list[tuple[str, Targets]] = []
    for source in base.discovery.sources:
        if source.name not in found:
            continue
        answered.append((source.name, found[source.name]))
        lines: list[str] = []
        for target in found[source.name]:
            if target.state is not TargetState.UP or target.url in servers:
                continue
            name = _free_name(target, names)
            if name is None:
                lines.append(f"{target.url}: another server has its name {server_name(target.url)}")
                continue
            values = {**dict(source.defaults), **dict(target.options)}
            server = _make(target, name, source, values, base.limits)
            if base.limits is None and server.max_in_flight is not None:
                lines.append(f"{target.url}: max_in_flight has no effect without [limits]")
                server = msgspec.structs.replace(server, max_in_flight=None)
            servers[target.url] = server
            names.add(name)
        if lines:
            problems[source.name] = tuple(lines)
    merged = msgspec.structs.replace(base, servers=tuple(servers.values()), found=tuple(answered))
    return Merged(merged, problems)


def _free_name(target: Target, names: set[str]) -> str | None:
    """The target's name, or host:port if another server has it; None if that is taken, too."""
    for name in (target.name, server_name(target.url)):
        if name and name not in names:
            return name
    return None


def _make(
    target: Target,
    name: str,
    source: SourceConfig,
    values: Mapping[str, Any],
    limits: LimitsConfig | None,
) -> ServerConfig:
    return make_server({**values, "url": target.url, "name": name, "source": source.name}, limits)


def without_discovered(config: Config) -> Config:
    """The part of a merged configuration that is in the file."""
    if not config.found:
        return config
    own = tuple([server for server in config.servers if server.source is None])
    return msgspec.structs.replace(config, servers=own, found=())


def server_options(config: ServerConfig) -> Options:
    """The options of a server that a source has found, without its secrets."""
    shown = ("max_concurrent_requests", "weight", "max_in_flight", "models")
    return tuple([(key, getattr(config, key)) for key in shown])
