"""The `/metrics` page: names, labels, help and order of vLLM 0.32 (prometheus_client)."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence

from vllm_router.lab.mock.engine import Engine
from vllm_router.lab.mock.options import MockOptions, Switches
from vllm_router.lab.mock.statistics import EngineStatistics, Histogram

CONTENT_TYPE = b"text/plain; version=1.0.0; charset=utf-8"

# name, help, value; rendered as `name_total` with a `name_created` beside it
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStatistics], int]], ...] = (
    (
        "prefix_cache_queries",
        "Prefix cache queries, in terms of number of queried tokens.",
        lambda s: s.prefix_queries,
    ),
    (
        "prefix_cache_hits",
        "Prefix cache hits, in terms of number of cached tokens.",
        lambda s: s.prefix_hits,
    ),
    (
        "num_preemptions",
        "Cumulative number of preemption from the engine.",
        lambda s: s.preemptions,
    ),
    ("prompt_tokens", "Number of prefill tokens processed.", lambda s: s.prompt_tokens),
    (
        "prompt_tokens_cached",
        "Number of cached prompt tokens (local + external).",
        lambda s: s.prefix_hits,
    ),
    ("generation_tokens", "Number of generation tokens processed.", lambda s: s.generation_tokens),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[EngineStatistics], Histogram]], ...] = (
    (
        "request_prompt_tokens",
        "Number of prefill tokens processed.",
        lambda s: s.request_prompt_tokens,
    ),
    (
        "request_generation_tokens",
        "Number of generation tokens processed.",
        lambda s: s.request_generation_tokens,
    ),
    (
        "iteration_tokens_total",
        "Histogram of number of tokens per engine_step.",
        lambda s: s.iteration_tokens,
    ),
    ("request_params_n", "Histogram of the n request parameter.", lambda s: s.request_n),
    (
        "request_params_max_tokens",
        "Histogram of the max_tokens request parameter.",
        lambda s: s.request_max_tokens,
    ),
    (
        "time_to_first_token_seconds",
        "Histogram of time to first token in seconds.",
        lambda s: s.time_to_first_token,
    ),
    (
        "inter_token_latency_seconds",
        "Histogram of inter-token latency in seconds.",
        lambda s: s.inter_token_latency,
    ),
    (
        "request_time_per_output_token_seconds",
        "Histogram of time_per_output_token_seconds per request.",
        lambda s: s.time_per_output_token,
    ),
    (
        "e2e_request_latency_seconds",
        "Histogram of e2e request latency in seconds.",
        lambda s: s.e2e_latency,
    ),
    (
        "request_queue_time_seconds",
        "Histogram of time spent in WAITING phase for request.",
        lambda s: s.queue_time,
    ),
    (
        "request_inference_time_seconds",
        "Histogram of time spent in RUNNING phase for request.",
        lambda s: s.inference_time,
    ),
    (
        "request_prefill_time_seconds",
        "Histogram of time spent in PREFILL phase for request.",
        lambda s: s.prefill_time,
    ),
    (
        "request_decode_time_seconds",
        "Histogram of time spent in DECODE phase for request.",
        lambda s: s.decode_time,
    ),
)

# Names before release 0.10; newer gauges did not exist then.
_OLD_NAMES = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
_OLD_HELP = {"kv_cache_usage_perc": "GPU KV-cache usage. 1 means 100 percent usage."}
_NEW_ONLY = frozenset({"num_requests_waiting_by_reason", "engine_sleep_state"})

Samples = Iterable[tuple[str, float]]  # labels as they stand between the braces, value


class Exposition:
    """Collects families in the text format 0.0.4."""

    def __init__(self, *, old_names: bool) -> None:
        self._lines: list[str] = []
        self._old_names = old_names

    def gauge(self, name: str, text: str, samples: Samples) -> None:
        if self._old_names and name in _NEW_ONLY:
            return
        if self._old_names:
            text = _OLD_HELP.get(name, text)
        self.family(self._name(name), "gauge", text, samples)

    def counter(self, name: str, text: str, samples: Samples, created: float) -> None:
        name = self._name(name)
        samples = list(samples)
        self.family(f"{name}_total", "counter", text, samples)
        self.family(f"{name}_created", "gauge", text, [(labels, created) for labels, _ in samples])

    def histogram(
        self, name: str, text: str, samples: Iterable[tuple[str, Histogram]], created: float
    ) -> None:
        name = self._name(name)
        samples = list(samples)
        self._head(name, "histogram", text)
        for labels, histogram in samples:
            engine, model = labels.split(",", 1)
            total = 0
            for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
                total += count
                self._lines.append(f'{name}_bucket{{{engine},le="{bound}",{model}}} {float(total)}')
            self._lines.append(f"{name}_count{{{labels}}} {float(total)}")
            self._lines.append(f"{name}_sum{{{labels}}} {histogram.sum!r}")
        self.family(f"{name}_created", "gauge", text, [(labels, created) for labels, _ in samples])

    def family(self, name: str, kind: str, text: str, samples: Samples) -> None:
        self._head(name, kind, text)
        self._lines += [
            f"{name}{{{labels}}} {value!r}" if labels else f"{name} {value!r}"
            for labels, value in ((labels, float(value)) for labels, value in samples)
        ]

    def _name(self, name: str) -> str:
        return "vllm:" + (_OLD_NAMES.get(name, name) if self._old_names else name)

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}")

    def render(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def process_metrics(page: Exposition, started: float) -> None:
    """The families of prometheus_client that routers are known to read."""
    version = platform.python_version()
    major, minor, patch = platform.python_version_tuple()
    python = (
        f'implementation="CPython",major="{major}",minor="{minor}",'
        f'patchlevel="{patch}",version="{version}"'
    )
    page.family("python_info", "gauge", "Python platform information", [(python, 1.0)])
    page.family(
        "process_start_time_seconds",
        "gauge",
        "Start time of the process since unix epoch in seconds.",
        [("", started)],
    )
    page.family(
        "process_cpu_seconds_total",
        "counter",
        "Total user and system CPU time spent in seconds.",
        [("", time.process_time())],
    )
    # Values of a machine with plenty of descriptors, on every platform.
    page.family("process_open_fds", "gauge", "Number of open file descriptors.", [("", 34.0)])
    page.family(
        "process_max_fds", "gauge", "Maximum number of open file descriptors.", [("", 65535.0)]
    )


def engine_metrics(
    page: Exposition,
    options: MockOptions,
    engines: Sequence[Engine],
    *,
    switches: Switches,
    sleep_level: int,
    rejections: int,
    loras: Sequence[str],
    started: float,
) -> None:
    """All `vllm:` families; the model label is that model's first name, as in vLLM."""
    model = f'model_name="{options.models[0]}"'
    labels = [f'engine="{number}",{model}' for number in range(len(engines))]

    def each(value: Callable[[Engine], float], more: str = "") -> list[tuple[str, float]]:
        return [
            (label + more, value(engine)) for label, engine in zip(labels, engines, strict=True)
        ]

    def spread(claim: int | None, value: Callable[[Engine], float]) -> list[tuple[str, float]]:
        if claim is None:
            return each(value)
        return [(label, float(claim if i == 0 else 0)) for i, label in enumerate(labels)]

    waiting = spread(switches.gauge_waiting, lambda e: e.queued)
    page.gauge(
        "num_requests_running",
        "Number of requests in model execution batches.",
        spread(switches.gauge_running, lambda e: len(e.running)),
    )
    page.gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting)
    page.gauge(
        "num_requests_waiting_by_reason",
        "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling "
        "capacity; 'deferred' = deferred by transient constraints (LoRA budget, KV transfer, "
        "blocked status). Sum of all reasons equals vllm:num_requests_waiting.",
        [(f'{label},reason="capacity"', value) for label, value in waiting]
        + [(f'{label},reason="deferred"', 0.0) for label in labels],
    )
    states = ("awake", "weights_offloaded", "discard_all")
    page.gauge(
        "engine_sleep_state",
        "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "
        "weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
        [
            (f'{label},sleep_state="{state}"', float(level == sleep_level))
            for level, state in enumerate(states)
            for label in labels
        ],
    )
    page.gauge(
        "kv_cache_usage_perc",
        "KV-cache usage. 1 means 100 percent usage.",
        each(lambda e: e.cache.usage),
    )
    for name, text, count in _COUNTERS:
        page.counter(name, text, each(lambda e: count(e.statistics)), started)  # noqa: B023 (called at once)
    page.counter(
        "request_success",
        "Count of successfully processed requests.",
        [
            (f'engine="{i}",finished_reason="{reason}",{model}', engine.statistics.finished[reason])
            for reason in engines[0].statistics.finished
            for i, engine in enumerate(engines)
        ],
        started,
    )
    page.counter(
        "admission_rejections",
        "Number of admission attempts rejected by a queue limit, by reason.",
        [
            (f'{model},reason="max_num_queued_reqs"', rejections),
            (f'{model},reason="max_num_queued_tokens"', 0),
        ],
        started,
    )
    for name, text, get in _HISTOGRAMS:
        page.histogram(
            name,
            text,
            [
                (label, get(engine.statistics))
                for label, engine in zip(labels, engines, strict=True)
            ],
            started,
        )
    page.gauge(
        "cache_config_info",
        "Information of the LLMEngine CacheConfig",
        [(_cache_config(options, number), 1.0) for number in range(len(engines))],
    )
    if loras:
        running = ",".join(
            sorted({r.model for e in engines for r in e.running if r.model in loras})
        )
        held = ",".join(sorted({r.model for e in engines for r in e.waiting if r.model in loras}))
        adapters = (
            f'max_lora="{options.max_loras or max(4, len(loras))}",'
            f'running_lora_adapters="{running}",'
            f'waiting_lora_adapters="{held}"'
        )
        now = time.time()
        page.gauge("lora_requests_info", "Running stats on lora requests.", [(adapters, now)])


def _cache_config(options: MockOptions, engine: int) -> str:
    tokens = options.kv_blocks * options.block_size
    values = {
        "_block_size_resolved": True,
        "block_size": options.block_size,
        "cache_dtype": "auto",
        "enable_prefix_caching": True,
        "engine": engine,
        "gpu_memory_utilization": 0.92,
        "kv_cache_max_concurrency": tokens / options.max_model_len,
        "kv_cache_size_tokens": tokens,
        "num_cpu_blocks": None,
        "num_gpu_blocks": options.kv_blocks,
        "num_gpu_blocks_override": None,
        "prefix_caching_hash_algo": "sha256",
        "sliding_window": None,
        "user_specified_block_size": True,
    }
    return ",".join(f'{key}="{value}"' for key, value in values.items())
