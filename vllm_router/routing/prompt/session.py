"""The session of a request: the first usable id in a list of headers and body fields.

Sources are strings as `config/session_sources.py` describes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha1
from typing import NamedTuple

import msgspec

from vllm_router.config.session_sources import SESSION_SOURCES
from vllm_router.routing.prompt.fields import NO_JSON, Fields

SHORTEST = 4
"""Characters. Shorter ids are counters or placeholders, which many clients have in common."""

LONGEST = 256
"""Characters of an id that is kept; of a longer one a digest is."""

_WORDS = (
    *(
        "anon",
        "anonymous",
        "chat",
        "client",
        "conversation",
        "default",
        "dummy",
        "empty",
        "example",
    ),
    *("false", "guest", "id", "main", "my", "nil", "no", "none", "not", "null", "object"),
    *("placeholder", "session", "set", "string", "system", "test", "thread", "true", "undefined"),
    *("unknown", "unset", "user", "username", "your"),
)
_PLACEHOLDER = re.compile(
    r"(?:{words})(?:[-_. ]?(?:{words}))*".format(words="|".join(_WORDS)), re.IGNORECASE
)
"""Words that name no session, alone or together: `default`, `test-session`, `your_user_id`."""

_AROUND = " \t\"'`()[]"
"""Characters that placeholders stand in: `"default"`, `(null)`, `[object Object]`."""

_TEMPLATE = re.compile(
    r"\$\{.*\}|\$\(.*\)|\$[A-Za-z_]+|\{\{.*\}\}|\{[A-Za-z_. -]+\}|<.*>|%[^%]+%|__[A-Z_]+__"
)
"""A variable that the client has not replaced."""

_LEGACY_SESSION = re.compile(r"_session_([0-9A-Za-z-]{8,})$")
"""Claude Code's `metadata.user_id` before 2.1: user_…_account_…_session_…"""

USER_SOURCES = frozenset({"body:metadata.user_id", "body:user"})
"""Sources that name a user, whose agents are distinguished by their conversations."""


class _Metadata(msgspec.Struct, gc=False):
    user_id: str | int | None = None


class _UserId(msgspec.Struct, gc=False):
    """Claude Code's `metadata.user_id` since 2.1: JSON in a string."""

    session_id: str | None = None


_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_user_id = msgspec.json.Decoder(_UserId).decode


class SessionHint(NamedTuple):
    """What the head of a request says of its session.

    session, source: the id and its source; None and "" without one in the head.
    fields: fields of the body that precede this source, as (name, source).
    """

    session: str | None
    source: str
    fields: tuple[tuple[str, str], ...]


class _Header(NamedTuple):
    """A source in the head: the names of its fields, and the body fields that precede it."""

    source: str
    names: tuple[bytes, ...]
    before: tuple[tuple[str, str], ...]


@lru_cache(maxsize=16)
def _compiled(sources: Sequence[str]) -> tuple[tuple[_Header, ...], SessionHint]:
    """The sources in the head, in order, and the hint of a head without any of them."""
    headers: list[_Header] = []
    before: list[tuple[str, str]] = []
    for source in sources:
        kind, _, name = source.partition(":")
        if kind == "header":
            names = tuple(one.encode() for one in name.split("+"))
            headers.append(_Header(source, names, tuple(before)))
        else:
            before.append((name, source))
    return tuple(headers), SessionHint(None, "", tuple(before))


def session_hint(
    headers: Mapping[bytes, bytes], sources: Sequence[str] = SESSION_SOURCES
) -> SessionHint:
    """The session by these headers (names in lower case), and the body fields that precede it."""
    in_head, without = _compiled(sources)
    for source, names, before in in_head:
        if names[0] in headers:
            found = [headers.get(name, b"").decode("latin-1").strip() for name in names]
            session = "/".join(filter(None, found))
            if "," in session:
                found = [_each_once(values, at == 0) for at, values in enumerate(found)]
                session = "/".join(filter(None, found))
            if is_usable(found[0]):
                return SessionHint(bounded(session), source, before)
    return without


def session_of(hint: SessionHint, fields: Fields, conversation: int) -> tuple[str | None, str]:
    """The session and its source; None and "" if the request names none.

    `conversation` is the hash of the conversation's first turn, 0 if it is not known. A user is a
    session only together with it: one user may run twenty agents.
    """
    for name, source in hint.fields:
        is_nested = name == "metadata.user_id"
        value: object = _user_id(fields.metadata) if is_nested else getattr(fields, name)
        if not value:
            continue
        if not isinstance(value, str):
            value = str(value)
        if source in USER_SOURCES:
            session = claude_code_session(value)
            if session is not None:
                return session, source
            if conversation and is_usable(value):
                return bounded(f"{value}/{conversation:08x}"), source
        elif is_usable(value):
            return bounded(value), source
    return hint.session, hint.source


def is_usable(text: str) -> bool:
    """False for ids that many clients may have in common: very short ones and placeholders."""
    return _is_usable(text[: LONGEST + 1])


@lru_cache(maxsize=2048)
def _is_usable(beginning: str) -> bool:
    text = beginning.strip()
    if len(text) < SHORTEST or _TEMPLATE.fullmatch(text):
        return False
    if _PLACEHOLDER.fullmatch(text.strip(_AROUND)):
        return False
    return len(set(text.replace("-", ""))) > 1  # a UUID of zeros


def _each_once(values: str, only_usable: bool) -> str:
    """A header that was sent several times, which arrives as one: without repeated values."""
    found = dict.fromkeys(value.strip(", ") for value in values.split(", "))
    return ", ".join(value for value in found if (is_usable(value) if only_usable else value))


def bounded(text: str) -> str:
    """The id, or a digest of a long one."""
    if len(text) <= LONGEST:
        return text
    return sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


def claude_code_session(user_id: str) -> str | None:
    """The session within Claude Code's `metadata.user_id`, which gateways also send as `user`."""
    if user_id[:1] == "{":
        try:
            session = _decode_user_id(user_id).session_id
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        return bounded(session) if session is not None and is_usable(session) else None
    legacy = _LEGACY_SESSION.search(user_id[-200:])
    return legacy[1] if legacy is not None and is_usable(legacy[1]) else None


def _user_id(metadata: msgspec.Raw) -> str | int | None:
    if metadata is NO_JSON:
        return None
    try:
        return _decode_metadata(metadata).user_id
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
