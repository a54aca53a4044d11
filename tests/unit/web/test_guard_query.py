"""Queries with very many fields, which would delay all other requests while they are parsed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from support.fleet_makers import make_config
from unit.config.test_auth import read
from unit.proxy.test_head_memo import KEY, KEYS
from vllm_router.config.auth import AuthConfig
from vllm_router.config.schema import Config
from vllm_router.config.types import digest_of
from vllm_router.errors import Refused
from vllm_router.routing.paths import classify
from vllm_router.web.guard import MAX_QUERY_FIELDS, Guard


def scope_of(method: str, path: str, query: bytes, kind: str = "http") -> dict[str, Any]:
    return {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(b"host", b"r"), (b"authorization", b"Bearer " + KEY.encode())],
    }


CASES = [
    *("GET /explain", "GET /metrics", "GET /v1/models", "GET /", "POST /admin/drain"),
    *("POST /v1/chat/completions", "GET /ws/load"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("separators", [b"a&", b"&", b"key=1&"])
def test_guard_query_of_many_fields_is_refused(case, separators):
    method, path = case.split()
    kind = "websocket" if path == "/ws/load" else "http"
    scope = scope_of(method, path, separators * MAX_QUERY_FIELDS, kind)
    with pytest.raises(Refused, match="1000 fields") as refused:
        Guard(read(KEYS)).admit(scope, classify(method, path.encode()))
    assert refused.value.status == 400


@pytest.mark.parametrize("auth", [None, "admin"])
def test_guard_query_that_would_be_searched_for_credentials_is_bounded(auth):
    """A server with a key of its own gets the query without credentials, at each attempt."""
    config = make_config(2)
    servers = (config.servers[0], msgspec.structs.replace(config.servers[1], api_key="sk-1"))
    only_admin = AuthConfig(admin_key=digest_of("sk-admin")) if auth else None
    config = msgspec.structs.replace(config, auth=only_admin)
    path = "/v1/chat/completions"

    def admit(query: bytes, config: Config) -> None:
        Guard(config).admit(scope_of("POST", path, query), classify("POST", path.encode()))

    admit(b"a=1&" * (MAX_QUERY_FIELDS - 1), msgspec.structs.replace(config, servers=servers))
    admit(b"a&" * 30_000, config)  # nothing reads it
    with pytest.raises(Refused, match="1000 fields"):
        admit(b"a&" * MAX_QUERY_FIELDS, msgspec.structs.replace(config, servers=servers))


def test_guard_query_with_some_fields_is_admitted():
    query = b"&".join([b"a=1"] * MAX_QUERY_FIELDS)
    scope = scope_of("GET", "/v1/models", query)
    Guard(read(KEYS)).admit(scope, classify("GET", b"/v1/models"))
    assert scope["query_string"] == query
