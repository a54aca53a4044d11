"""The `[tls]` table: which files the router shows its clients and its servers. Pure.

A file is remembered with the digest of its content, so that a renewed certificate is a change of
the configuration like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_router.config.toml_reader import Reader
from vllm_router.config.types import FilePath, Flag, Secret, TlsVersion
from vllm_router.errors import ConfigError


class File(msgspec.Struct, frozen=True):
    """A file, by its path and the SHA-256 of what is in it."""

    path: str
    digest: Secret

    def __str__(self) -> str:
        return self.path


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """TLS for clients.

    certificate: PEM, the whole chain, the router's own first.
    key: its private key, PEM, not encrypted.
    client_ca: if given, only clients with a certificate of these authorities are served.
    min_version: the oldest TLS spoken.
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
    "verify": Flag,
}

ReadFile = Callable[[str], tuple[str, bytes]]


def read_tls(
    reader: Reader, table: object, read_file: ReadFile
) -> tuple[TlsConfig | None, dict[str, Any]]:
    """TLS for clients, None if there is to be none, and what all servers have in common."""
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
    """Replace every path among `values` by the file; one that cannot be read is a problem."""
    for name in _FILES & values.keys():
        if isinstance(values[name], File):
            continue
        try:
            where, data = read_file(values[name])
        except ConfigError as error:
            reader.problem(f"{path}.{name}", "; ".join(error.problems))
            del values[name]
        else:
            values[name] = File(where, Secret(hashlib.sha256(data).hexdigest()))


_FILES = frozenset({"certificate", "key", "client_ca", "ca", "client_certificate", "client_key"})


def check_client_certificate(reader: Reader, path: str, values: Mapping[str, Any]) -> None:
    """A certificate is of no use without its key, nor a key without its certificate."""
    if ("client_certificate" in values) != ("client_key" in values):
        reader.problem(
            f"{path}.client_certificate", "expected client_certificate with client_key, got one"
        )
