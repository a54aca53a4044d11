"""Options and failure switches of a simulated vLLM server."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any, Literal

import msgspec

from vllm_router.lab.mock.foreign import ERRORS


class Switches(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Failure switches, as `POST /mock/set` takes them. They act on inference requests
    unless the name says otherwise; all times are milliseconds, as in the `X-Mock-*` headers.

    `mode` is one of `MODES` or an HTTP status. `next` limits it to that many requests,
    `fraction` to a share of them (spread evenly, not at random), `only_path` to one path,
    `only_body` to requests whose body has this text. `after` is the number of tokens the `mid*`,
    `abort_finish`, `error_event` and `unfinished` modes let pass, by default half of them; a plain
    answer is cut in the middle whatever it says. `framing`, `packing`, `early_opening`,
    `null_error` and `output_tokens` go with every mode.
    """

    mode: str | int = "ok"
    next: int | None = None
    fraction: float = 1.0
    only_path: str | None = None
    only_body: str | None = None
    retry_after: float | None = None
    after: int | None = None
    ttft_ms: float | None = None
    delay_ms: float | None = None
    trickle_ms: float = 50.0
    output_tokens: int | None = None  # how long answers are; 0: the end comes at once, without text
    error: str = ""  # of another engine, for `error_event`: a key of `foreign.ERRORS`
    framing: Literal["", "close"] = ""  # close: the end of the connection ends the body
    packing: Literal["", "gzip"] = ""
    early_opening: bool = False  # streams open before the engine's first output, in every API
    null_error: bool = False  # every JSON event of a stream has `"error": null`
    raw: str = ""  # base64 of the exact bytes `mode: raw` answers
    keep_open: bool = False  # raw: leave the connection open afterwards
    health: int | Literal["hang", "close"] = 200
    health_delay_ms: float = 0.0
    metrics: int | Literal["hang", "close"] = 200
    metrics_delay_ms: float = 0.0
    models: int | Literal["hang", "close"] = 200
    models_delay_ms: float = 0.0
    gauge_running: int | None = None  # what /metrics claims, instead of the truth
    gauge_waiting: int | None = None

    def __post_init__(self) -> None:
        check_mode(str(self.mode))
        check_error(self.error)
        raw_bytes(self.raw)
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"fraction: expected 0 to 1, got {self.fraction:g}")
        _check_numbers(self, _NUMBERS)
        for name in ("health", "metrics", "models"):
            status = getattr(self, name)
            if isinstance(status, int) and status not in STATUSES:
                raise ValueError(f"{name}: expected a status from 200 to 599, got {status}")

    def updated(self, changes: dict[str, Any]) -> Switches:
        """With some of the switches changed; ValueError names what is wrong with them."""
        return msgspec.convert(msgspec.to_builtins(self) | changes, Switches)


MODES = frozenset(
    {
        "ok",
        "hang",  # not a byte, for ever
        "hang_after_head",
        "reset",  # RST before any byte
        "close",  # FIN before any byte
        "reset_reused",  # the same, but only on a connection that has served a request before
        "close_reused",
        "midreset",
        "midclose",
        "midhang",
        "trickle",  # a byte every trickle_ms
        "abort_finish",  # clean end with finish_reason "abort", as after SIGTERM
        "error_event",  # what the API says when the engine dies, or the switch `error`
        "no_token",  # an end without a token, as of a request that is aborted in the queue
        "empty",  # 200 with nothing in it
        "opening",  # the opening events of a stream, then its end; a plain answer without content
        "unfinished",  # tokens and then a proper end of the body, but none of the answer
        "raw",
        "die",  # the server ends without a byte, as of SIGKILL
        "engine_death",  # 500 to all it has, 503 to checks, and soon it ends
    }
)

STATUSES = range(200, 600)

_NUMBERS = (
    *("next", "retry_after", "after", "ttft_ms", "delay_ms", "trickle_ms", "output_tokens"),
    *("health_delay_ms", "metrics_delay_ms", "models_delay_ms", "gauge_running", "gauge_waiting"),
)


def check_mode(mode: str) -> None:
    """Raises ValueError for what is neither one of MODES nor an HTTP status."""
    if mode not in MODES and not (mode.isdecimal() and int(mode) in STATUSES):
        known = ", ".join(sorted(MODES))
        raise ValueError(f"mode: expected a status from 200 to 599 or one of {known}, got {mode}")


