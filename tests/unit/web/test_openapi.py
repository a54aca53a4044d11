"""/openapi.json describes the control plane completely and exactly."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from support.web_harness import Lab
from vllm_router.web.app import make_app
from vllm_router.web.openapi import document

DOC = document()
ELSEWHERE = {"/static/{path}", "/ws/load"}
"""Of the page alone, and no HTTP."""


def strict(schema: Any) -> Any:
    """The schema without permission for fields that it does not list."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return closed | {key: strict(inner) for key, inner in schema.items()}


COMPONENTS = strict(DOC["components"])


def problems(value: Any, schema: dict[str, Any]) -> list[str]:
    """Violations of a schema of the document; fields that are not described are some."""
    validator = jsonschema.Draft202012Validator({**strict(schema), "components": COMPONENTS})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


async def test_openapi_has_every_route_and_no_other():
    lab = Lab()
    app: Any = make_app(lab.router)
    routes: dict[str, set[str]] = {}
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        routes.setdefault(path, set()).update((rule.methods or set()) - {"HEAD", "OPTIONS"})
    described = {
        path: {method.upper() for method in item if method != "parameters"}
        for path, item in DOC["paths"].items()
    }
    assert described == {path: methods for path, methods in routes.items() if path not in ELSEWHERE}


@pytest.mark.parametrize("path", DOC["paths"])
async def test_openapi_matches_responses(path: str):
    lab = Lab()
    lab.ended(lab["a"])
    for method, operation in DOC["paths"][path].items():
        if method == "parameters":
            continue
        target = path.replace("{server}", next(iter(lab.router.fleet.servers)))
        for name in (target.replace("{model}", "m"), target.replace("{model}", "nothing")):
            reply = await lab.request(method.upper(), name)
            answer = operation["responses"][str(reply.status)]
            assert answer.get("headers", {}).keys() <= reply.headers.keys()
            assert ("x-vllm-router-error" in reply.headers) is bool(answer.get("headers"))
            contents = answer.get("content", {})
            kind = reply.headers["content-type"].partition(";")[0]
            assert not contents or kind in contents
            if kind == "application/json":
                assert problems(reply.json, contents[kind]["schema"]) == []


@pytest.mark.parametrize(
    ("path", "name", "matches"),
    [
        ("/v1/models/{model}", "meta-llama/Llama-3.1-8B", True),
        ("/v1/models/{model}", "a//b", False),
        ("/v1/models/{model}", "../b", False),
        ("/admin/servers/{server}", "gpu-1:8000/prefix", True),
        ("/admin/servers/{server}", "a/drain", False),
        ("/admin/servers/{server}", "a/undrain", False),
    ],
)
def test_openapi_names_in_paths_may_have_slashes(path: str, name: str, matches: bool):
    (parameter,) = DOC["paths"][path]["parameters"]
    assert bool(re.search(parameter["schema"]["pattern"], name)) is matches


async def test_openapi_root_for_browsers_is_described():
    lab = Lab()
    answers = DOC["paths"]["/"]["get"]["responses"]
    page = await lab.get("/", headers={"accept": "text/html"})
    assert page.headers["content-type"].partition(";")[0] in answers["200"]["content"]
    again = await lab.get(
        "/", headers={"accept": "text/html", "if-none-match": page.headers["etag"]}
    )
    assert str(again.status) in answers
    assert again.status == 304


async def test_openapi_explain_names_header_of_policy():
    lab = Lab(policy_header=True)
    header = DOC["paths"]["/explain"]["get"]["parameters"][1]["name"]
    reply = await lab.get("/explain?model=m", headers={header.lower(): "round_robin"})
    assert reply.json["policy"] == "round_robin"


@pytest.mark.parametrize("limit", ["-1", "x", "1.5", ""])
async def test_openapi_decisions_parameter_is_a_number(limit: str):
    reply = await Lab().get(f"/decisions?limit={limit}")
    assert reply.status == 400
    assert reply.error["param"] == "limit"


@pytest.mark.parametrize("failed", ["", "2", "yes"])
async def test_openapi_decisions_other_choice_is_refused(failed: str):
    reply = await Lab().get(f"/decisions?failed={failed}")
    assert reply.status == 400
    assert reply.error["param"] == "failed"


@pytest.mark.parametrize("action", ["drain", "undrain"])
async def test_drain_by_get_is_405_naming_post(action: str):
    lab = Lab()
    name = next(iter(lab.router.fleet.servers))
    reply = await lab.get(f"/admin/servers/{name}/{action}")
    assert reply.status == 405
    assert "POST" in reply.headers["allow"]
    assert "GET" not in reply.headers["allow"]


async def test_openapi_is_served():
    assert (await Lab().get("/openapi.json")).json == DOC
