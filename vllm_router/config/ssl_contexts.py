"""TLS contexts: one for the router's clients, and one per kind of server."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from typing import TypeVar

from vllm_router.config.discovery import WebSource
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.config.tls import File, TlsConfig
from vllm_router.errors import ConfigError

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

T = TypeVar("T")

Peer = ServerConfig | WebSource
"""What the router connects to."""


def _no_password() -> str:
    """Password callback for OpenSSL, which would otherwise prompt at the terminal."""
    raise ValueError("the key is encrypted")


def _using(name: str, files: str, use: Callable[[], T]) -> T:
    """Call `use`; raises ConfigError if OpenSSL cannot use the files."""
    try:
        return use()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        words = str(reason).replace("_", " ").lower()
        raise ConfigError([f"{name}: cannot be used, {words}: {files}"]) from None


def serving_context(tls: TlsConfig) -> ssl.SSLContext:
    """The context for clients. Raises ConfigError for unusable files or a mismatching key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[tls.min_version]
    # No renegotiation, no compression (RFC 9325 3.3, 3.5).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load_pair(context, "tls.certificate", tls.certificate, tls.key)
    if tls.client_ca is not None:
        _load_authorities(context, "tls.client_ca", tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_pair(context: ssl.SSLContext, name: str, certificate: File, key: File) -> None:
    _using(
        name,
        f"{certificate} with {key}",
        lambda: context.load_cert_chain(certificate.path, key.path, _no_password),
    )


def _load_authorities(context: ssl.SSLContext, name: str, file: File) -> None:
    _using(name, str(file), lambda: context.load_verify_locations(file.path))


class ServerContexts:
    """Contexts for connections to servers, shared between servers with the same files.

    Loading the system's certificate authorities takes 20 ms and more.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[File | None, File | None, File | None, bool], ssl.SSLContext] = {}
        self._unused = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def of(self, server: Peer) -> ssl.SSLContext:
        """The context for a server; an unused default context for an http URL.

        Raises ConfigError for unusable files.
        """
        return self._shared(server) if server.url.startswith("https:") else self._unused

    def _shared(self, server: Peer) -> ssl.SSLContext:
        wanted = (server.ca, server.client_certificate, server.client_key, server.verify)
        context = self._made.get(wanted)
        if context is None:
            context = self._made[wanted] = self._make(server)
        return context

    def check(self, server: Peer) -> None:
        """Raises ConfigError if the server's files are unusable, even for an http URL."""
        self._shared(server)

    def prepare(self, servers: Iterable[ServerConfig]) -> None:
        """Create missing contexts. May run in a thread. Raises ConfigError."""
        for server in servers:
            self.of(server)

    def _make(self, server: Peer) -> ssl.SSLContext:
        name = f"source {server.name}" if isinstance(server, WebSource) else f"server {server.name}"
        if not server.verify:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif server.ca is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _load_authorities(context, f"{name}: ca", server.ca)
        else:
            context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if server.client_certificate is not None and server.client_key is not None:
            _load_pair(
                context, f"{name}: client_certificate", server.client_certificate, server.client_key
            )
        return context


def problems(config: Config) -> list[str]:
    """The problems of all certificate files that a configuration names."""
    found: list[str] = []
    if config.tls is not None:
        try:
            serving_context(config.tls)
        except ConfigError as error:
            found += error.problems
    contexts = ServerContexts()
    sources = config.discovery.sources if config.discovery is not None else ()
    peers: list[Peer] = [*config.servers, *(one for one in sources if isinstance(one, WebSource))]
    for server in peers:
        if server.ca is not None or server.client_certificate is not None:
            try:
                contexts.check(server)
            except ConfigError as error:
                found += error.problems
    return found
