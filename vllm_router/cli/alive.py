"""Health check of a router on this machine, reported as the exit code.

Tries plain HTTP first, then TLS without verification, because the check stays on the machine. A
router that completes the TLS handshake and then rejects the missing client certificate is alive.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import sys

TIMEOUT = 1.4
"""Seconds for each of the two attempts."""


def alive(host: str, port: int) -> bool:
    """True if a router answers there."""
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
