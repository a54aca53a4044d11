"""The structs of `[discovery]`: sources of servers, and the targets that they find. Pure.

`discovery_tables.py` reads the tables, `discovered.py` makes servers of the targets.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from vllm_router.config.tls import File
from vllm_router.config.types import Secret

Options = tuple[tuple[str, Any], ...]
"""Keys of a server with their values, as `[[servers.servers]]` has them."""


class TargetState(enum.StrEnum):
    """What a source says about a target.

    UP: it may get requests. DRAIN: it is about to stop; it gets no new requests. WAIT: it is not
    ready yet, or not any more.
    """

    UP = "up"
    DRAIN = "drain"
    WAIT = "wait"


class Found(NamedTuple):
    """A target as a source found it, not checked yet.

    `address` is host:port or a URL. `labels` are keys of a server with their values as text.
    Targets with a higher `priority` number are used when all others fail.
    """

    address: str
    name: str | None = None
    state: TargetState = TargetState.UP
    labels: Mapping[str, str] = {}
    priority: int = 0


class Target(msgspec.Struct, frozen=True):
    """A valid target. `options` are the keys of a server that its labels set."""

    url: str
    name: str | None = None
    state: TargetState = TargetState.UP
    options: Options = ()
    priority: int = 0


Targets = tuple[Target, ...]


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A source; subclasses have the keys of one kind.

    name: unique among all sources; in logs, metrics, `/health` and the page.
    scheme: of targets that are given without one.
    defaults: options of its servers without labels, those for all sources and `[tls.servers]`
        included.
    """

    name: str
    scheme: str = "http"
    defaults: Options = ()


class FileSource(SourceConfig, frozen=True, kw_only=True):
    """Files in the format of Prometheus' file_sd, JSON or YAML.

    paths: file names or patterns, relative ones below the directory of the configuration file.
    interval: seconds between two looks.
    """

    paths: tuple[str, ...]
    interval: float = 1.0


class WebSource(SourceConfig, frozen=True, kw_only=True):
    """A source that is asked over HTTP.

    url: of the document or the API.
    timeout: seconds for a whole answer.
    api_key: bearer token.
    ca, client_certificate, client_key, verify: as for a server.
    """

    url: str
    timeout: float = 10.0
    api_key: Secret | None = None
    ca: File | None = None
    client_certificate: File | None = None
    client_key: File | None = None
    verify: bool = True


class HttpSource(WebSource, frozen=True, kw_only=True):
    """A document in the format of Prometheus' http_sd.

    interval: seconds between two requests.
    headers: further request headers.
    """

    interval: float = 30.0
    headers: tuple[tuple[str, Secret], ...] = ()


class DnsSource(SourceConfig, frozen=True, kw_only=True):
    """The records of a name in DNS.

    domain: the name. type: A, AAAA or SRV.
    port: of the servers; None for SRV, whose records have one.
    nameservers: addresses and ports; empty for the ones in /etc/resolv.conf.
    interval: longest time in seconds between two lookups.
    timeout: seconds for a lookup with all nameservers.
    """

    domain: str
    type: str
    port: int | None = None
    nameservers: tuple[tuple[str, int], ...] = ()
    interval: float = 30.0
    timeout: float = 5.0


class KubernetesSource(WebSource, frozen=True, kw_only=True):
    """The EndpointSlices of a namespace that a label selector matches.

    url: of the API server.
    selector: a label selector; for a Service, the label that its slices have.
    port: name or number; None if the slices have only one.
    token_file: read before every request, because it is rotated; None for `api_key`.
    """

    namespace: str
    selector: str
    port: str | int | None = None
    token_file: str | None = None


class DiscoveryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The `[discovery]` table.

    sources: in the order of the file. The first source that names a URL wins.
    keep_for: seconds for which an empty set of targets is not believed, as long as the servers
        answer their checks.
    second_look: the same for a set that lacks more than half of the servers.
    label_keys: API keys that labels may choose, by the name of their environment variable.
    """

    sources: tuple[SourceConfig, ...]
    keep_for: float = 300.0
    second_look: float = 30.0
    label_keys: tuple[tuple[str, Secret], ...] = ()
