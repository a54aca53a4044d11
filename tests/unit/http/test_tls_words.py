"""Errors of TLS in words for operators."""

from __future__ import annotations

import ssl

import pytest

from vllm_router.http.client.tls_transport import describe_tls_error

CUT = "TLS failed: the server closed the connection during the handshake"


def error(
    reason: str | None, text: str = "", kind: type[ssl.SSLError] = ssl.SSLError
) -> ssl.SSLError:
    """As OpenSSL's errors, which have a reason."""
    found = kind(1, text)
    found.reason = reason  # type: ignore[assignment]
    return found


def untrusted() -> ssl.SSLCertVerificationError:
    found = ssl.SSLCertVerificationError(1, "certificate verify failed")
    found.verify_message = "self-signed certificate"
    return found


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (untrusted(), "its certificate is not trusted: self-signed certificate"),
        (
            error("WRONG_VERSION_NUMBER"),
            "TLS failed: the port does not speak TLS; should the url begin with http://?",
        ),
        (
            error("TLSV13_ALERT_CERTIFICATE_REQUIRED"),
            "TLS failed: tlsv13 alert certificate required",
        ),
        (error(None, "No_Such thing"), "TLS failed: "),
        (error("UNEXPECTED_EOF_WHILE_READING"), CUT),
        (error(None, kind=ssl.SSLEOFError), CUT),
        (ConnectionResetError(104, "Connection reset by peer"), CUT),
        (None, CUT),
    ],
)
def test_tls_error_is_described_for_operators(cause: BaseException | None, text: str):
    assert describe_tls_error(cause).startswith(text)
