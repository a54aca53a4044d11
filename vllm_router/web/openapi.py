"""The OpenAPI 3.1 document of the control plane: GET /openapi.json.

Inference paths are documented by the engines.
"""

from __future__ import annotations

from typing import Any

from vllm_router import __version__
from vllm_router.web.openapi_schemas import SCHEMAS, TEXT, Doc, ref, struct


def _answer(description: str, schema: Doc, kind: str = "application/json") -> Doc:
    return {"description": description, "content": {kind: {"schema": schema}}}


_ERRORS = {
    400: "The request is malformed.",
    401: "A key is missing or wrong.",
    403: "This client or page may not do this.",
    404: "Not found.",
    408: "The body did not arrive in time.",
    409: "The current state does not allow this.",
    413: "The body is too large.",
    421: "The router does not answer to this name.",
    422: "The configuration file is wrong: the old one stays in force.",
    503: "Not ready yet, or stopping.",
}


_ERROR_HEADERS: Doc = {
    "x-vllm-router-error": {"description": "The code of the router's error.", "schema": TEXT}
}


def _operation(summary: str, name: str, *errors: int, **more: Any) -> Doc:
    """An operation that answers 200 with this schema."""
    answers = {"200": _answer(summary, ref(name))}
    for code in (400, 421, *errors):
        answers[str(code)] = {**_answer(_ERRORS[code], ref("Error")), "headers": _ERROR_HEADERS}
    return {"summary": summary, "responses": dict(sorted(answers.items())), **more}


def _named(name: str, text: str, excluded: str = "") -> Doc:
    """A path parameter; the pattern excludes names that would be read as another path."""
    pattern = f"^{excluded}{_PART}(/{_PART})*$"
    schema = {"type": "string", "minLength": 1, "pattern": pattern}
    return {"name": name, "in": "path", "required": True, "description": text, "schema": schema}


_PART = "[A-Za-z0-9_][A-Za-z0-9_.:-]*"
_READING: Doc = {"security": [{}, {"key": []}], "tags": ["observation"]}
_ADMIN: Doc = {"security": [{}, {"key": []}], "tags": ["administration"]}
_OPEN: Doc = {"security": [], "tags": ["health checks"]}
_SERVER = _named("server", "The server's name in the configuration.", "(?!.*/(un)?drain$)")
_MODEL_ASKED = {
    "name": "model",
    "in": "query",
    "description": "The model name, as in a request.",
    "schema": TEXT,
}
_POLICY = {
    "name": "X-Router-Policy",
    "in": "header",
    "description": "The policy to explain, if policy_header is true.",
    "schema": TEXT,
}
_LIMIT = {
    "name": "limit",
    "in": "query",
    "description": "The maximum number of entries.",
    "schema": {"type": "integer", "minimum": 0, "default": 100},
}
_OF_SERVER = {
    "name": "server",
    "in": "query",
    "description": "Only requests whose last attempt was on this server.",
    "schema": TEXT,
}
_ONLY_FAILED = {
    "name": "failed",
    "in": "query",
    "description": "1: only requests that failed.",
    "schema": {"type": "string", "enum": ["0", "1", "false", "true"]},
}
_BODY = {
    "description": "The body of a request to an inference path.",
    "content": {"application/json": {"schema": {}}},
}
_CODE = {
    "description": "The code from /admin/sign-in.",
    "required": True,
    "content": {"application/json": {"schema": struct({"code": TEXT})}},
}


def _plain(summary: str, kind: str, *errors: int, **more: Any) -> Doc:
    """An operation with a text response."""
    found = _operation(summary, "Error", *errors, **more)
    found["responses"]["200"] = _answer(summary, TEXT, kind)
    return found


def _ping() -> Doc:
    found = _operation("Whether the router is there.", "Error", **_OPEN)
    found["responses"]["200"] = {"description": "It is."}
    return found


def _ready() -> Doc:
    found = _operation("Whether requests should be sent here.", "Ready", **_OPEN)
    found["responses"]["503"] = _answer("They should not.", ref("Ready"))
    return found


