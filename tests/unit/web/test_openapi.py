"""/openapi.json describes the control plane completely and exactly."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.web_harness import Lab
from vllm_router.web.app import make_app
from vllm_router.web.openapi import document

DOC = document()
ELSEWHERE = {"/static/{path}", "/ws/load"}
"""Of the page alone, and no HTTP."""

KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def problems(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Violations of the document's few words of JSON Schema by a value."""
    if "$ref" in schema:
        schema = DOC["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    if "const" in schema and value != schema["const"]:
        return [f"{where}: {value!r} is not {schema['const']!r}"]
    kinds = schema.get("type", [])
    names = [kinds] if isinstance(kinds, str) else kinds
    if names and not any(isinstance(value, KINDS[name]) for name in names):
        return [f"{where}: {value!r} is not {kinds}"]
    found = []
    if isinstance(value, dict):
        found += [
            f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value
        ]
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                found += problems(value[name], inner, f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for number, one in enumerate(value):
            found += problems(one, schema["items"], f"{where}[{number}]")
    return found


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
    await lab.get("/explain")
    for method, operation in DOC["paths"][path].items():
        if method == "parameters":
            continue
        target = path.replace("{server}", next(iter(lab.router.fleet.servers)))
        for name in (target.replace("{model}", "m"), target.replace("{model}", "nothing")):
            reply = await lab.request(method.upper(), name)
            answer = operation["responses"][str(reply.status)]
            for kind, content in answer.get("content", {}).items():
                assert reply.headers["content-type"].startswith(kind)
                if kind == "application/json":
                    assert problems(reply.json, content["schema"]) == []


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
