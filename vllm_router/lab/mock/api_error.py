"""Error responses of the API server, in vLLM's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class ApiError(Exception):
    """An error response of the API server."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def body(self, *, anthropic: bool = False) -> bytes:
        """The body as JSON; `anthropic`: in the format of the Messages API, except for validation
        errors.
        """
        # A lone surrogate is valid in JSON, but not in UTF-8.
        message = self.message.encode("utf-8", "replace").decode()
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.status}
        if anthropic and self.kind != "Bad Request":
            short = {"type": self.kind, "message": message}
            return msgspec.json.encode({"type": "error", "error": short})
        return msgspec.json.encode({"error": error})


def bad_request(message: str, param: str) -> ApiError:
    return ApiError(400, message, "BadRequestError", param)


def invalid(problems: Sequence[dict[str, Any]]) -> ApiError:
    """Validation errors of pydantic, formatted by vLLM's handler."""
    plural = "s" if len(problems) != 1 else ""
    lines = "".join(f"\n  {problem}" for problem in problems)
    message = f"{len(problems)} validation error{plural}:{lines}"
    return ApiError(400, message, "Bad Request", problems[0]["loc"])


class UnreadableBody(ApiError):
    """A body that Python's JSON parser does not accept as text: FastAPI's own response."""

    def __init__(self) -> None:
        super().__init__(400, "There was an error parsing the body", "")

    def body(self, *, anthropic: bool = False) -> bytes:
        return msgspec.json.encode({"detail": self.message})


def shown(value: object) -> str:
    if isinstance(value, dict):
        return f"<dict of {len(value)} items>"
    if isinstance(value, list):
        return f"<list of {len(value)} items>"
    return str(value)
