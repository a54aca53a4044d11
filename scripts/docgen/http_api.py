"""docs/reference/http.md: the paths of the control plane, from the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_router.web.openapi import document

HEAD = """\
# Every path of the router's own

The paths that the router answers itself, written from `GET /openapi.json` by `scripts/gen-docs`.
The paths of vLLM's APIs are forwarded; [API](../api.md) has both with examples.
"""


def http_page() -> str:
    """The whole page."""
    return HEAD + "".join(_sections(document()))


def _sections(described: dict[str, Any]) -> Iterator[str]:
    for path, item in described["paths"].items():
        for method, operation in item.items():
            if method not in ("get", "post", "put", "delete"):
                continue
            yield f"\n## {method.upper()} {path}\n\n{operation['summary']}\n"
            if operation.get("description"):
                yield f"\n{operation['description']}\n"
            parameters = [*item.get("parameters", ()), *operation.get("parameters", ())]
            parameters = [_resolved(described, each) for each in parameters]
            if parameters:
                yield "\n| Parameter | In | Meaning |\n|---|---|---|\n"
                for one in parameters:
                    yield f"| `{one['name']}` | {one['in']} | {one.get('description', '')} |\n"
            yield "\n| Status | Body | Meaning |\n|--:|---|---|\n"
            for status, answer in operation["responses"].items():
                found = _resolved(described, answer)
                kinds = ", ".join(f"`{kind}`" for kind in found.get("content", ()))
                yield f"| {status} | {kinds} | {found['description']} |\n"


def _resolved(described: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """The value that a reference names."""
    reference = value.get("$ref")
    if reference is None:
        return value
    found: Any = described
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    resolved: dict[str, Any] = found
    return resolved
