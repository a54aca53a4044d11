"""One OpenAI-compatible entry point for a fleet of vLLM servers.

As a library: `Config`, `ConfigError`, `RunningRouter`, `load_config`, `parse_config`, `run_app` and
`serve` of `vllm_router.embed`, which is imported when one of them is used.
"""

from typing import Any

__version__ = "0.1.0"

_API = ("Config", "ConfigError", "RunningRouter", "load_config", "parse_config", "run_app", "serve")


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("vllm_router.embed"), name)
