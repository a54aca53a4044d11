"""Errors of a Redis, in words for operators. Imports nothing of the client library."""

from __future__ import annotations

import ssl

MAX_TEXT = 200
"""Characters of an error of the store that are shown."""

_OF_CLUSTERS = ("MovedError", "AskError", "ClusterDownError", "ClusterCrossSlotError")
"""Classes of the client library for the errors MOVED, ASK and so on."""

MAX_CAUSES = 10
"""Causes of an error that are looked through for the system's reason."""


class BadAnswer(Exception):
    """The Redis has sent data that no client can use."""


class TooLong(BadAnswer):
    """The Redis has answered with more than these bytes."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the answer has more than {most >> 20} MB")


class Unasked(BadAnswer):
    """The Redis has sent answers to no command, or messages."""

    def __init__(self) -> None:
        super().__init__("it sent answers to no command")


def words_of(error: BaseException) -> str:
    """The error on one short line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    if type(error).__name__ in _OF_CLUSTERS:
        text = f"it is part of a cluster; name a Redis without cluster mode ({text})"
    reason = _reason(error)
    if reason:
        text = f"{text}: {reason}"
    return "".join(char if char.isprintable() else "?" for char in text)[:MAX_TEXT]


def _reason(error: BaseException) -> str:
    """The innermost reason for a failed connection; empty if there is none."""
    found = ""
    cause = error.__cause__ or error.__context__
    for _ in range(MAX_CAUSES):
        if cause is None:
            break
        if isinstance(cause, TimeoutError):
            found = "no answer in time"
        elif isinstance(cause, ssl.SSLWantReadError):
            found = "no answer with TLS"
        elif isinstance(cause, BadAnswer):
            found = str(cause)
        elif isinstance(cause, OSError) and cause.strerror:
            found = cause.strerror
        inner = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else None
        cause = inner or cause.__cause__ or cause.__context__
    return found
