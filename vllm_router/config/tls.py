"""The `[tls]` table: certificates for clients and for servers. Pure.

A file is compared by path and content, so that a renewed certificate is a configuration change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_router.config.toml_reader import Reader
from vllm_router.config.types import Bool, FilePath, Secret, TlsVersion
from vllm_router.errors import ConfigError


class File(msgspec.Struct, frozen=True):
    """A file by its path and the SHA-256 of its content."""

    path: str
    digest: Secret

    def __str__(self) -> str:
        return self.path


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """TLS for clients.

    certificate: PEM, the whole chain, the router's own certificate first.
    key: the private key, PEM, unencrypted.
    client_ca: if set, clients need a certificate issued by one of these authorities.
    min_version: the lowest TLS version accepted.
    """

    certificate: File
    key: File
    client_ca: File | None = None
    min_version: str = "1.2"


TLS_KEYS: dict[str, Any] = {
    "certificate": FilePath,
    "key": FilePath,
    "client_ca": FilePath,
    "min_version": TlsVersion,
}
SERVER_TLS_KEYS: dict[str, Any] = {
    "ca": FilePath,
    "client_certificate": FilePath,
    "client_key": FilePath,
    "verify": Bool,
}

ReadFile = Callable[[str], tuple[str, bytes]]


def read_tls(
    reader: Reader, table: object, read_file: ReadFile
) -> tuple[TlsConfig | None, dict[str, Any]]:
    """TLS for clients (None if it is off), and the values of `[tls.servers]` for all servers."""
    if not isinstance(table, dict):
        reader.table("tls", table, TLS_KEYS)
        return None, {}
    if not table:
        reader.problem("tls", "expected certificate and key, or servers, got none of them")
    rest = {key: value for key, value in table.items() if key != "servers"}
    values = reader.table("tls", rest, TLS_KEYS)
    common = reader.table("tls.servers", table.get("servers", {}), SERVER_TLS_KEYS)
    take_files(reader, "tls", values, read_file)
    take_files(reader, "tls.servers", common, read_file)
    if not rest:
        return None, common
    for name in ("certificate", "key"):
        if name not in rest:
            reader.problem(f"tls.{name}", "expected the path of a file, got none")
    if "certificate" not in values or "key" not in values:
        return None, common
    return TlsConfig(**values), common


def take_files(reader: Reader, path: str, values: dict[str, Any], read_file: ReadFile) -> None:
    """Replace the paths among `values` by `File`; unreadable files are problems."""
    for name in [name for name in values if name in _FILE_KEYS]:
        if isinstance(values[name], File):
            continue
        try:
            where, data = read_file(values[name])
        except ConfigError as error:
            reader.problem(f"{path}.{name}", "; ".join(error.problems))
            del values[name]
        else:
            values[name] = File(where, Secret(hashlib.sha256(data).hexdigest()))


_FILE_KEYS = frozenset(
    {"certificate", "key", "client_ca", "ca", "client_certificate", "client_key"}
)


def check_client_certificate(reader: Reader, path: str, values: Mapping[str, Any]) -> None:
    """Client certificate and client key are given together or not at all."""
    if ("client_certificate" in values) != ("client_key" in values):
        reader.problem(
            f"{path}.client_certificate",
            "expected both client_certificate and client_key, got only one of them",
        )
