"""The `[log]` table. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_router.config.types import AccessLog, Bool, LogFormat, LogLevel


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Logging and tracing.

    level: of the router's own log lines: debug, info, warning or error.
    format: of log lines and access lines: text or json.
    access: the access log, one line per finished exchange: true for the normal log, a path for a
        separate file ("-" is stdout), false for none.
    prompts: add block hashes of prompts to the access log, so that the simulator can replay it.
        The hashes reveal no text.
    otel: export spans, as does OTEL_EXPORTER_OTLP_ENDPOINT in the environment. Read at the start
        only.
    """

    level: LogLevel = "info"
    format: LogFormat = "text"
    access: AccessLog = True
    prompts: Bool = False
    otel: Bool = False


LOG_KEYS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(LogSettings)}
