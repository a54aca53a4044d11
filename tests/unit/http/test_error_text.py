"""What operators read of a failed request of the router's own."""

from __future__ import annotations

import errno
import socket
import ssl

import httpx
import pytest

from vllm_router.http.client.error_text import describe


def caused(cause: BaseException | None, text: str = "long") -> httpx.ConnectError:
    error = httpx.ConnectError(text)
    error.__cause__ = cause
    return error


REFUSED = OSError(errno.ECONNREFUSED, "all attempts to connect to a.test:1 failed")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (httpx.ReadTimeout("x"), "no answer in time"),
        (caused(REFUSED), "Connection refused"),
        (caused(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (
            caused(ExceptionGroup("", [OSError(errno.ENETUNREACH, "x"), REFUSED])),
            "Connection refused",
        ),
        (caused(caused(REFUSED)), "Connection refused"),
        (caused(OSError("no number")), "long"),
        (caused(None), "long"),
        (caused(None, ""), "ConnectError"),
    ],
)
def test_error_is_described_by_its_first_cause_with_a_number(error: httpx.HTTPError, text: str):
    assert describe(error) == text


def test_error_of_tls_is_described_by_its_own_numbers():
    incoming = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, ssl.MemoryBIO(), server_hostname="a")
    incoming.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ssl.SSLError) as caught:
        client.do_handshake()
    assert describe(caused(caught.value)).startswith("TLS failed: the port does not speak TLS")


def test_error_raised_while_handling_another_is_described_by_it():
    error = httpx.ReadError("long")
    error.__context__ = ConnectionResetError(errno.ECONNRESET, "x")
    assert describe(error) == "Connection reset by peer"
