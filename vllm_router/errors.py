"""Whose fault it was: the whole hierarchy on one page.

Exceptions of libraries are translated where they enter (`http/client/`, `config/`); all other
code raises and catches only these.
"""

from __future__ import annotations

from collections.abc import Sequence


class RouterError(Exception):
    """Base of everything the router raises on purpose."""


class ConfigError(RouterError):
    """The operator's configuration is wrong; nothing of it has been applied.

    `problems` holds one line each, with file, key path, what was expected and what was found.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class ServerError(RouterError):
    """A vLLM server let us down; nothing the client did."""


class ConnectFailed(ServerError):
    """No request byte was sent: always safe to try elsewhere."""


class NameNotResolved(ConnectFailed):
    """No address of the server is known, and the resolver gave none: no fault of the server."""


class ConnectionLost(ServerError):
    """The server closed or reset the connection before the answer was complete."""


class NotSent(ConnectionLost):
    """A kept connection turned out closed before the request was written to it."""


class ProtocolViolation(ConnectionLost):
    """The server sent something that is not HTTP/1.1, or framed it ambiguously (RFC 9112 6.3)."""


class UnusablePage(ServerError):
    """A page that a probe asked for is too long, packed in an unknown way, or not what it should
    be. The message says so in words for an operator."""


class OwnFault(RouterError):
    """We ran out of something (descriptors, memory): counts against no server."""


class Refused(RouterError):
    """The router answers by itself, with this status and code in the client's dialect.

    `allow` are the methods that the path has, for a 405.
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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow


class InvalidBody(RouterError):
    """The request body cannot be read, so the model that it asks for is not known.

    The message is a sentence for the client.
    """


class ClientGone(RouterError):
    """The client left; there is nobody to answer."""
