"""Which request is to be mistreated, and how: the switches and the X-Mock-* headers. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import msgspec

from .options import Switches


class Fault(msgspec.Struct, frozen=True):
    """The treatment of one request; times in seconds."""

    mode: str = "ok"
    status: int = 0  # not 0: answer this at once
    retry_after: float | None = None
    after: int | None = None
    ttft: float | None = None
    delay: float | None = None
    output_tokens: int | None = None
    trickle: float = 0.05
    raw: bytes = b""
    keep_open: bool = False


class Faults:
    """Keeps count of `next` and `fraction`. Headers overrule the switches, except on a server whose
    name is not the one in `X-Mock-Only`."""

    def __init__(self, switches: Switches) -> None:
        self.switches = switches
        self._left = switches.next
        self._share = 0.0

    def change(self, switches: Switches) -> None:
        """From now on; `next` starts anew."""
        self.switches = switches
        self._left = switches.next
        self._share = 0.0

    def choose(
        self,
        name: str,
        path: str,
        headers: Mapping[bytes, bytes],
        *,
        reused: bool,
        body: bytes = b"",
    ) -> Fault:
        """The treatment of the request that has just come. ValueError: a header is wrong."""
        switches = self.switches
        told = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers.items()}
        if told.get("only", name) != name:
            told = {}
        mode = str(told["mode"]) if "mode" in told else self._next_mode(path, body)
        if mode.endswith("_reused"):
            mode = mode.removesuffix("_reused") if reused else "ok"
        if mode == "ok" and not told and switches.ttft_ms is None and switches.delay_ms is None:
            return _OK
        after = told.get("after")
        output = told.get("output-tokens")
        return Fault(
            mode=mode,
            status=int(mode) if mode.isdecimal() else 0,
            retry_after=_number(told, "retry-after", switches.retry_after),
            after=switches.after if after is None else int(after),
            ttft=_seconds(_number(told, "ttft-ms", switches.ttft_ms)),
            delay=_seconds(_number(told, "delay-ms", switches.delay_ms)),
            output_tokens=None if output is None else int(output),
            trickle=(_number(told, "trickle-ms", switches.trickle_ms) or 0.0) / 1000,
            raw=_raw(told.get("raw", switches.raw)) if mode == "raw" else b"",
            keep_open=told["keep-open"] == "1" if "keep-open" in told else switches.keep_open,
        )

    def _next_mode(self, path: str, body: bytes) -> str:
        switches = self.switches
        mode = str(switches.mode)
        if mode == "ok" or switches.only_path not in (None, path):
            return "ok"
        if switches.only_body is not None and switches.only_body.encode() not in body:
            return "ok"
        self._share += switches.fraction
        if self._share < 1.0:
            return "ok"
        self._share -= 1.0
        if self._left is not None:
            if self._left <= 0:
                return "ok"
            self._left -= 1
        return mode


_OK = Fault()


def _number(told: Mapping[str, str], name: str, otherwise: float | None) -> float | None:
    return float(told[name]) if name in told else otherwise


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _raw(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("raw: expected base64") from None
