"""Words, limits and forms by which error responses are judged."""

from __future__ import annotations

import json

import pytest

from vllm_router.proxy.retry import Outcome
from vllm_router.proxy.status_rules import READABLE, Judgement, Scope, judge_answer

JSON, HTML = b"application/json", b"text/html; charse"
NO_MODEL = b'{"error":{"message":"The model x does not exist","code":"model_not_found"}}'
TOO_LONG = b'{"error":{"message":"Too many tokens.","code":"context_length_exceeded"}}'


def judge(status: int, body: bytes | None = b"{}", kind: bytes = JSON) -> Judgement:
    return judge_answer(status, kind, body, client_key=False, asked_model=True)


def error(message: str, **fields: object) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


WORDS = {
    401: "401: the key that the router sends is not accepted",
    402: "402: the key that the router sends has no credit",
    403: "403: the key that the router sends does not allow it",
    404: "404: no such route",
    405: "405: no such route for POST",
    407: "407: a proxy in front of it requires a login",
    410: "410: no such route any more",
    413: "413: the request is too large for it or its proxy",
    421: "421: it is not the server for this name",
    426: "426: it requires another protocol",
    501: "501: not implemented",
    414: "414",
    431: "431",
}


@pytest.mark.parametrize("status", WORDS)
def test_judge_answer_refusal_has_words_for_operator(status):
    judgement = judge(status, b"")
    assert (judgement.outcome, judgement.words) == (Outcome.REFUSED, WORDS[status])
    whole_route = {401, 402, 404, 405, 407, 410, 421, 426}
    assert (judgement.scope is Scope.ROUTE) is (status in whole_route)
    assert judgement.length == 0


def test_judge_answer_misdirection_names_status():
    assert judge(302, b"").words == "302: a redirect, perhaps to a login page"
    assert judge(200, b"", HTML).words == "200 with a web page, perhaps a login page"
    assert judge(404, NO_MODEL).words == "404: no such model"
    assert judge(410, NO_MODEL).words == "410: no such model"
    assert judge(400, TOO_LONG).words == "400: its context is too short"


@pytest.mark.parametrize("status", [200, 299, 400, 408, 418, 422, 428])
def test_judge_answer_other_status_is_the_answer_itself(status):
    judgement = judge(status, b"{}")
    assert judgement == (Outcome.ANSWERED, Scope.REQUEST, "", 0)
    assert judge(status, None).outcome is Outcome.ANSWERED


def test_judge_answer_page_is_known_by_type_alone():
    for kind in (HTML, b"application/xhtml+xml"):
        assert judge(404, error("The model `x` does not exist."), kind).scope is Scope.ROUTE
        assert judge(418, b"", kind).outcome is Outcome.REFUSED
        assert judge(400, TOO_LONG, kind).outcome is Outcome.REFUSED
    assert judge(418, b"", b"x/text/html").outcome is Outcome.ANSWERED


def test_judge_answer_error_is_read_up_to_a_limit():
    body = TOO_LONG
    assert judge(400, body.ljust(READABLE)).outcome is Outcome.TOO_LONG
    assert judge(400, body.ljust(READABLE + 1)).outcome is Outcome.ANSWERED


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b'{"message":"The model `x` does not exist."}', Outcome.REFUSED),  # not an error's form
        (b'{"object":"error","message":"The model `x` does not exist."}', Outcome.NO_MODEL),
        (error("gone away", code="model_not_found"), Outcome.NO_MODEL),
        (error("Unknown MODEL x"), Outcome.NO_MODEL),
        (error("x: no such model"), Outcome.NO_MODEL),
        (error("models are not found here, a model is"), Outcome.ANSWERED),
        (error("it does not exist, the model"), Outcome.ANSWERED),
        (error("this model,\nand that\none, are unknown"), Outcome.NO_MODEL),
        (error("model " * 10_000), Outcome.ANSWERED),  # took 20 s
        (error("gone away", param="model"), Outcome.NO_MODEL),
        (error("gone away", param="input"), Outcome.ANSWERED),
        (error("  Not Found.  "), Outcome.REFUSED),
        (error("Not Found in the archive"), Outcome.ANSWERED),
        (b'{"error":"gone away","error_type":"model_not_found"}', Outcome.NO_MODEL),
        (b'{"error":"gone away"}', Outcome.ANSWERED),
        (b'{"error":{}}', Outcome.ANSWERED),
        (b'{"error":null}', Outcome.REFUSED),
        (b'"text"', Outcome.REFUSED),
    ],
)
def test_judge_answer_404_is_judged_by_its_error(body, outcome):
    assert judge(404, body).outcome is outcome
