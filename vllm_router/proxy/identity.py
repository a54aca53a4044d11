"""The identity of a request by its API key; headers and parameters that carry credentials.

Pure. Keys are compared by digest, with every known key and in constant time.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from vllm_router.config.auth import AuthConfig, KeyConfig
from vllm_router.config.types import digest_of


@dataclass(frozen=True, slots=True)
class Identity:
    """The rights of a request, by its key.

    key: the client key, None for other keys and without one.
    status, admin: rights to read, and to administrate (which includes reading).
    given: whether the request carried any key.
    """

    key: KeyConfig | None = None
    status: bool = False
    admin: bool = False
    given: bool = False

    @property
    def known(self) -> bool:
        return self.key is not None or self.status


ANONYMOUS = Identity()
"""A request without a key."""

UNKNOWN_KEY = Identity(given=True)
"""A request with a key that is not configured."""

FEED_PROTOCOL = "vllm-router.feed"
"""The websocket subprotocol that the feed selects if the client offers any."""

KEY_PROTOCOL = b"vllm-router.key."
"""Prefix of a subprotocol that carries a key: browsers can set no other websocket header."""

MOST_PROTOCOLS = 16
"""Subprotocols that are looked at: each key in them is compared with every known one."""

CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
"""Headers in which the router looks for its own keys."""

_SECRET_WORDS = frozenset(
    b"accesstoken apikey assertion auth authentication authorization bearer cert certificate cookie"
    b" cookie2 credential credentials dpop idtoken jwt passwd password secret token".split()
)
"""Last words of header names that carry a secret or prove an identity."""

_KEY_KINDS = frozenset(
    b"access api auth client functions master sas secret shared subscription virtual".split()
)
"""Words before `key` in such names; `Idempotency-Key` carries no secret."""

_SECRET_NAMES = frozenset({b"key", b"x-key", b"x-amzn-oidc-data", b"client-cert-chain"})

_SECRET_PARAMETERS = frozenset({b"code", b"sig"})
"""Query parameters beside those names: Azure's function keys and shared access signatures."""


def is_credential(name: bytes) -> bool:
    """Whether a header or parameter of this lower-case name carries a credential.

    True for `Authorization`, `Cookie`, the API keys of common clients (`x-api-key`, `api-key`,
    `x-goog-api-key`, `Ocp-Apim-Subscription-Key`), and any name whose last word means an access
    key, token, password or certificate.
    """
    *before, last = name.replace(b"_", b"-").split(b"-")
    if last == b"key" and before and before[-1] in _KEY_KINDS:
        return True
    return last in _SECRET_WORDS or b"authorization" in before or name in _SECRET_NAMES


def without_credentials(query: bytes) -> bytes:
    """The query string without credentials such as `key=` and `api-key=`."""
    return b"&".join([pair for pair in query.split(b"&") if not _is_secret_parameter(pair)])


def _is_secret_parameter(pair: bytes) -> bool:
    name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" ")).strip().lower()
    return name in _SECRET_PARAMETERS or is_credential(name)


def keys_in(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """The keys of a request: OpenAI's header, Anthropic's, and the websocket subprotocol."""
    found = []
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        found.append(key.strip())
    if key := headers.get(b"x-api-key", b""):
        found.append(key.strip())
    protocols = headers.get(b"sec-websocket-protocol", b"").split(b",", MOST_PROTOCOLS)
    for offered in protocols[:MOST_PROTOCOLS]:
        if (name := offered.strip()).startswith(KEY_PROTOCOL):
            found += _decode_key(name.removeprefix(KEY_PROTOCOL))
    return [key for key in found if key]


def _decode_key(token: bytes) -> list[bytes]:
    """Decode base64url without padding: a subprotocol must be a token (RFC 6455 4.1)."""
    try:
        return [base64.urlsafe_b64decode(token + b"=" * (-len(token) % 4))]
    except (binascii.Error, ValueError):
        return []


class Keyring:
    """Identifies requests by the keys of a configuration."""

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

    def identify(self, headers: Mapping[bytes, bytes]) -> Identity:
        """The identity by the last key that is known; else ANONYMOUS or UNKNOWN_KEY.

        Compares each key with every known one, so that the time reveals nothing.
        """
        keys = keys_in(headers)
        identity = UNKNOWN_KEY if keys else ANONYMOUS
        for key in keys:
            digest = digest_of(key.decode("latin-1"))
            for known, candidate in (*self._clients, *self._others):
                if hmac.compare_digest(known, digest):
                    identity = candidate
        return identity
