"""The kinds of sources. Each module, and the library it needs, is imported when it is used."""

from __future__ import annotations

from vllm_router.config.discovery import FileSource, SourceConfig
from vllm_router.discovery.source import Source


def make_source(config: SourceConfig) -> Source:
    """The source for a table of `[discovery]`."""
    match config:
        case FileSource():
            from vllm_router.discovery.files import Files

            return Files(config)
    raise TypeError(f"no source for {type(config).__name__}")


def kind_and_place(config: SourceConfig) -> tuple[str, str]:
    """The kind of a source, and where it looks, for people."""
    match config:
        case FileSource():
            return "file", ", ".join(config.paths)
    raise TypeError(f"no source for {type(config).__name__}")
