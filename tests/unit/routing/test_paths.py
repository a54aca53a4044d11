"""No spelling of a path reaches an engine outside the inference paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.http.error_format import is_anthropic
from vllm_router.routing.paths import (
    PathClass,
    classify,
    inference_methods,
    is_inference,
    is_pure,
    path_label,
    stored_response_id,
    without_slash,
)

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
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/invocations",
        "/v1/something/new",
        "/v1/responses/resp_1~a.b:c@d/cancel",
    ],
)
def test_paths_inference_is_post_only(path):
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
def test_paths_engine_control_is_control_for_any_method(path, method):
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
        b"/v1/models",
        b"/v1/models/m",
    ],
)
def test_paths_all_others_belong_to_router(path):
    assert classify("POST", path) is LOCAL


@given(st.binary(max_size=30).map(lambda tail: b"/v1/" + tail))
def test_paths_inference_needs_no_decoding(path):
    if classify("POST", path) is INFERENCE:
        assert b"%" not in path
        assert b"//" not in path
        assert not {b".", b".."} & set(path.split(b"/"))
        assert path.isascii()
        assert path.decode().isprintable()


def test_paths_only_tokenizer_info_is_read_from_server():
    assert classify("GET", b"/tokenizer_info") is INFERENCE
    assert is_pure(b"/tokenizer_info")
    for method in ("POST", "HEAD", "PUT", ""):
        assert classify(method, b"/tokenizer_info") is LOCAL
    for path in (b"/kv_event_sources", b"/server_info", b"/adapters"):
        assert classify("GET", path) is CONTROL


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        (b"/v1/models/", b"/v1/models"),
        (b"/v1/models//", b"/v1/models"),
        (b"/v1/models", b"/v1/models"),
        (b"/a%2F", b"/a%2F"),
        (b"/", b"/"),
        (b"//", b"//"),
        (b"", b""),
    ],
)
def test_paths_trailing_slashes_are_removed(path, kept):
    assert without_slash(path) == kept


def test_paths_lane_takes_inference_with_trailing_slash():
    assert is_inference("POST", b"/v1/chat/completions/")
    assert not is_inference("POST", b"/sleep/")
    assert not is_inference("POST", b"//v1/chat/completions/")


@given(st.sampled_from(["GET", "POST", "PUT"]), st.binary(max_size=30).map(lambda p: b"/" + p))
def test_paths_methods_are_the_served_ones(method, path):
    if method in inference_methods(path):
        assert classify(method, path) is INFERENCE


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (b"/v1/chat/completions", ("POST",)),
        (b"/v1/responses", ("POST",)),
        (b"/v1/responses/resp_1", ("DELETE", "GET")),
        (b"/v1/responses/render", ("POST",)),
        (b"/v1/responses/resp_1/cancel", ("POST",)),
        (b"/v1/responses/resp_1/input_items", ("GET",)),
        (b"/v1/responses/resp_1/other", ()),
        (b"/v1/responses/a/b/c", ()),
        (b"/v1/responses/..", ()),
        (b"/v1/responses/../cancel", ()),
        (b"/v1/responses/a%2Fb", ()),
        (b"/v1/responses/" + b"a" * 513, ()),
        (b"/tokenizer_info", ("GET",)),
        (b"/v1/nowhere", ()),
        (b"/sleep", ()),
        (b"/health", ()),
    ],
)
def test_paths_inference_methods_are_known(path, methods):
    assert inference_methods(path) == methods


@pytest.mark.parametrize(
    ("method", "path", "identifier"),
    [
        ("GET", b"/v1/responses/resp_1", b"resp_1"),
        ("DELETE", b"/v1/responses/resp_1", b"resp_1"),
        ("POST", b"/v1/responses/resp_1", None),
        ("HEAD", b"/v1/responses/resp_1", None),
        ("POST", b"/v1/responses/resp_1/cancel", b"resp_1"),
        ("GET", b"/v1/responses/resp_1/cancel", None),
        ("GET", b"/v1/responses/resp_1/input_items", b"resp_1"),
        ("POST", b"/v1/responses/render", None),
        ("GET", b"/v1/responses/render", None),
        ("POST", b"/v1/responses", None),
    ],
)
def test_stored_response_id_is_read_from_path(method, path, identifier):
    assert stored_response_id(method, path) == identifier
    assert (classify(method, path) is INFERENCE) == (identifier is not None or method == "POST")


def test_path_label_of_stored_responses_is_one():
    assert path_label(b"/v1/responses/a") == path_label(b"/v1/responses/b/cancel")
    assert path_label(b"/v1/responses/render") == "/v1/responses/render"
    assert path_label(b"/v1/responses") == "/v1/responses"


@pytest.mark.parametrize(
    ("path", "anthropic"),
    [
        (b"/v1/messages", True),
        (b"/v1/messages/", True),
        (b"/v1/messages/count_tokens", True),
        (b"/v1/messages2", False),
        (b"/v1/message", False),
        (b"/v1/chat/completions", False),
        (b"", False),
    ],
)
def test_paths_anthropic_dialect_is_for_its_paths(path, anthropic):
    assert is_anthropic(path) is anthropic


def test_paths_metric_labels_are_known_paths_only():
    assert path_label(b"/v1/chat/completions") == "/v1/chat/completions"
    assert path_label(b"/v1/invented") == "other"
