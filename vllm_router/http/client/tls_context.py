"""The TLS context of a client that may be given a private authority."""

from __future__ import annotations

import ssl


def verifying_context(ca: str | None) -> ssl.SSLContext:
    """A context that verifies certificates by the authorities in a PEM file, or the system's.

    Raises OSError, or ValueError for a path that no file can have.
    """
    context = ssl.create_default_context(cafile=ca)
    if ca is not None:
        # Python 3.13 began to require extensions that private authorities often leave out.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
