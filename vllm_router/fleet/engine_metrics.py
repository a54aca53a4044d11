"""A vLLM server's `/metrics` page, reduced to what routing and the feed need.

Names are matched exactly: `vllm:num_requests_waiting_by_reason` is another metric than
`vllm:num_requests_waiting`. Every engine of a data-parallel server has its own
sample (label `engine`); gauges and counters are summed over them, utilisation is averaged.
Names that vLLM has renamed are read under both (vLLM pull requests 18354, 24110, 29330).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_router.errors import UnusablePage

# our field -> the names vLLM has exported it under, newest first
_NAMES: dict[str, tuple[str, ...]] = {
    "running": ("num_requests_running",),
    "waiting": ("num_requests_waiting",),
    "kv_usage": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prefix_queries": ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total"),
    "prefix_hits": ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total"),
    "prompt_tokens": ("prompt_tokens_total",),
    "generation_tokens": ("generation_tokens_total",),
    "token_latency_sum": (
        "inter_token_latency_seconds_sum",
        "time_per_output_token_seconds_sum",
    ),
    "token_latency_count": (
        "inter_token_latency_seconds_count",
        "time_per_output_token_seconds_count",
    ),
    "first_token_sum": ("time_to_first_token_seconds_sum",),
    "first_token_count": ("time_to_first_token_seconds_count",),
}
_FIELD_OF = {name: field for field, names in _NAMES.items() for name in names}
_RANK = {name: rank for names in _NAMES.values() for rank, name in enumerate(names)}

# Begins with letters to look for, not with `^`: five times as fast on a page of 50 KB.
_SAMPLE = re.compile(
    r"(\nvllm:("
    + "|".join([*_FIELD_OF, "engine_sleep_state", "cache_config_info", "lora_requests_info"])
    + r")(?:\{(.*)\})? )([^ \n]+)"
)
TOO_LARGE = 1e15
"""Larger figures are ignored: infinite loads and sums would break routing."""

MAX_LINE = 16_384
"""Characters of a line. vLLM 0.32 writes 2 KB at most; longer lines are ignored."""

MAX_SAMPLES = 10_000
"""Samples of the names above on one page: twelve names for each of 800 engines."""

MAX_NUMBER = 40
"""Characters of a number; Python writes 24 at most."""

# No backtracking: a hostile line costs no more than its length.
_BLOCKS = re.compile(r'(?:^|[,{ ])num_gpu_blocks="([0-9]{1,15})"')
_MAX_LORA = re.compile(r'(?:^|[,{ ])max_lora="([0-9]{1,6})"')
_RUNNING_LORAS = re.compile(r'(?:^|[,{ ])running_lora_adapters="([^"\\]*)"')
_WAITING_LORAS = re.compile(r'(?:^|[,{ ])waiting_lora_adapters="([^"\\]*)"')
MAX_ADAPTERS = 256
LONGEST_ADAPTER = 256
"""Characters of an adapter's name; longer ones are not known to other routers."""

