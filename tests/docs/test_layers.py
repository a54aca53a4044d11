"""The import rules of the package: a level list, no circles, and pure decisions."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_router

PACKAGE = Path(vllm_router.__file__).parent

# A part imports only parts of lower levels. Parts of the same level do not know each other.
LEVELS = (
    {"errors", "steps"},
    {"config", "http"},
    {"fleet", "discovery"},
    {"routing"},
    {"proxy", "lab"},
    {"observability"},
    {"web"},
    {"runtime"},
    {"asgi", "cli", "embed"},
    {"__main__"},
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Simulated servers are for commands and tests; `run --demo` starts some in the router's process.
MAY_USE_LAB = {"cli", "runtime"}

# A simulated server stands for another program: it shares the HTTP code with the router, no more.
MOCK = "vllm_router.lab.mock"
MOCK_MAY_USE = (MOCK, "vllm_router.http", "vllm_router.errors")

# These import no I/O, web framework or clock: time is an argument.
PURE = (
    "vllm_router.config",
    "vllm_router.fleet",
    "vllm_router.routing",
    "vllm_router.proxy.answers",
)
PURE_MODULES = (
    "errors",
    "steps",
    "discovery.intake",
    "discovery.file_sd",
    "discovery.news",
    "discovery.kubernetes.messages",
    "discovery.kubernetes.slices",
    "proxy.retry",
    "proxy.quarantine",
    "proxy.failures",
    "proxy.status_rules",
)
IMPURE = {
    # They read files and build TLS contexts for the pure rest of their part.
    "vllm_router.config.reload",
    "vllm_router.config.ssl_contexts",
}
IO_AND_CLOCKS = {
    *("trio", "asyncio", "socket", "time", "httpx", "httptools"),
    *("quart", "quart_trio", "hypercorn"),
}

# Web frameworks are known to the control plane and to the adapter only.
WEB_FRAMEWORKS = {"quart", "quart_trio", "hypercorn"}
MAY_USE_FRAMEWORKS = ("vllm_router.http.hypercorn", "vllm_router.web", "vllm_router.asgi")


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


def imports_of(module: str) -> set[str]:
    """All imports, those for type checkers only and those inside functions included."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    return set(imports(tree, module, is_package=path.name == "__init__.py")) - {module}


@functools.cache
def all_imports() -> dict[str, set[str]]:
    """The imports of every module. Read by the first test that needs them, not at collection."""
    return {module: imports_of(module) for module in MODULES}


def part_of(module: str) -> str | None:
    """`fleet` for vllm_router.fleet.health; None for other distributions and the root."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 else None


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time", "time"),
        ("def f():\n    from trio import sleep", "trio"),
        ("if TYPE_CHECKING:\n    import trio", "trio"),
        ("from . import errors", "vllm_router.errors"),
        ("from .errors import Refused", "vllm_router.errors"),
        ("from vllm_router import errors", "vllm_router.errors"),
        ("from vllm_router import __version__", "vllm_router"),
    ],
)
def test_layers_imports_are_found_in_every_form(source: str, expected: str) -> None:
    assert set(imports(ast.parse(source), "vllm_router.asgi")) == {expected}


def test_layers_every_module_is_in_the_level_list() -> None:
    parts = {part_of(module) for module in MODULES} - {None}
    assert parts == set(LEVEL_OF)


def test_layers_rooms_import_only_lower_levels() -> None:
    upward = [
        f"{module} -> {imported}"
        for module, found in all_imports().items()
        for imported in found
        if (part := part_of(module)) is not None
        and (other := part_of(imported)) is not None
        and part != other
        and LEVEL_OF[other] >= LEVEL_OF[part]
    ]
    assert upward == []


def test_layers_lab_is_imported_by_commands_only() -> None:
    users = {
        part_of(module)
        for module, found in all_imports().items()
        if any(part_of(imported) == "lab" for imported in found)
    }
    assert users - {"lab"} <= MAY_USE_LAB


def test_layers_mock_shares_only_http_with_router() -> None:
    foreign = [
        f"{module} -> {imported}"
        for module, found in all_imports().items()
        if within(module, (MOCK,))
        for imported in found
        if part_of(imported) is not None and not within(imported, MOCK_MAY_USE)
    ]
    assert foreign == []


def test_layers_modules_import_in_no_circle() -> None:
    graph = {module: found & MODULES.keys() for module, found in all_imports().items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_layers_pure_modules_import_no_io_and_no_clock() -> None:
    named = {f"vllm_router.{name}" for name in PURE_MODULES}
    assert named <= MODULES.keys()
    assert MODULES.keys() >= IMPURE
    pure = {module for module in MODULES if within(module, PURE)} | named
    impure = [
        f"{module} -> {imported}"
        for module in sorted(pure - IMPURE)
        for imported in all_imports()[module]
        if imported.split(".")[0] in IO_AND_CLOCKS
    ]
    assert impure == []


def test_layers_web_frameworks_are_imported_in_their_rooms_only() -> None:
    users = [
        f"{module} -> {imported}"
        for module, found in all_imports().items()
        for imported in found
        if imported.split(".")[0] in WEB_FRAMEWORKS and not within(module, MAY_USE_FRAMEWORKS)
    ]
    assert users == []


def test_layers_asyncio_is_imported_nowhere() -> None:
    assert [module for module, found in all_imports().items() if "asyncio" in found] == []
