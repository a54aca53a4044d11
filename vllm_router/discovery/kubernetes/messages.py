"""Decoding of the API's answers: lists and watch events. Pure."""

from __future__ import annotations

import msgspec

from vllm_router.discovery.kubernetes.slices import EndpointSlice, Metadata

MAX_EVENT_BYTES = 4_000_000
"""Longest line of a watch; a slice has at most 1000 endpoints, about 500 kB."""


class UnusableMessage(Exception):
    """The API's answer cannot be used; the message is for operators."""


class _List(msgspec.Struct):
    metadata: Metadata
    items: list[msgspec.Raw] | None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""
    metadata: Metadata = msgspec.field(default_factory=Metadata)


class SliceList(msgspec.Struct):
    """The slices by name, the version of the list, and a line for each slice that was left out."""

    slices: dict[str, EndpointSlice]
    version: str
    problems: list[str]


class Change(msgspec.Struct):
    """One event of a watch: a slice that is new or changed (None if removed), by name."""

    name: str
    slice: EndpointSlice | None


def read_list(data: bytes) -> SliceList:
    """Decode a list. Raises UnusableMessage."""
    try:
        listed = msgspec.json.decode(data, type=_List)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnusableMessage(f"expected a list of EndpointSlices: {error}") from None
    result = SliceList({}, listed.metadata.resource_version, [])
    for number, item in enumerate(listed.items or ()):
        try:
            one = msgspec.json.decode(item, type=EndpointSlice)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            result.problems.append(f"items[{number}]: {error}")
        else:
            result.slices[one.metadata.name] = one
    return result


def read_event(line: bytes) -> Change | None:
    """Decode a line of a watch; None for a bookmark.

    Raises UnusableMessage for an error event (410: the version has expired) or any other message:
    the watch cannot go on then.
    """
    try:
        event = msgspec.json.decode(line, type=_Event)
        if event.type == "BOOKMARK":
            return None
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            raise UnusableMessage(f"error event {status.code}: {status.message}")
        one = msgspec.json.decode(event.object, type=EndpointSlice)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnusableMessage(f"expected an event with an EndpointSlice: {error}") from None
    if event.type not in ("ADDED", "MODIFIED", "DELETED"):
        raise UnusableMessage("expected an event ADDED, MODIFIED or DELETED, got another")
    return Change(one.metadata.name, None if event.type == "DELETED" else one)


def status_message(data: bytes) -> str:
    """The message of a Status answer; empty if it is none."""
    try:
        return msgspec.json.decode(data, type=_Status).message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
