"""Error responses: whether they concern the request or the server."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.cli.server_check import ServerReport, uneven_lengths
from vllm_router.proxy.retry import Outcome
from vllm_router.proxy.status_rules import Scope, judge_answer
from vllm_router.routing.prompt.lengths import sure_tokens

JSON, HTML, TEXT = b"application/json", b"text/html; charse", b"text/plain"


def judge(status: int, body: bytes | None = b"{}", kind: bytes = JSON, **options: bool):
    given = {"client_key": False, "asked_model": True, **options}
    return judge_answer(status, kind, body, **given)


def error(message: str, **fields: object) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308, 399])
def test_judge_answer_redirect_is_misdirected(status):
    judgement = judge(status, b"")
    assert judgement[:2] == (Outcome.MISDIRECTED, Scope.ROUTE)


@pytest.mark.parametrize("kind", [b"text/html", HTML, b"application/xhtml"])
def test_judge_answer_page_with_200_is_misdirected(kind):
    assert judge(200, b"<html>", kind).outcome is Outcome.MISDIRECTED
    assert judge(200, b"text", TEXT).outcome is Outcome.ANSWERED


@pytest.mark.parametrize("status", [401, 402, 403])
def test_judge_answer_refused_key_counts_for_owner_of_key(status):
    assert judge(status, client_key=False).outcome is Outcome.REFUSED
    assert judge(status, client_key=True).outcome is Outcome.ANSWERED


def test_judge_answer_proxy_login_is_servers_in_any_case():
    assert judge(407, client_key=True).outcome is Outcome.REFUSED


NO_ROUTE = {
    "vLLM 0.32": (404, b'{"detail":"Not Found"}', JSON),
    "vLLM 0.32, 405": (405, b'{"detail":"Method Not Allowed"}', JSON),
    "an error object": (404, error("Not Found", type="NotFoundError", code=404), JSON),
    "OpenAI": (404, error("Invalid URL (POST /v1/responses)"), JSON),
    "TGI": (404, b'{"error":"Not Found"}', JSON),
    "nginx": (404, b"<html><h1>404 Not Found</h1></html>", b"text/html"),
    "Traefik": (404, b"404 page not found\n", TEXT),
    "Envoy": (404, b"", b""),
    "Kong": (404, b'{"message":"no Route matched with those values"}', JSON),
    "gone": (410, b"", b""),
}


@pytest.mark.parametrize("name", NO_ROUTE)
def test_judge_answer_missing_route_concerns_the_route(name):
    status, body, kind = NO_ROUTE[name]
    assert judge(status, body, kind)[:2] == (Outcome.REFUSED, Scope.ROUTE)


NO_MODEL = {
    "vLLM 0.32": error("The model `x` does not exist.", type="NotFoundError", param="model"),
    "vLLM 0.8": b'{"object":"error","message":"The model `x` does not exist.","code":404}',
    "OpenAI": error("The model 'x' does not exist", code="model_not_found"),
    "Anthropic": b'{"type":"error","error":{"message":"model: x not found"}}',
    "llama.cpp": error("model 'x' not found", type="not_found_error"),
    "Ollama": b'{"error":"model \\"x\\" not found, try pulling it first"}',
}


@pytest.mark.parametrize("name", NO_MODEL)
def test_judge_answer_missing_model_concerns_the_model(name):
    assert judge(404, NO_MODEL[name])[:2] == (Outcome.NO_MODEL, Scope.MODEL)
    assert judge(404, NO_MODEL[name], asked_model=False).outcome is Outcome.ANSWERED


ABOUT_THE_REQUEST = {
    "a missing response": (404, error("Response with id 'resp_1' not found.")),
    "packed": (404, None),
    "bad request": (400, error("temperature must be non-negative", code=400)),
    "a list": (400, b"[]"),
    "no JSON": (400, b"\xff"),
    "deep": (400, b"[" * 100_000),
    "validation": (422, b'{"detail":[{"loc":["body"]}]}'),
    "timeout": (408, b""),
    "conflict": (409, b""),
    "media type": (415, error("Unsupported Media Type")),
    "client closed": (499, b""),
}


@pytest.mark.parametrize("name", ABOUT_THE_REQUEST)
def test_judge_answer_clients_mistake_is_the_answer(name):
    status, body = ABOUT_THE_REQUEST[name]
    assert judge(status, body).outcome is Outcome.ANSWERED


def test_judge_answer_too_large_body_concerns_the_size():
    assert judge(413, b"<html>", b"text/html")[:2] == (Outcome.REFUSED, Scope.SIZE)


@pytest.mark.parametrize(("status", "kind"), [(400, HTML), (431, HTML), (414, JSON), (501, JSON)])
def test_judge_answer_proxy_refusal_may_concern_the_request(status, kind):
    assert judge(status, b"<html>", kind)[:2] == (Outcome.REFUSED, Scope.REQUEST)


TOO_LONG = {
    "vLLM 0.32, text": (
        error(
            "This model's maximum context length is 2048 tokens. However, your prompt contains "
            "36050 characters (more than 26624 characters, which is the upper bound for 2048 "
            "input tokens). Please reduce the length of the input prompt.",
            param="input_text",
        ),
        2048,
    ),
    "vLLM 0.32, max_tokens": (
        error("max_tokens=99999 cannot be greater than max_model_len=2048. Please request fewer"),
        2048,
    ),
    "OpenAI": (error("Too many tokens.", code="context_length_exceeded"), 0),
    "SGLang": (
        b'{"object":"error","message":"The input is longer than the context length (4096)."}',
        4096,
    ),
    "TGI": (
        b'{"error":"`inputs` tokens + `max_new_tokens` must be <= 4096","error_type":"validation"}',
        4096,
    ),
    "llama.cpp": (error("the request exceeds the available context size, try increasing it"), 0),
    "Anthropic": (
        b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long"}}',
        0,
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_judge_answer_too_long_reports_length(name):
    body, length = TOO_LONG[name]
    judgement = judge(422 if name == "TGI" else 400, body)
    assert (judgement.outcome, judgement.length) == (Outcome.TOO_LONG, length)


@given(st.integers(200, 499), st.binary(max_size=200), st.sampled_from([JSON, HTML, TEXT, b""]))
def test_judge_answer_any_bytes_give_judgement(status, body, kind):
    assert judge(status, body, kind).outcome in Outcome


# -- certain needs of a request ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x" * 100_000}, 0),
        ({"max_tokens": 5000}, 5000),
        ({"max_tokens": 9000, "max_completion_tokens": 50}, 50),
        ({"max_output_tokens": 70}, 70),
        ({"prompt": [5] * 300}, 300),
        ({"input": [[1] * 30, [2] * 30]}, 30),
        ({"input": [[1] * 50, [2] * 10]}, 30),
        ({"prompt": ["a, b", "c"]}, 0),
        ({"prompt": []}, 0),
        ({"prompt": [[]]}, 0),
        ({"max_tokens": None, "prompt": [1, 2]}, 2),
        ({"max_tokens": -1}, 0),
        ({"max_tokens": 1e9}, 0),
        ({"max_tokens": "many"}, 0),
        ([], 0),
    ],
)
def test_sure_tokens_counts_certain_tokens_only(body, tokens):
    assert sure_tokens(json.dumps(body).encode()) == tokens


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), min_size=1, max_size=5))
def test_sure_tokens_never_exceeds_longest_prompt(prompts):
    found = sure_tokens(json.dumps({"prompt": prompts}).encode())
    assert 0 < found <= max(map(len, prompts))


def test_uneven_lengths_returns_model_and_servers():
    reports = [
        ServerReport("a", "", models={"m": 1000, "n": 50}),
        ServerReport("b", "", models={"m": 4000, "n": 50, "o": None}),
        ServerReport("c", "", models=None),
    ]
    (line,) = uneven_lengths(reports)
    assert "'m'" in line
    assert "1000 on a, 4000 on b" in line
