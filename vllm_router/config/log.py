"""The `[log]` table. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_router.config.types import AccessLog, Flag, LogFormat, LogLevel


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is written about what happens.

    level: of the router's own log lines; debug, info, warning or error.
    format: text or json, of log lines and access lines.
    access: a line for each finished exchange: true, among the log lines; a path, in a file of
        their own ("-" is stdout); false, none.
    prompts: hash the prompts for the access log, whatever the policy, so that it can be replayed
        in the simulator. No text can be had from the hashes.
    otel: export spans, as OTEL_EXPORTER_OTLP_ENDPOINT in the environment does, too. Read at the
        start only.
    """

    level: LogLevel = "info"
    format: LogFormat = "text"
    access: AccessLog = True
    prompts: Flag = False
    otel: Flag = False


LOG_KEYS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(LogSettings)}
