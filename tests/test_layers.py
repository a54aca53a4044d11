"""Imports point down only, and the decisions stay free of sockets, frameworks and clocks."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_router

PACKAGE = Path(vllm_router.__file__).parent

PURE, TRIO, SERVING, WIRING = range(4)

# Every module or subpackage directly inside vllm_router, from the ground up.
LAYERS = {
    "addresses": PURE,
    "early_signals": PURE,
    "errors": PURE,
    "dialects": PURE,
    "request_ids": PURE,
    "log_config": PURE,
    "auth": PURE,
    "config": PURE,
    "kinds": PURE,
    "limits": PURE,
    "limits_config": PURE,
    "memory_config": PURE,
    "memory_limit": TRIO,
    "models_config": PURE,
    "origins": PURE,
    "paths": PURE,
    "server_url": PURE,
    "tls_config": PURE,
    "toml_reader": PURE,
    "fleet": PURE,
    "routing": PURE,
    "simulate": PURE,
    "http1": TRIO,
    "stalls": TRIO,
    "proxy": TRIO,
    "tasks": TRIO,
    "tls": TRIO,
    "mock": TRIO,
    "front": SERVING,
    "handover": TRIO,
    "strict_h11": TRIO,
    "hypercorn_bridge": SERVING,
    "own_machine": TRIO,
    "local_door": SERVING,
    "hypercorn_websocket": SERVING,
    "allowance": PURE,
    "http2_frames": PURE,
    "web": SERVING,
    "control": WIRING,
    "access_log": WIRING,
    "alive": WIRING,
    "explain_command": WIRING,
    "open_command": WIRING,
    "gatherer": WIRING,
    "log_output": WIRING,
    "log_writer": WIRING,
    "telemetry": WIRING,
    "logs": WIRING,
    "tables": WIRING,
    "demo": WIRING,
    "supervisor": WIRING,
    "router_options": WIRING,
    "service": WIRING,
    "workers": WIRING,
    "asgi": WIRING,
    "cli": WIRING,
    "monitor": WIRING,
    "__main__": WIRING,
}

WEB_FRAMEWORKS = {"quart", "quart_trio", "hypercorn"}
FORBIDDEN = {
    PURE: {"asyncio", "trio", "socket", "httpx", "httptools", "time", *WEB_FRAMEWORKS},
    TRIO: {"asyncio", *WEB_FRAMEWORKS},
    SERVING: {"asyncio"},
    WIRING: {"asyncio"},
}

# The simulated server stands for somebody else's program: it shares the wire format with the
# router and nothing else, and only the commands know it.
MOCK_MAY_USE = {"mock", "http1"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names imported anywhere in `tree`; a submodule rather than its package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in MODULES else base


class WithoutTypeOnly(ast.NodeTransformer):
    """Drops what only a type checker executes."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


@functools.cache
def imports_of(module: str, *, type_only: bool = True) -> frozenset[str]:
    path = MODULES[module]
    tree: ast.AST = ast.parse(path.read_text())
    if not type_only:
        tree = WithoutTypeOnly().visit(tree)
    return frozenset(imports(tree, module, is_package=path.name == "__init__.py"))


def part_of(module: str) -> str | None:
    """`fleet` for vllm_router.fleet.health; None for other distributions and the root."""
    head, _, rest = module.partition(".")
    return rest.split(".")[0] if head == PACKAGE.name and rest else None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time", "time"),
        ("def f():\n    from trio import sleep", "trio"),
        ("from . import paths", "vllm_router.paths"),
        ("from .paths import classify", "vllm_router.paths"),
        ("from vllm_router import errors", "vllm_router.errors"),
        ("from vllm_router import __version__", "vllm_router"),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: str):
    assert list(imports(ast.parse(source), "vllm_router.errors")) == [expected]


def test_relative_imports_of_a_package_start_in_the_package():
    source = "from .health import Health\nfrom .. import errors"
    names = list(imports(ast.parse(source), "vllm_router.fleet", is_package=True))
    assert names == ["vllm_router.fleet.health", "vllm_router.errors"]


def test_every_module_has_a_layer():
    assert {part for module in MODULES if (part := part_of(module))} <= LAYERS.keys()


def test_package_root_imports_nothing():
    for module in MODULES:
        if part_of(module) is None:
            assert imports_of(module) <= {"__future__"}


def test_modules_import_only_from_their_own_layer_and_below():
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if (part := part_of(module)) is not None
        for name in imports_of(module)
        if name.split(".")[0] in FORBIDDEN[LAYERS[part]]
        or ((imported := part_of(name)) is not None and LAYERS[imported] > LAYERS[part])
    ]
    assert wrong == []


def test_simulated_server_and_router_know_nothing_of_each_other():
    wrong = []
    for module in MODULES:
        part = part_of(module)
        used = {found for name in imports_of(module) if (found := part_of(name)) is not None}
        if part == "mock":
            wrong += [f"{module} imports {name}" for name in used - MOCK_MAY_USE]
        elif part is not None and LAYERS[part] < WIRING and "mock" in used:
            wrong.append(f"{module} imports mock")
    assert wrong == []


def test_no_module_imports_itself_through_others():
    graph = {module: imports_of(module, type_only=False) & MODULES.keys() for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()
