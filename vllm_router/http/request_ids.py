"""Request ids: the client's `X-Request-Id`, or a new one."""

from __future__ import annotations

import re
from itertools import count
from random import Random

# Ids are unique, not secret: a random half per process, and a counter.
_ID_BEGINS = b"%016x" % Random().getrandbits(64)
_ID_ENDS = count(Random().getrandbits(32))

DEMO_PREFIX = "demo-traffic-"
"""The beginning of the ids of the demo's own requests."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@-]{1,128}")


def request_id(given: bytes | None) -> bytes:
    """The client's `X-Request-Id` if it is safe to log and echo, else a new one."""
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return b"%b%016x" % (_ID_BEGINS, next(_ID_ENDS))
