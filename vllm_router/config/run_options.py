"""The `[run]` table: the options of `vllm-router run` that describe its process. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_router.config.types import Front, ListenHost, ListenPort, Workers


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the router is started. An option of the command line or its variable goes before.

    Read at the start only.

    host: address to listen on.
    port: port to listen on; 0 takes a free one.
    workers: processes that serve inference requests.
    front: the HTTP server for inference requests.
    """

    host: ListenHost = "0.0.0.0"
    port: ListenPort = 8888
    workers: Workers = 1
    front: Front = "lane"


RUN_KEYS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(RunOptions)}
