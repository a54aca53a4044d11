"""All metrics of the router, in the order of its page. Source of docs/metrics.md."""

from __future__ import annotations

from vllm_router.observability import counted_families as counted
from vllm_router.observability import router_families as of_router
from vllm_router.observability import server_families as of_server
from vllm_router.observability.prometheus_text import Family

FAMILIES: tuple[Family, ...] = (
    counted.REQUESTS,
    counted.ATTEMPTS,
    counted.RETRIES,
    counted.SAVED,
    counted.DISCONNECTS,
    counted.REFUSALS,
    counted.KEY_REQUESTS,
    counted.TOKENS,
    counted.KEY_TOKENS,
    counted.RECEIVED,
    counted.SENT,
    counted.CHUNKS,
    counted.FIRST_TOKEN,
    counted.DURATION,
    counted.OVERHEAD,
    of_server.QUEUE_LENGTH,
    counted.QUEUE_WAIT,
    of_server.MODEL_DEMAND,
    *(family for family, _ in of_server.MODEL_GAUGES),
    of_server.SLO_FIRST_TOKEN,
    of_server.SLO_SUCCESS,
    counted.TRANSITIONS,
    of_server.SERVER_STATE,
    of_server.SERVER_INFO,
    *(family for family, _ in of_server.SERVER_GAUGES),
    *(family for family, _ in of_server.PREFIX_COUNTERS),
    *(family for family, _ in of_router.ROUTER_METRICS),
    *(family for family, _ in of_router.WORKER_METRICS),
    *(family for family, _ in of_router.SOURCE_METRICS),
    of_router.SOURCE_TARGETS,
    *(family for family, _ in of_router.SHARED_METRICS),
    of_router.BUILD_INFO,
    of_router.LOOP_LAG,
    of_router.FEED_CLIENTS,
    of_router.FEED_DROPPED,
)
