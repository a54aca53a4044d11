"""TLS contexts: one for the router's clients, and one per kind of server."""

from __future__ import annotations

import re
import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from vllm_router.config.discovery import HttpSource, WebSource
from vllm_router.config.schema import Config, ServerConfig
from vllm_router.config.tls import File, TlsConfig
from vllm_router.config.toml_reader import MAX_FILE_BYTES
from vllm_router.errors import ConfigError

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

T = TypeVar("T")

Peer = ServerConfig | WebSource
"""What the router connects to."""


def _no_password() -> str:
    """Password callback for OpenSSL, which would otherwise prompt at the terminal."""
    raise ValueError("the key is encrypted")


class UnusableFile(ConfigError):
    """OpenSSL cannot use a file. `key` is the key of the configuration that names it."""

    def __init__(self, owner: str, key: str, reason: str, *, passing: bool = False) -> None:
        super().__init__([f"{owner}{key}: cannot be used, {reason}"], passing=passing)
        self.key = key
        self.reason = reason


def _using(owner: str, key: str, files: str, use: Callable[[], T]) -> T:
    """Call `use`; raises UnusableFile if OpenSSL cannot use the files."""
    try:
        return use()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        words = str(reason).replace("_", " ").lower()
        if "pem lib" in words:
            words = "malformed PEM, perhaps half written"
        # An SSLError is about the content. A file that appears or gets another mode is noticed.
        lasting = isinstance(error, (ssl.SSLError, FileNotFoundError, PermissionError, ValueError))
        passing = isinstance(error, OSError) and not lasting
        raise UnusableFile(owner, key, f"{words}: {files}", passing=passing) from None


def serving_context(tls: TlsConfig) -> ssl.SSLContext:
    """The context for clients. Raises ConfigError for unusable files or a mismatching key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[tls.min_version]
    # No renegotiation, no compression (RFC 9325 3.3, 3.5).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load_pair(context, "tls.", "certificate", tls.certificate, "key", tls.key)
    if tls.client_ca is not None:
        _load_authorities(context, "tls.", "client_ca", tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_pair(
    context: ssl.SSLContext,
    owner: str,
    certificate_key: str,
    certificate: File,
    key_key: str,
    key: File,
) -> None:
    # OpenSSL says "PEM lib" for all of these.
    _expect_pem(owner, certificate_key, certificate, b"CERTIFICATE", "certificate")
    _expect_pem(owner, key_key, key, b"PRIVATE KEY", "private key")
    _using(
        owner,
        certificate_key,
        f"{certificate} with {key}",
        lambda: context.load_cert_chain(certificate.path, key.path, _no_password),
    )


def _load_authorities(context: ssl.SSLContext, owner: str, key: str, file: File) -> None:
    _expect_pem(owner, key, file, b"CERTIFICATE", "certificate")
    _using(owner, key, str(file), lambda: context.load_verify_locations(file.path))


def _expect_pem(owner: str, key: str, file: File, label: bytes, what: str) -> None:
    def read() -> bytes:
        with open(file.path, "rb") as opened:
            return opened.read(MAX_FILE_BYTES)

    data = _using(owner, key, str(file), read)
    if not re.search(rb"-----BEGIN [A-Z0-9 ]*" + label + rb"-----", data):
        raise UnusableFile(owner, key, f"no {what} in PEM: {file}")


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
            _load_authorities(context, f"{name}: ", "ca", server.ca)
        else:
            context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if server.client_certificate is not None and server.client_key is not None:
            _load_pair(
                context,
                f"{name}: ",
                "client_certificate",
                server.client_certificate,
                "client_key",
                server.client_key,
            )
        return context


class Problem(NamedTuple):
    """A certificate file that cannot be used.

    `paths` are the keys of the configuration that may name it, the most likely one first. `passing`
    as in ConfigError.
    """

    paths: tuple[str, ...]
    text: str
    passing: bool = False


def problems(config: Config) -> list[Problem]:
    """The problems of all certificate files that a configuration names."""
    found: list[Problem] = []

    def look(check: Callable[[], object], tables: Sequence[str]) -> None:
        try:
            check()
        except UnusableFile as error:
            paths = tuple([f"{table}.{error.key}" for table in tables])
            found.append(Problem(paths, f"cannot be used, {error.reason}", error.passing))

    tls = config.tls
    if tls is not None:
        look(lambda: serving_context(tls), ["tls"])
    contexts = ServerContexts()
    for number, server in enumerate(config.servers):
        if server.ca is not None or server.client_certificate is not None:
            tables = [f"servers.servers[{number}]", "tls.servers"]
            look(partial(contexts.check, server), tables)
    sources = config.discovery.sources if config.discovery is not None else ()
    counted: Counter[str] = Counter()
    for source in sources:
        if isinstance(source, WebSource):
            table = f"discovery.{'http' if isinstance(source, HttpSource) else 'kubernetes'}"
            look(partial(contexts.check, source), [f"{table}[{counted[table]}]", table])
            counted[table] += 1
    return found
