"""The faults of requests, chosen by switches and X-Mock-* headers. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from vllm_router.lab.mock.options import Switches, check_error, check_mode, raw_bytes


class Fault(msgspec.Struct, frozen=True):
    """The fault of one request; times in seconds."""

    mode: str = "ok"
    status: int = 0  # not 0: answer with this status at once
    retry_after: float | None = None
    after: int | None = None
    ttft: float | None = None
    delay: float | None = None
    output_tokens: int | None = None
    error: str = ""
    framing: str = ""
    packing: str = ""
    early_opening: bool = False
    null_error: bool = False
    trickle: float = 0.05
    raw: bytes = b""
    keep_open: bool = False


class Faults:
    """Counts `next` and `fraction`.

    Headers override the switches, except on a server whose name differs from `X-Mock-Only`.
    """

    def __init__(self, switches: Switches) -> None:
        self.change(switches)

    def change(self, switches: Switches) -> None:
        """Replace the switches and restart the count of `next`."""
        self.switches = switches
        self._left = switches.next
        self._share = 0.0
        self._decorated = _decorated(switches)
        self._harmless = (
            switches.mode == "ok"
            and not self._decorated
            and switches.ttft_ms is None
            and switches.delay_ms is None
        )

    def choose(
        self,
        name: str,
        path: str,
        headers: Mapping[bytes, bytes],
        *,
        reused: bool,
        body: bytes = b"",
    ) -> Fault:
        """The fault of a new request. Raises ValueError for an invalid header."""
        if self._harmless and not headers:
            return _OK
        switches = self.switches
        given = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers.items()}
        if given.get("only", name) != name:
            given = {}
        chosen = "mode" not in given and self._chosen(path, body)
        mode = given.get("mode") or (str(switches.mode) if chosen else "ok")
        if mode.endswith("_reused"):
            mode = mode.removesuffix("_reused") if reused else "ok"
        check_mode(mode)
        error = given.get("error", switches.error if chosen else "")
        check_error(error)
        return Fault(
            mode=mode,
            status=int(mode) if mode.isdecimal() else 0,
            retry_after=_number(given, "retry-after", switches.retry_after),
            after=_count(given, "after", switches.after),
            ttft=_seconds(_number(given, "ttft-ms", switches.ttft_ms)),
            delay=_seconds(_number(given, "delay-ms", switches.delay_ms)),
            output_tokens=_count(
                given, "output-tokens", switches.output_tokens if chosen else None
            ),
            error=error,
            framing=_word(given, "framing", "close", switches.framing if chosen else ""),
            packing=_word(given, "packing", "gzip", switches.packing if chosen else ""),
            early_opening=_flag(given, "early-opening", chosen and switches.early_opening),
            null_error=_flag(given, "null-error", chosen and switches.null_error),
            trickle=(_number(given, "trickle-ms", switches.trickle_ms) or 0.0) / 1000,
            raw=raw_bytes(given.get("raw", switches.raw)) if mode == "raw" else b"",
            keep_open=_flag(given, "keep-open", switches.keep_open),
        )

    def _chosen(self, path: str, body: bytes) -> bool:
        """True if the switches apply to this request, which is counted."""
        switches = self.switches
        if switches.mode == "ok" and not self._decorated:
            return False
        if switches.only_path not in (None, path):
            return False
        if switches.only_body is not None and switches.only_body.encode() not in body:
            return False
        self._share += switches.fraction
        if self._share < 1.0:
            return False
        self._share -= 1.0
        if self._left is not None:
            if self._left <= 0:
                return False
            self._left -= 1
        return True


_OK = Fault()


def _decorated(switches: Switches) -> bool:
    """True if responses differ even in mode ok."""
    return bool(
        switches.framing
        or switches.packing
        or switches.early_opening
        or switches.null_error
        or switches.output_tokens is not None
    )


def _flag(given: Mapping[str, str], name: str, otherwise: bool) -> bool:
    return given[name] == "1" if name in given else otherwise


def _word(given: Mapping[str, str], name: str, known: str, otherwise: str) -> str:
    word = given.get(name, otherwise)
    if word not in ("", known):
        raise ValueError(f"{name}: expected {known} or nothing, got {word}")
    return word


def _number(given: Mapping[str, str], name: str, otherwise: float | None) -> float | None:
    if name not in given:
        return otherwise
    try:
        number = float(given[name])
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a number ≥ 0, got {given[name]}")
    return number


def _count(given: Mapping[str, str], name: str, otherwise: int | None) -> int | None:
    if name not in given:
        return otherwise
    if not given[name].isdecimal():
        raise ValueError(f"{name}: expected an integer ≥ 0, got {given[name]}")
    return int(given[name])


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
