"""A vLLM server's `/metrics` page, reduced to what routing and the feed need.

Names are matched exactly: `vllm:num_requests_waiting_by_reason` stands beside
`vllm:num_requests_waiting` and is not it. Every engine of a data-parallel server has its own
sample (label `engine`); gauges and counters are summed over them, utilisation is averaged.
Names that vLLM has renamed are read under both (vLLM pull requests 18354, 24110, 29330).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    r"\nvllm:("
    + "|".join([*_FIELD_OF, "engine_sleep_state", "cache_config_info"])
    + r")(?:\{(.*)\})? ([^ \n]+)"
)
TOO_LARGE = 1e15
"""No figure of a server is: what is gets no say, as infinite loads and sums would break routing."""

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """One scrape. `None` means that the server does not export the figure.

    Counters are totals since the server's start; `kv_usage` is a fraction, 0 to 1;
    `kv_tokens` the capacity of the KV cache in tokens.
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

    @property
    def has_load(self) -> bool:
        """False under `--disable-log-stats`, which removes every `vllm:` metric."""
        return self.running is not None

    def began_after(self, earlier: EngineMetrics) -> bool:
        """Whether a counter has gone backwards: this is another process than the earlier one."""
        return any(
            now is not None and before is not None and now < before
            for now, before in (
                (self.prompt_tokens, earlier.prompt_tokens),
                (self.generation_tokens, earlier.generation_tokens),
                (self.first_token_count, earlier.first_token_count),
            )
        )


def parse_engine_metrics(text: str) -> EngineMetrics:
    """Read a Prometheus text page; lines that are not understood are ignored."""
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    rank_of: dict[str, int] = {}
    awake = 1.0
    kv_tokens = 0
    for name, labels, number in _SAMPLE.findall("\n" + text):
        try:
            value = float(number)
        except ValueError:
            continue
        if not abs(value) < TOO_LARGE:
            continue  # nor is NaN
        if name == "engine_sleep_state":
            if 'sleep_state="awake"' in labels:
                awake = min(awake, value)
        elif name == "cache_config_info":
            kv_tokens += _kv_tokens(labels)
        else:
            field, rank = _FIELD_OF[name], _RANK[name]
            if rank > rank_of.get(field, rank):
                continue  # both names are exported: the newer one counts
            if rank < rank_of.get(field, rank):
                totals[field], counts[field] = 0.0, 0
            rank_of[field] = rank
            totals[field] = totals.get(field, 0.0) + value
            counts[field] = counts.get(field, 0) + 1
    if "kv_usage" in totals:
        totals["kv_usage"] /= counts["kv_usage"]
    return EngineMetrics(**totals, asleep=awake == 0.0, kv_tokens=kv_tokens or None)


def _kv_tokens(labels: str) -> int:
    """Blocks times block size, from the labels of `vllm:cache_config_info`."""
    found = dict(_LABEL.findall(labels))
    try:
        tokens = int(found["num_gpu_blocks"]) * int(found["block_size"])
    except (KeyError, ValueError):
        return 0  # CPU builds and future versions may leave one out ("None")
    return tokens if tokens < TOO_LARGE else 0
