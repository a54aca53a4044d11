"""The kinds of sources. Each module, and the library it needs, is imported when it is used."""

from __future__ import annotations

from vllm_router.config.discovery import (
    DnsSource,
    FileSource,
    HttpSource,
    KubernetesSource,
    SourceConfig,
)
from vllm_router.discovery.source import Source


def make_source(config: SourceConfig) -> Source:
    """The source for a table of `[discovery]`."""
    match config:
        case FileSource():
            from vllm_router.discovery.file_source import Files

            return Files(config)
        case HttpSource():
            from vllm_router.discovery.http_source import WebDocument

            return WebDocument(config)
        case DnsSource():
            from vllm_router.discovery.dns_source import DnsNames

            return DnsNames(config)
        case KubernetesSource():
            from vllm_router.discovery.kubernetes.source import Kubernetes

            return Kubernetes(config)
    raise TypeError(f"no source for {type(config).__name__}")


def kind_and_place(config: SourceConfig) -> tuple[str, str]:
    """The kind of a source, and where it looks, for people."""
    match config:
        case FileSource():
            return "file", ", ".join(config.paths)
        case HttpSource():
            return "http", config.url.partition("?")[0]
        case DnsSource():
            return "dns", f"{config.domain} {config.type}"
        case KubernetesSource():
            return "kubernetes", f"{config.namespace}: {config.selector} ({config.url})"
    raise TypeError(f"no source for {type(config).__name__}")