def check_error(error: str) -> None:
    """Raises ValueError for an unknown error of another engine; an empty one is none."""
    if error and error not in ERRORS:
        raise ValueError(f"error: expected one of {', '.join(ERRORS)}, got {error}")


def raw_bytes(text: str) -> bytes:
    """The bytes of a `raw` answer. Raises ValueError."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("raw: expected base64") from None


def _check_numbers(values: object, names: tuple[str, ...], *, above_zero: bool = False) -> None:
    """Raises ValueError if one of the numbers is too small, infinite or not a number."""
    for name in names:
        value = getattr(values, name)
        if value is None or (0 < value < math.inf) or (value == 0 and not above_zero):
            continue
        raise ValueError(f"{name}: expected a number {'>' if above_zero else '≥'} 0, got {value:g}")


SigtermBehaviour = Literal["abort", "error", "silence"]


_ABOVE_ZERO = (
    *("speed", "engines", "max_num_seqs", "max_num_batched_tokens", "max_model_len"),
    *("kv_blocks", "block_size"),
)
_ZERO_OR_MORE = (
    *("max_loras", "lora_swap", "ttft", "prefill_tokens_per_second", "token_delay"),
    *("batch_slowdown", "max_num_queued_reqs", "keep_alive", "sse_keep_alive"),
    *("shutdown_timeout", "log_size"),
)


class MockOptions(msgspec.Struct, kw_only=True, frozen=True):
    """One simulated server. Times are seconds; `port` 0 takes a free one.

    `speed` multiplies how fast everything is: 2.0 halves `ttft` and `token_delay` and doubles
    the prefill rate. `token_delay` 0 makes answers come at once, in one write. The names follow
    vLLM's own arguments where it has one.
    """

    host: str = "127.0.0.1"
    port: int = 0
    name: str = ""  # the x-mock-server header; empty: `mock-<port>`
    answer: str = ""  # what every response says; empty: words by the prompt
    models: tuple[str, ...] = ("mock-model",)
    loras: tuple[str, ...] = ()  # `name` or `name=path`
    max_loras: int = 0  # adapters in memory at a time; 0: all
    lora_swap: float = 0.0  # what loading one adds to a step, in seconds
    max_model_len: int = 32768
    api_key: str | None = None

    ttft: float = 0.02
    prefill_tokens_per_second: float = 20_000.0  # 0: prefill costs nothing
    token_delay: float = 0.01
    batch_slowdown: float = 0.01  # each further running request adds this share of token_delay
    speed: float = 1.0
    engines: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_num_queued_reqs: int | None = None
    kv_blocks: int = 8192
    block_size: int = 16

    old_metric_names: bool = False
    disable_log_stats: bool = False
    enable_prompt_tokens_details: bool = False
    enable_request_id_headers: bool = False
    enable_responses_api_store: bool = False  # as VLLM_ENABLE_RESPONSES_API_STORE=1
    keep_alive: float = 5.0  # vLLM 0.32: idle connections are closed after 5.0 s
    sse_keep_alive: float = 0.0  # a `: keep-alive` comment on silent streams; 0: never
    sigterm: SigtermBehaviour = "abort"
    shutdown_timeout: float = 0.0
    log_size: int = 1000
    switches: Switches = Switches()

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: expected at least one")
        if not self.answer.isascii():
            raise ValueError("answer: expected ASCII")
        if not (self.name.isascii() and self.name.isprintable()):
            raise ValueError(f"name: expected printable ASCII, got {self.name!a}")
        for lora in self.loras:
            if not lora.partition("=")[0]:
                raise ValueError(f"loras: expected NAME or NAME=PATH, got {lora!a}")
        _check_numbers(self, _ABOVE_ZERO, above_zero=True)
        _check_numbers(self, _ZERO_OR_MORE)

    @property
    def first_token_seconds(self) -> float:
        return self.ttft / self.speed

    @property
    def step_seconds(self) -> float:
        return self.token_delay / self.speed

    @property
    def prefill_rate(self) -> float:
        return self.prefill_tokens_per_second * self.speed or math.inf