def _root() -> Doc:
    found = _operation("The name of the service; in a browser, the dashboard.", "Service", 404)
    found["responses"]["200"]["content"]["text/html"] = {"schema": TEXT}
    found["responses"]["304"] = {"description": "The browser has this page already."}
    return found


def document() -> Doc:
    """The whole document."""
    paths: Doc = {
        "/livez": {"get": _operation("The process is alive.", "Alive", **_OPEN)},
        "/readyz": {"get": _ready()},
        "/ping": {"get": _ping(), "post": _ping()},
        "/health": {"get": _operation("The fleet's health.", "Health", **_OPEN)},
        "/v1/models": {
            "get": _operation("All models of the fleet.", "Models", 401, 503, tags=["models"])
        },
        "/v1/models/{model}": {
            "get": _operation("One model.", "Model", 401, 404, tags=["models"]),
            "parameters": [_named("model", "Its name.")],
        },
        "/load-stats": {"get": _operation("The load now.", "LoadStats", 401, 404, **_READING)},
        "/server-models": {
            "get": _operation("The models of each server.", "ServerModels", 401, 404, **_READING)
        },
        "/load": {
            "get": _operation("The load in vLLM's format.", "ServerLoad", 401, 404, **_READING)
        },
        "/version": {"get": _operation("The version.", "Version", 401, 404, **_READING)},
        "/metrics": {
            "get": _plain(
                "Metrics in the Prometheus text format.", "text/plain", 401, 404, **_READING
            )
        },
        "/explain": {
            "get": _operation(
                "Where a request for a model would go.",
                "Explanation",
                401,
                404,
                parameters=[_MODEL_ASKED, _POLICY],
                **_READING,
            ),
            "post": _operation(
                "Where this request would go.",
                "Explanation",
                401,
                403,
                404,
                408,
                413,
                requestBody=_BODY,
                parameters=[_POLICY],
                **_READING,
            ),
        },
        "/decisions": {
            "get": _operation(
                "The last requests, the newest first.",
                "Decisions",
                401,
                404,
                parameters=[_LIMIT, _OF_SERVER, _ONLY_FAILED],
                **_READING,
            )
        },
        "/openapi.json": {
            "get": _operation("This document.", "Document", 401, 404, **_READING),
        },
        "/": {"get": _root()},
        "/admin/servers": {
            "get": _operation("All servers.", "Servers", 401, 403, 404, **_ADMIN),
        },
        "/admin/keys": {
            "get": _operation(
                "The client keys with the most requests in the last minutes.",
                "Keys",
                401,
                403,
                404,
                **_ADMIN,
            ),
        },
        "/admin/servers/{server}": {
            "get": _operation("One server.", "Server", 401, 403, 404, **_ADMIN),
            "parameters": [_SERVER],
        },
        "/admin/servers/{server}/drain": {
            "post": _operation(
                "Drain a server: it gets no new requests.", "Server", 401, 403, 404, **_ADMIN
            ),
            "parameters": [_SERVER],
        },
        "/admin/servers/{server}/undrain": {
            "post": _operation(
                "Take a drained server back.", "Server", 401, 403, 404, 409, **_ADMIN
            ),
            "parameters": [_SERVER],
        },
        "/admin/sign-in": {
            "post": _operation(
                "Create a single-use code that signs a page in.", "Code", 401, 403, 404, **_ADMIN
            )
        },
        "/sign-in": {
            "post": _operation(
                "Exchange a code for a key.", "SignedIn", 400, 403, 404, 408, 413, requestBody=_CODE
            )
        },
        "/admin/reload": {
            "post": _operation(
                "Read the configuration file now.", "Reload", 401, 403, 404, 409, 422, **_ADMIN
            )
        },
    }
    keys = {"type": "http", "scheme": "bearer", "description": "status_key or admin_key."}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vLLM Router",
            "version": __version__,
            "description": "The router's own paths. vLLM documents the inference paths.",
        },
        "paths": paths,
        "components": {
            "schemas": {**SCHEMAS, "Document": {"type": "object"}},
            "securitySchemes": {"key": keys},
        },
    }
