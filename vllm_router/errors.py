"""The exception hierarchy, ordered by the party at fault: client, server, or router.

Exceptions of libraries are translated where they enter (`http/client/`, `config/`); all other
code raises and catches only these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

NO_VALUES: Mapping[str, str] = MappingProxyType({})


class RouterError(Exception):
    """Base of all exceptions that the router raises on purpose."""


class Problem(NamedTuple):
    """The parts of a line about a configuration: file and position, key path, what is wrong."""

    where: str
    key: str
    reason: str


class ConfigError(RouterError):
    """The configuration is invalid; nothing of it has been applied.

    `problems` has one line each, with file, position, key path, the expected and the actual value.
    `excerpts` has by problem the line of the file with a mark below the position, where known;
    `parts` the parts of the line, where it is about a key. `passing` is True if a file is there but
    could not be read just now (no descriptors left, an I/O error): the same file may be good later.
    """

    def __init__(
        self,
        problems: Sequence[str],
        excerpts: Mapping[str, str] | None = None,
        parts: Mapping[str, Problem] | None = None,
        *,
        passing: bool = False,
    ) -> None:
        super().__init__("; ".join(problems))
        self.passing = passing
        self.problems = tuple(problems)
        self.excerpts = dict(excerpts or {})
        self.parts = dict(parts or {})


class ServerError(RouterError):
    """A vLLM server failed, by no fault of the client."""


class ConnectFailed(ServerError):
    """No byte of the request was sent: a retry is always safe."""


class NameNotResolved(ConnectFailed):
    """The server's name has no address; does not count against the server."""


class ConnectionLost(ServerError):
    """The server closed or reset the connection before the response was complete."""


class NotSent(ConnectionLost):
    """A keep-alive connection was found closed before the request was written."""


class ProtocolViolation(ConnectionLost):
    """The server sent something that is not HTTP/1.1, or framed it ambiguously (RFC 9112 6.3)."""


class UnusablePage(ServerError):
    """A page requested by a probe is too long, has an unknown encoding, or is invalid.

    The message is for operators.
    """


class OwnFault(RouterError):
    """The router ran out of a resource (descriptors, memory); counts against no server."""


class Refused(RouterError):
    """The router refuses a request with this status and code, in the client's dialect.

    param: the parameter at fault, if any.
    retry_after: seconds for `Retry-After`; None for no header.
    allow: the methods of the path, for a 405.
    values: the values in the message by name, for displays that translate the code.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        allow: Sequence[str] = (),
        values: Mapping[str, str] = NO_VALUES,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow
        self.values = values


class InvalidBody(RouterError):
    """The request body cannot be read, so its model is unknown.

    The message is a sentence for the client.
    """


class ClientGone(RouterError):
    """The client has disconnected."""
