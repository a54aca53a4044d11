"""The metrics that count attempts, exchanges and transitions as they happen.

`exchange_counts.py` counts, `metrics.py` writes them into the page.
"""

from __future__ import annotations

from vllm_router.config.slo import FIRST_TOKEN_BOUNDS
from vllm_router.observability.prometheus_text import counter, histogram

REQUESTS = counter(
    "requests",
    "Finished requests. outcome: the result of the last attempt, refused without one; status: "
    "the response status, 0 if nothing was sent.",
    "server",
    "model",
    "path",
    "outcome",
    "status",
)
ATTEMPTS = counter("attempts", "Attempts on servers, by outcome.", "server", "outcome")
RETRIES = counter(
    "retries", "Retries, by the reason for which the previous attempt failed.", "reason"
)
SAVED = counter(
    "requests_saved",
    "Requests that one server failed and another one answered: successful retries.",
)
DISCONNECTS = counter(
    "client_disconnects",
    "Clients that disconnected before the end, by phase of the request.",
    "phase",
)
REFUSALS = counter("refusals", "Responses with an error of the router, by code.", "code")
KEY_REQUESTS = counter(
    "key_requests",
    "Finished requests by the name of the client's key; status: the first digit of the status.",
    "key",
    "status",
)
TOKENS = counter(
    "tokens",
    "Tokens as servers report them in `usage`, by the model that was asked for. kind: prompt; "
    "cached, of those in the prefix cache; completion. Streams report them only if the request "
    "has stream_options.include_usage.",
    "model",
    "kind",
)
KEY_TOKENS = counter("key_tokens", "The same by the name of the client's key.", "key", "kind")
RECEIVED = counter("request_bytes", "Bytes of request bodies.", "server")
SENT = counter("response_bytes", "Bytes of response bodies forwarded.", "server")
CHUNKS = counter(
    "response_chunks",
    "Chunks of responses forwarded; in a stream about one per token. Counted at its end.",
    "server",
)
FIRST_TOKEN = histogram(
    "time_to_first_token_seconds",
    "From the arrival of a streamed request to its first data, all attempts included.",
    FIRST_TOKEN_BOUNDS,
    "server",
    "model",
)
DURATION = histogram(
    "request_duration_seconds",
    "From the arrival of a request to the end of its complete response.",
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 640, 1280, 2560),
    "server",
    "model",
)
OVERHEAD = histogram(
    "overhead_seconds",
    "From the time a request is read to its sending, failed attempts included; only requests that "
    "did not wait for a server.",
    (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.025, 0.1, 1),
)
QUEUE_WAIT = histogram(
    "queue_wait_seconds",
    "Time that requests waited in the router, with any outcome; only requests that waited.",
    (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    "model",
)
TRANSITIONS = counter(
    "server_transitions", "Changes of a server's state, by the new one.", "server", "state"
)
