"""No trick with a path reaches an engine outside the inference paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.paths import PathClass, classify, path_label

INFERENCE, CONTROL, LOCAL = PathClass.INFERENCE, PathClass.ENGINE_CONTROL, PathClass.LOCAL


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/rerank",
        "/v2/rerank",
        "/v2/embed",
        "/classify",
        "/pooling",
        "/tokenize",
        "/detokenize",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/something/new",
        "/v1/responses/resp_1~a.b:c@d/cancel",
    ],
)
def test_inference_paths_are_inference_for_post_only(path):
    assert classify("POST", path.encode()) is INFERENCE
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "post", ""):
        assert classify(method, path.encode()) is LOCAL


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/pause",
        "/resume",
        "/reset_prefix_cache",
        "/collective_rpc",
        "/update_weights",
        "/scale_elastic_ep",
        "/abort_requests",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_engine_control_is_control_on_any_method(path, method):
    assert classify(method, path.encode()) is CONTROL


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/../pause",
        b"/v1/..",
        b"/v1/.",
        b"/v1/./chat/completions",
        b"/v1/a/../../sleep",
        b"/v1/%2e%2e/pause",
        b"/v1/%2E%2E/pause",
        b"/v1%2f..%2fpause",
        b"/%70ause",
        b"/v1/load_lora_adapter/",
        b"/v1/load%5Flora_adapter",
        b"/v1//load_lora_adapter",
        b"//v1/load_lora_adapter",
        b"//pause",
        b"/v1/models/..;/sleep",
        b"/v1/;/load_lora_adapter",
        b"/v1/load_lora_adapter;a=b",
        b"/v1/load_lora_adapter\\",
        b"/v1\\..\\pause",
        b"/v1/chat/completions\x00",
        b"/v1/chat/completions\n",
        b"/v1/chat/completions ",
        b"/v1/chat/completions?x",
        b"/v1/chat/completions#",
        b"/v1/caf\xc3\xa9",
        b"/V1/load_lora_adapter",
        b"/v1",
        b"/v1/",
        b"/v1/chat/",
        b"/v10/chat",
        b"/SLEEP",
        b"/sleep/",
        b"http://host/sleep",
        b"v1/chat/completions",
        b"*",
        b"",
        b"/",
        b"/metrics",
        b"/health",
    ],
)
def test_everything_else_stays_with_the_router(path):
    assert classify("POST", path) is LOCAL


@given(st.binary(max_size=30).map(lambda tail: b"/v1/" + tail))
def test_what_counts_as_inference_needs_no_decoding(path):
    if classify("POST", path) is INFERENCE:
        assert b"%" not in path
        assert b"//" not in path
        assert not {b".", b".."} & set(path.split(b"/"))
        assert path.isascii()
        assert path.decode().isprintable()


def test_labels_are_the_known_paths_and_nothing_a_client_invents():
    assert path_label(b"/v1/chat/completions") == "/v1/chat/completions"
    assert path_label(b"/v1/invented") == "other"
