"""Who may do what: the `[auth]` table, and the keys that requests carry. Pure.

Keys are compared by their digests, each with every one that is known and to the end, so that the
time it takes says nothing about them. None of them is kept as it was written.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from vllm_router.config.toml_reader import Reader, load_document, shown_value
from vllm_router.config.types import (
    ClientKey,
    Count,
    FilePath,
    Flag,
    Models,
    Name,
    PerMinute,
    Secret,
    Variable,
    digest_of,
)
from vllm_router.errors import ConfigError

# -- what the file may say --------------------------------------------------------------------


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One client's key.

    name: unique; in logs and metrics, where the key itself never is.
    digest: its SHA-256, from `key` (the key, or `sha256:` and the digest) or the environment
        variable named by `key_env`.
    models: the only ones it may use; None for all.
    requests_per_minute: refused with 429 beyond; a minute's worth may come at once.
    max_concurrent_requests: refused with 429 beyond.
    """

    name: str
    digest: Secret
    models: tuple[str, ...] | None = None
    requests_per_minute: float | None = None
    max_concurrent_requests: int | None = None

    def allows(self, model: str | None) -> bool:
        """Whether it may use this model. One that is limited must say which it wants."""
        return self.models is None or model in self.models


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The `[auth]` table.

    keys: of the clients; without any, inference is open.
    admin_key: the digest of the key for drain, reload and engine control, which also reads all.
        Without one, these are for the router's own user on its own machine.
    status_key: the digest of a key that only reads.
    protect_status: whether reading (metrics, load, feed, explanations) takes one of those two.
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
    "max_concurrent_requests": Count,
}
AUTH_KEYS: dict[str, Any] = {
    "admin_key": ClientKey,
    "admin_key_env": Variable,
    "status_key": ClientKey,
    "status_key_env": Variable,
    "protect_status": Flag,
    "keys_file": FilePath,
}


def read_auth(
    reader: Reader,
    table: object,
    environ: Mapping[str, str],
    read_file: Callable[[str], tuple[str, bytes]],
) -> AuthConfig:
    """The `[auth]` table; problems go to `reader`.

    `read_file(path)` gives the name to show and the bytes, and raises ConfigError.
    """
    if not isinstance(table, dict):
        reader.table("auth", table, AUTH_KEYS)
        return AuthConfig()
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
        try:
            shown, data = read_file(path)
            found.reader = Reader(shown, {"keys": KEY_KEYS})
            document = load_document(data, shown)
            for table_name in document.keys() - {"keys"}:
                found.reader.unknown_key("", table_name, ("keys",))
            found.read("keys", document.get("keys", []))
            reader.include(found.reader)
        except ConfigError as error:
            for problem in error.problems:
                reader.line(problem)
    keys = tuple(found.keys)
    admin, status = values.get("admin_key"), values.get("status_key")
    if admin is not None and (admin == status or any(key.digest == admin for key in keys)):
        reader.problem("auth.admin_key", "expected a key of its own, got one that others have")
    if not keys and admin is None and status is None:
        reader.problem(
            "auth", "expected keys, keys_file, admin_key or status_key, got none of them"
        )
    if values.get("protect_status") and admin is None and status is None:
        reader.problem("auth.protect_status", "expected admin_key or status_key, got neither")
    return AuthConfig(keys=keys, **values)


class _Keys:
    """Collects `[[keys]]` tables from the configuration and from the file of keys."""

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
                reader.problem(f"{path}.name", "expected a name of its own, got one used before")
            if other.digest == digest:
                reader.problem(f"{path}.key", f"expected another key than that of {other.name}")
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
    """The digest of a key that is given here or by the name of a variable; None if neither is."""
    if name in table and by_variable in table:
        reader.problem(f"{path}.{by_variable}", f"expected {name} or {by_variable}, got both")
    digest = values.pop(name, None)
    variable = values.pop(by_variable, None)
    if variable is not None:
        digest = reader.variable(f"{path}.{by_variable}", variable, environ, ClientKey)
    return digest if isinstance(digest, Secret) else None


