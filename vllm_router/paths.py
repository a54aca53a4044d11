"""Which request paths are inference, which control the engine, and which are the router's own.

The decision is made on the raw bytes of the target, before any decoding: a path that would have
to be decoded or normalised to be understood (percent escapes, dot segments, empty segments) is
never an inference path, so nothing of the kind can reach an engine.
"""

from __future__ import annotations

import enum
import re


class PathClass(enum.Enum):
    INFERENCE = "inference"
    ENGINE_CONTROL = "engine_control"
    LOCAL = "local"


# POST paths of vLLM 0.33 that generate or compute and change nothing (research: peers.md E3).
_INFERENCE = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/v1/embeddings",
        b"/v1/responses",
        b"/v1/messages",
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
    }
)

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
        b"/tokenizer_info",
        b"/kv_event_sources",
        b"/inference/v1/abort_requests",
        b"/v1/load_lora_adapter",
        b"/v1/unload_lora_adapter",
    }
)

# `.` and `..` as whole segments are excluded by the lookahead, escapes by the character class.
_PLAIN_V1 = re.compile(rb"/v1(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~:@-]+)+")


def classify(method: str, raw_path: bytes) -> PathClass:
    """Sort a request by method and the exact bytes of its path (without the query)."""
    if method == "POST" and raw_path in _INFERENCE:
        return PathClass.INFERENCE
    if raw_path in _ENGINE_CONTROL:
        return PathClass.ENGINE_CONTROL
    if method == "POST" and _PLAIN_V1.fullmatch(raw_path):
        return PathClass.INFERENCE
    return PathClass.LOCAL


def is_pure(raw_path: bytes) -> bool:
    """Whether vLLM only computes here, as far as we know: nothing else may be sent twice."""
    return raw_path in _INFERENCE


def path_label(raw_path: bytes) -> str:
    """The path as a metric label: one of the known inference paths, or `other`."""
    return raw_path.decode() if raw_path in _INFERENCE else "other"
