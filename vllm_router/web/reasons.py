"""Reasons as the feed and the JSON pages show them: in English, and as codes with values. Pure."""

from __future__ import annotations

from typing import Any

from vllm_router.fleet.reason import NONE, Reason
from vllm_router.web.schema import Phrase

_REASON = "reason"


def reason_fields(reason: Reason, name: str = _REASON) -> dict[str, Any]:
    """The fields of a reason; the names of all begin with `name`. Not to be changed."""
    if not reason and name == _REASON:
        return _NOTHING  # for most servers, in every snapshot
    return _fields(reason, name)


def _fields(reason: Reason, name: str) -> dict[str, Any]:
    return {
        name: reason.text,
        f"{name}_code": reason.code or None,
        f"{name}_values": reason.values,
        f"{name}_also": [Phrase(other.code, other.values) for other in reason.also],
    }


_NOTHING = _fields(NONE, _REASON)