# -- what a request may do --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sends a request, by its key: a client, one who may read all, one who may do all.

    `given` says that there was a key at all.
    """

    key: KeyConfig | None = None
    status: bool = False
    admin: bool = False
    given: bool = False

    @property
    def known(self) -> bool:
        return self.key is not None or self.status


ANONYMOUS = Identity()
STRANGER = Identity(given=True)

FEED_PROTOCOL = "vllm-router.feed"
"""The websocket subprotocol that the feed answers with if a client offers any."""

KEY_PROTOCOL = b"vllm-router.key."
"""Begins the one that carries a key: a browser's websocket can send no other field."""

CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
"""The fields in which the router itself looks for a key."""

_SECRETS = frozenset(
    b"accesstoken apikey assertion auth authentication authorization bearer cert certificate cookie"
    b" cookie2 credential credentials dpop idtoken jwt passwd password secret token".split()
)
"""Last words of names of fields that carry a secret or prove an identity."""

_KEYS = frozenset(
    b"access api auth client functions master sas secret shared subscription virtual".split()
)
"""Words before `key` in such names. `Idempotency-Key` is no secret."""

_OTHER_SECRETS = frozenset({b"key", b"x-key", b"x-amzn-oidc-data", b"client-cert-chain"})

_SECRET_PARAMETERS = frozenset({b"code", b"key", b"sig"})
"""Of queries: Google's key, and Azure's for functions and shared access signatures."""


def is_credential(name: bytes) -> bool:
    """Whether a field or parameter of this name, in lower case, carries a credential.

    True for `Authorization`, `Cookie` and the API keys of all usual clients (`x-api-key`,
    `api-key`, `x-goog-api-key`, `Ocp-Apim-Subscription-Key`), and for any other name whose last
    word says that it is a key for access, a token, a password or a certificate.
    """
    *before, last = name.replace(b"_", b"-").split(b"-")
    if last == b"key" and before and before[-1] in _KEYS:
        return True
    return last in _SECRETS or b"authorization" in before or name in _OTHER_SECRETS


def without_credentials(query: bytes) -> bytes:
    """A query without its credentials, such as `key=` and `api-key=`."""
    return b"&".join([pair for pair in query.split(b"&") if not _is_secret_parameter(pair)])


def _is_secret_parameter(pair: bytes) -> bool:
    name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" ")).strip().lower()
    return name in _SECRET_PARAMETERS or is_credential(name)


def presented(fields: Mapping[bytes, bytes]) -> list[bytes]:
    """The keys that a request carries, in the ways of OpenAI, Anthropic, and browsers' sockets."""
    found = []
    scheme, _, key = fields.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        found.append(key.strip())
    if key := fields.get(b"x-api-key", b""):
        found.append(key.strip())
    for offered in fields.get(b"sec-websocket-protocol", b"").split(b","):
        if (name := offered.strip()).startswith(KEY_PROTOCOL):
            found += _decoded(name.removeprefix(KEY_PROTOCOL))
    return [key for key in found if key]


def _decoded(token: bytes) -> list[bytes]:
    """A key in base64url without padding, as a subprotocol is a token (RFC 6455 4.1)."""
    try:
        return [base64.urlsafe_b64decode(token + b"=" * (-len(token) % 4))]
    except (binascii.Error, ValueError):
        return []


class Keyring:
    """The keys of a configuration, to be compared with those of requests."""

    def __init__(self, auth: AuthConfig) -> None:
        self._clients = [(key.digest, Identity(key, given=True)) for key in auth.keys]
        self._others = [
            (digest, Identity(status=True, admin=admin, given=True))
            for digest, admin in ((auth.status_key, False), (auth.admin_key, True))
            if digest is not None
        ]
        self.has_clients = bool(auth.keys)
        self.has_admin = auth.admin_key is not None
        self.protects_status = auth.protect_status

    def identify(self, fields: Mapping[bytes, bytes]) -> Identity:
        """Whose key it is; ANONYMOUS for none, STRANGER for one that nobody has."""
        keys = presented(fields)
        identity = STRANGER if keys else ANONYMOUS
        for key in keys:
            digest = digest_of(key.decode("latin-1"))
            for known, who in (*self._clients, *self._others):
                if hmac.compare_digest(known, digest):
                    identity = who
        return identity
