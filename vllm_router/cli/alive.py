"""Whether the router on this machine answers, told in the exit status; for health checks.

Plain HTTP first, then TLS: whose certificate it is does not matter to a check from the same
machine. A router that greets us and then turns us away, for we have no certificate, is alive.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import sys

TIMEOUT = 1.4
"""Seconds for each of the two."""


def alive(host: str, port: int) -> bool:
    """Whether something there answers as a router does that is alive."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for connection in (
        http.client.HTTPConnection(host, port, timeout=TIMEOUT),
        http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context),
    ):
        greeted = False
        try:
            with contextlib.closing(connection):
                connection.connect()
                greeted = isinstance(connection, http.client.HTTPSConnection)
                connection.request("GET", "/livez")
                return connection.getresponse().status == 200
        except TimeoutError:
            continue
        except (OSError, http.client.HTTPException):
            if greeted:
                return True
    return False


def main(arguments: list[str]) -> int:
    host, _, port = (arguments[0] if arguments else "127.0.0.1:8888").rpartition(":")
    return 0 if alive(host.strip("[]"), int(port)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
