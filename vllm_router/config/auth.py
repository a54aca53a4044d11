"""The `[auth]` table and the file of client keys. Pure.

Only digests of keys are kept. `proxy/identity.py` compares them with the keys of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_router.config.toml_reader import Reader, load_document, shown_value
from vllm_router.config.types import (
    Bool,
    ClientKey,
    FilePath,
    Models,
    Name,
    PerMinute,
    PositiveInt,
    Secret,
    Variable,
)
from vllm_router.errors import ConfigError


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One client's key.

    name: unique; stands for the key in logs and metrics.
    digest: SHA-256 of the key, from `key` (the key, or `sha256:` and the digest) or the
        environment variable named by `key_env`.
    models: public names of the models that the key may use; None for all.
    requests_per_minute: rate limit, 429 beyond; bursts of one minute's requests are allowed.
    max_concurrent_requests: limit, 429 beyond.
    """

    name: str
    digest: Secret
    models: tuple[str, ...] | None = None
    requests_per_minute: float | None = None
    max_concurrent_requests: int | None = None

    def allows(self, model: str | None) -> bool:
        """Whether the key may use this model. None (not named) is refused to restricted keys."""
        return self.models is None or model in self.models


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The `[auth]` table.

    keys: the clients' keys; without any, inference needs no key.
    admin_key: digest of the key for drain, reload and engine control; it may also read. Without
        it only the router's own user on the router's machine may administrate.
    status_key: digest of a key that may only read.
    protect_status: whether reading (metrics, load, feed, explanations) needs one of the two.
    """

    keys: tuple[KeyConfig, ...] = ()
    admin_key: Secret | None = None
    status_key: Secret | None = None
    protect_status: bool = False


KEY_KEYS: dict[str, Any] = {
    "name": Name,
    "key": ClientKey,
    "key_env": Variable,
    "models": Models,
    "requests_per_minute": PerMinute,
    "max_concurrent_requests": PositiveInt,
}
AUTH_KEYS: dict[str, Any] = {
    "admin_key": ClientKey,
    "admin_key_env": Variable,
    "status_key": ClientKey,
    "status_key_env": Variable,
    "protect_status": Bool,
    "keys_file": FilePath,
}


def read_auth(
    reader: Reader,
    table: object,
    environ: Mapping[str, str],
    read_file: Callable[[str], tuple[str, bytes]],
) -> AuthConfig:
    """Read the `[auth]` table; problems go to `reader`.

    `read_file(path)` returns the path to show and the bytes, or raises ConfigError.
    """
    if not isinstance(table, dict):
        reader.table("auth", table, AUTH_KEYS)
        return AuthConfig()
    before = reader.found_problems
    listed = table.get("keys", [])
    rest = {key: value for key, value in table.items() if key != "keys"}
    values = reader.table("auth", rest, AUTH_KEYS)
    for name in ("admin_key", "status_key"):
        key = _key_or_variable(reader, "auth", rest, values, environ, name, f"{name}_env")
        if key is not None:
            values[name] = key
    found = _Keys(reader, environ)
    found.read("auth.keys", listed)
    path = values.pop("keys_file", None)
    if path is not None:
        _read_keys_file(reader, found, path, environ, read_file)
    keys = tuple(found.keys)
    admin, status = values.get("admin_key"), values.get("status_key")
    if admin is not None and (admin == status or any(key.digest == admin for key in keys)):
        reader.problem(
            "auth.admin_key", "expected a key of its own, got the same key as another entry"
        )
    nothing = not keys and admin is None and status is None
    if nothing and reader.found_problems == before:  # a faulty key is its own problem
        reader.problem(
            "auth", "expected keys, keys_file, admin_key or status_key, got none of them"
        )
    if values.get("protect_status") and admin is None and status is None:
        reader.problem("auth.protect_status", "expected admin_key or status_key, got neither")
    return AuthConfig(keys=keys, **values)


def _read_keys_file(
    reader: Reader,
    found: _Keys,
    path: str,
    environ: Mapping[str, str],
    read_file: Callable[[str], tuple[str, bytes]],
) -> None:
    try:
        shown, data = read_file(path)
    except ConfigError as error:
        reader.problem("auth.keys_file", "; ".join(error.problems))
        return
    tables = {"keys": KEY_KEYS}
    found.reader = Reader(shown, tables, data=data)
    try:
        document = found.reader.expand("", load_document(data, shown, tables), environ)
    except ConfigError as error:
        for problem in error.problems:
            reader.line(problem, error.excerpts.get(problem, ""))
        return
    for table_name in document.keys() - {"keys"}:
        found.reader.unknown_key("", table_name, ("keys",))
    found.read("keys", document.get("keys", []))
    reader.include(found.reader)


class _Keys:
    """The client keys found so far, in the configuration and in the file of keys."""

    def __init__(self, reader: Reader, environ: Mapping[str, str]) -> None:
        self.reader = reader
        self.keys: list[KeyConfig] = []
        self._environ = environ

    def read(self, path: str, listed: object) -> None:
        if not isinstance(listed, list):
            self.reader.problem(path, f"expected array of tables, got {shown_value(listed)}")
            return
        for number, entry in enumerate(listed):
            self._read_one(f"{path}[{number}]", entry)

    def _read_one(self, path: str, entry: object) -> None:
        reader = self.reader
        values = reader.table(path, entry, KEY_KEYS)
        if not isinstance(entry, dict):
            return
        digest = _key_or_variable(reader, path, entry, values, self._environ, "key", "key_env")
        if "name" not in entry:
            reader.problem(f"{path}.name", "expected a name for the key, got none")
        if "key" not in entry and "key_env" not in entry:
            reader.problem(f"{path}.key", "expected key or key_env, got neither")
        if digest is None or "name" not in values:
            return
        for other in self.keys:
            if other.name == values["name"]:
                reader.problem(f"{path}.name", "expected a unique name, got another key's name")
            if other.digest == digest:
                reader.problem(f"{path}.key", f"expected a unique key, got the key of {other.name}")
        self.keys.append(KeyConfig(digest=digest, **values))


def _key_or_variable(
    reader: Reader,
    path: str,
    table: Mapping[str, object],
    values: dict[str, Any],
    environ: Mapping[str, str],
    name: str,
    by_variable: str,
) -> Secret | None:
    """The digest of a key given as `name` or as the variable `by_variable`; None if neither."""
    if name in table and by_variable in table:
        reader.problem(f"{path}.{by_variable}", f"expected {name} or {by_variable}, got both")
    digest = values.pop(name, None)
    variable = values.pop(by_variable, None)
    if variable is not None:
        digest = reader.variable(f"{path}.{by_variable}", variable, environ, ClientKey)
    return digest if isinstance(digest, Secret) else None
