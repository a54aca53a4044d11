"""Classification of request paths: inference, engine control, or the router's own.

Paths are compared as raw bytes, before any decoding: a path with percent escapes, dot segments or
empty segments is never an inference path, so it cannot reach an engine. Trailing slashes are the
only exception: `without_slash` removes them before the classification.
"""

from __future__ import annotations

import enum
import re

from vllm_router.http.error_format import MESSAGES


class PathClass(enum.Enum):
    INFERENCE = "inference"
    ENGINE_CONTROL = "engine_control"
    LOCAL = "local"


INVOCATIONS = b"/invocations"
"""SageMaker's only path; vLLM chooses the API by the body."""

# POST paths of vLLM 0.32 and 0.33 that generate or compute and change nothing.
_INFERENCE = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/chat/completions/batch",
        b"/v1/chat/completions/render",
        b"/v1/chat/completions/derender",
        b"/v1/completions",
        b"/v1/completions/render",
        b"/v1/completions/derender",
        b"/v1/embeddings",
        b"/v1/responses",
        b"/v1/responses/render",
        MESSAGES,
        b"/v1/messages/render",
        b"/v1/messages/count_tokens",
        b"/v1/score",
        b"/score",
        b"/v1/rerank",
        b"/rerank",
        b"/v2/rerank",
        b"/v2/embed",
        b"/classify",
        b"/pooling",
        b"/tokenize",
        b"/detokenize",
        b"/generative_scoring",
        b"/v1/audio/transcriptions",
        b"/v1/audio/translations",
        b"/v1/systemone",
        b"/cohere/v2/chat",
        b"/cohere/v2/chat/render",
        b"/inference/v1/generate",
        INVOCATIONS,
    }
)

# GET paths of vLLM that describe the model and change nothing: any server may answer.
_READING = frozenset({b"/tokenizer_info"})

PURE_PATHS = _INFERENCE | _READING
"""The paths on which vLLM only computes, see `is_pure`."""

# Paths that change or reveal an engine's state. Refused on any method unless the operator allows
# them; vLLM's own API key does not guard most of these.
_ENGINE_CONTROL = frozenset(
    {
        b"/sleep",
        b"/wake_up",
        b"/is_sleeping",
        b"/pause",
        b"/resume",
        b"/is_paused",
        b"/reset_prefix_cache",
        b"/reset_mm_cache",
        b"/reset_encoder_cache",
        b"/collective_rpc",
        b"/server_info",
        b"/release_kv_cache_memory",
        b"/start_profile",
        b"/stop_profile",
        b"/scale_elastic_ep",
        b"/is_scaling_elastic_ep",
        b"/fault_tolerance/apply",
        b"/fault_tolerance/status",
        b"/init_weight_transfer_engine",
        b"/start_weight_update",
        b"/start_draft_weight_update",
        b"/update_weights",
        b"/finish_weight_update",
        b"/shutdown_weight_transfer_engine",
        b"/update_weight_version",
        b"/weight_info",
        b"/weight_checker",
        b"/get_world_size",
        b"/abort_requests",
        b"/adapters",
        b"/kv_event_sources",
        b"/inference/v1/abort_requests",
        b"/v1/load_lora_adapter",
        b"/v1/unload_lora_adapter",
    }
)

# `.` and `..` as whole segments are excluded by the lookahead, escapes by the character class.
_PLAIN_V1 = re.compile(rb"/v1(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~:@-]+)+")

# Paths of a stored response; the id has no escapes, so that it is the same for router and server.
_STORED = re.compile(
    rb"/v1/responses/(?!\.{1,2}(?:/|$))([A-Za-z0-9._~:@-]{1,512})(/cancel|/input_items)?"
)
_STORED_METHODS: dict[bytes | None, tuple[str, ...]] = {
    None: ("DELETE", "GET"),
    b"/cancel": ("POST",),
    b"/input_items": ("GET",),
}
_STORED_LABEL = "/v1/responses/{id}"


def classify(method: str, raw_path: bytes) -> PathClass:
    """Classify a request by method and the exact bytes of its path (without the query)."""
    if method == "POST" and raw_path in _INFERENCE:
        return PathClass.INFERENCE
    if raw_path in _ENGINE_CONTROL:
        return PathClass.ENGINE_CONTROL
    if method == "POST" and _PLAIN_V1.fullmatch(raw_path) and not _is_models(raw_path):
        return PathClass.INFERENCE
    if method == "GET" and raw_path in _READING:
        return PathClass.INFERENCE
    if stored_response_id(method, raw_path) is not None:
        return PathClass.INFERENCE
    return PathClass.LOCAL


def stored_response_id(method: str, raw_path: bytes) -> bytes | None:
    """The id of the stored response that the request reads, deletes or cancels.

    vLLM 0.32 has GET and `POST .../cancel`; DELETE and `/input_items` are OpenAI's.
    """
    found = _stored(raw_path)
    return found[1] if found is not None and method in _STORED_METHODS[found[2]] else None


def _stored(raw_path: bytes) -> re.Match[bytes] | None:
    return None if raw_path in _INFERENCE else _STORED.fullmatch(raw_path)


def _is_models(raw_path: bytes) -> bool:
    """Whether the path belongs to the model list, which the router answers itself."""
    return raw_path == b"/v1/models" or raw_path.startswith(b"/v1/models/")


def without_slash(raw_path: bytes) -> bytes:
    """The path without trailing slashes; `/` and `//` stay as they are.

    vLLM redirects `/v1/models/` to `/v1/models` (Starlette's `redirect_slashes`). A redirect from a
    server would contain its address, so the router serves the path directly.
    """
    return raw_path.rstrip(b"/") or raw_path


def inference_methods(raw_path: bytes) -> tuple[str, ...]:
    """The methods of a known inference path; empty for any other path."""
    if raw_path in _INFERENCE:
        return ("POST",)
    if raw_path in _READING:
        return ("GET",)
    found = _stored(raw_path)
    return _STORED_METHODS[found[2]] if found is not None else ()


def is_inference(method: str, raw_path: bytes) -> bool:
    """Whether the request is inference, with or without a trailing slash."""
    return classify(method, without_slash(raw_path)) is PathClass.INFERENCE


def is_pure(raw_path: bytes) -> bool:
    """Whether vLLM only computes on this path; requests to any other path are never replayed."""
    return raw_path in PURE_PATHS


def path_label(raw_path: bytes) -> str:
    """The path as a metric label: one of the known inference paths, or `other`.

    All stored responses have one label.
    """
    if is_pure(raw_path):
        return raw_path.decode()
    return _STORED_LABEL if _STORED.fullmatch(raw_path) else "other"