_BLOCK_SIZE = re.compile(r'(?:^|[,{ ])block_size="([0-9]{1,15})"')


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The figures of one scrape; None for figures that the server does not export.

    Counters are totals since the server's start, `kv_usage` is from 0 to 1, `kv_tokens` is the
    capacity of the KV cache in tokens. `max_adapters` is the number of LoRA adapters that fit into
    GPU memory, `adapters` have running requests, `waiting_adapters` waiting ones.
    """

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    prefix_queries: float | None = None
    prefix_hits: float | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    token_latency_sum: float | None = None
    token_latency_count: float | None = None
    first_token_sum: float | None = None
    first_token_count: float | None = None
    asleep: bool = False
    kv_tokens: int | None = None
    max_adapters: int | None = None
    adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()

    @property
    def has_load(self) -> bool:
        """False under `--disable-log-stats`, which removes every `vllm:` metric."""
        return self.running is not None

    def progressed(self, earlier: EngineMetrics) -> bool:
        """Whether the engine has worked since: a counter or its KV cache usage has changed."""
        return self._work() != earlier._work()

    def _work(self) -> tuple[float | None, ...]:
        return (
            *(self.prompt_tokens, self.generation_tokens, self.first_token_count),
            *(self.token_latency_count, self.prefix_queries, self.kv_usage),
        )

    @property
    def counts(self) -> bool:
        """Whether it exports counters, so that a stand-still can be detected."""
        return self.prompt_tokens is not None or self.generation_tokens is not None

    def began_after(self, earlier: EngineMetrics) -> bool:
        """Whether a counter has decreased: the process was restarted."""
        return any(
            now is not None and before is not None and now < before
            for now, before in (
                (self.prompt_tokens, earlier.prompt_tokens),
                (self.generation_tokens, earlier.generation_tokens),
                (self.first_token_count, earlier.first_token_count),
            )
        )


class MetricsReader:
    """An incremental parser of a Prometheus text page; unknown lines are ignored.

    Only the last unfinished line is buffered. `keys` has the text of each sample before its value,
    from the line break on.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._line = "\n"
        self._skipping = False
        self._samples = 0
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._rank_of: dict[str, int] = {}
        self._awake = 1.0
        self._kv_tokens = 0
        self._adapters = (0.0, "")

    def feed(self, piece: bytes) -> None:
        """Parse the next bytes of the page. Raises UnusablePage if it has too many samples."""
        # All names are ASCII, so any cut between two pieces is valid.
        text = piece.decode("latin-1")
        if self._skipping:
            end = text.find("\n")
            if end < 0:
                return
            self._skipping, text = False, text[end:]
        else:
            text = self._line + text
        end = text.rfind("\n")
        self._line = text[end:]
        if len(self._line) > MAX_LINE:
            self._skipping, self._line = True, "\n"
        self._read(text[:end])

    def result(self) -> EngineMetrics:
        """The figures; call after the whole page was fed."""
        if not self._skipping:
            self._read(self._line)
        self._line = "\n"
        totals = {field: total for field, total in self._totals.items() if total < TOO_LARGE}
        if "kv_usage" in totals:
            totals["kv_usage"] = min(1.0, totals["kv_usage"] / self._counts["kv_usage"])
        labels = self._adapters[1]
        return EngineMetrics(
            **totals,
            asleep=self._awake == 0.0,
            kv_tokens=self._kv_tokens or None,
            max_adapters=_max_adapters(labels),
            adapters=_adapters(_RUNNING_LORAS, labels),
            waiting_adapters=_adapters(_WAITING_LORAS, labels),
        )

    def _read(self, lines: str) -> None:
        """Parse whole lines, with a line break before the first."""
        samples = _SAMPLE.findall(lines)
        self._samples += len(samples)
        if self._samples > MAX_SAMPLES:
            raise UnusablePage(f"more than {MAX_SAMPLES} samples")
        for key, name, labels, number in samples:
            self.keys.append(key)
            value = _figure(number)
            if value is None or len(labels) > MAX_LINE:
                continue
            if name == "engine_sleep_state":
                if 'sleep_state="awake"' in labels:
                    self._awake = min(self._awake, value)
            elif name == "cache_config_info":
                self._kv_tokens += _kv_tokens(labels)
            elif name == "lora_requests_info":
                # A sample for every set of adapters so far; its value is the time of the last one.
                self._adapters = max(self._adapters, (value, labels))
            else:
                self._add(name, value)

    def _add(self, name: str, value: float) -> None:
        field, rank = _FIELD_OF[name], _RANK[name]
        known = self._rank_of.get(field, rank)
        if rank > known:
            return  # both names are exported: the newer one is used
        if rank < known:
            self._totals[field], self._counts[field] = 0.0, 0
        self._rank_of[field] = rank
        self._totals[field] = self._totals.get(field, 0.0) + value
        self._counts[field] = self._counts.get(field, 0) + 1


def _max_adapters(labels: str) -> int | None:
    """The slots in the labels of `vllm:lora_requests_info`."""
    slots = _MAX_LORA.search(labels)
    return (int(slots[1]) if slots is not None else 0) or None


def _adapters(names: re.Pattern[str], labels: str) -> tuple[str, ...]:
    """The adapters in a label of `vllm:lora_requests_info`, whose text was read as Latin-1."""
    text = ",".join(names.findall(labels)).encode("latin-1").decode("utf-8", "replace")
    listed = text.split(",")
    found = [name for name in listed if 0 < len(name) <= LONGEST_ADAPTER]
    return tuple(dict.fromkeys(found))[:MAX_ADAPTERS]


def _figure(number: str) -> float | None:
    """A finite number ≥ 0; else None."""
    if len(number) > MAX_NUMBER:
        return None
    try:
        value = float(number)
    except ValueError:
        return None
    return value if 0.0 <= value < TOO_LARGE else None  # excludes NaN


def parse_engine_metrics(text: str) -> EngineMetrics:
    """Parse a whole page. Raises UnusablePage."""
    reader = MetricsReader()
    reader.feed(text.encode())
    return reader.result()


def _kv_tokens(labels: str) -> int:
    """Blocks times block size, from the labels of `vllm:cache_config_info`."""
    blocks, size = _BLOCKS.search(labels), _BLOCK_SIZE.search(labels)
    if blocks is None or size is None:
        return 0  # CPU builds and future versions may leave one out ("None")
    tokens = int(blocks[1]) * int(size[1])
    return tokens if tokens < TOO_LARGE else 0
