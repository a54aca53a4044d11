"""Admission of requests by their head, before anything of the body is read.

Pure; replaced at every reload. A path that is not known to be harmless counts as reading the
router's state, so that an unforeseen path is closed.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_router.config.auth import AuthConfig, KeyConfig
from vllm_router.config.origins import Origins, forwarded_hosts, is_own, refusal_text
from vllm_router.config.schema import Config
from vllm_router.config.types import Secret, digest_of
from vllm_router.errors import Refused
from vllm_router.http.addresses import is_in, parse_networks
from vllm_router.http.asgi_types import HEAD_MEMO, IDENTITY, OWN_MACHINE, Message, Scope, Send
from vllm_router.proxy.headers import get_all
from vllm_router.proxy.identity import (
    ANONYMOUS,
    CREDENTIALS,
    Identity,
    Keyring,
    is_credential,
    keys_in,
    without_credentials,
)
from vllm_router.routing.paths import PathClass, classify
from vllm_router.web.access import is_local_name, unauthorized
from vllm_router.web.sessions import Sessions

FEED_PATH = "/ws/load"

MAX_QUERY_FIELDS = 1000
"""The most fields of a query that the router reads itself."""

MAY_READ = "vllm_router.may_read"
"""Scope key: the client may see the restricted parts of a public response."""


class Area(enum.Enum):
    """Groups of paths with the same rules."""

    INFERENCE = "inference"
    MODELS = "models"
    ENGINE_CONTROL = "engine control"
    ADMIN = "admin"
    ALIVE = "alive"  # reports only that the router runs
    HEALTH = "health"  # reports more to authorized clients
    PAGE = "page"  # the page's files, which are not secret, and its sign-in
    STATUS = "status"  # the state of the fleet, and all other paths


_ALIVE = frozenset({"/livez", "/ping"})
_HEALTH = frozenset({"/health", "/readyz"})
_PAGE = frozenset({"/", "/sign-in"})
_ONLY_PUBLIC = frozenset({Area.INFERENCE})
_ONLY_AT_ADMIN = frozenset({Area.ENGINE_CONTROL, Area.ADMIN, Area.PAGE, Area.STATUS})


def area_of(path_class: PathClass, path: str) -> Area:
    """`path` is decoded, as the control plane matches it."""
    if path_class is PathClass.INFERENCE:
        return Area.INFERENCE
    if path_class is PathClass.ENGINE_CONTROL:
        return Area.ENGINE_CONTROL
    if path == "/v1/models" or path.startswith("/v1/models/"):
        return Area.MODELS
    if path in _ALIVE:
        return Area.ALIVE
    if path in _HEALTH:
        return Area.HEALTH
    if path in _PAGE or path.startswith("/static/"):
        return Area.PAGE
    if path.startswith("/admin/"):
        return Area.ADMIN
    return Area.STATUS


@dataclass(frozen=True, slots=True)
class MonitorListener:
    """The loopback listener of the router's own monitor: its port, and the digest of its key."""

    port: int
    digest: Secret


_ADMINISTRATOR = Identity(status=True, admin=True, given=True)


def _port(scope: Scope) -> int | None:
    """The local port at which a request has arrived."""
    local: tuple[str, int] | None = scope.get("server")
    return local[1] if local is not None else None


class _Admitted(NamedTuple):
    """The guard that admitted a request, and the identity of the client.

    `secret` are the names of headers with credentials for the router, removed before forwarding.
    """

    guard: Guard
    identity: Identity
    secret: frozenset[bytes] | None


def _credentials(scope: Scope) -> frozenset[bytes]:
    """The names of the headers with credentials."""
    return frozenset([name for name, _ in scope["headers"] if is_credential(name)])


def _strip(scope: Scope, secret: frozenset[bytes]) -> None:
    """Remove these headers and the query's credentials, which no server may see."""
    if secret:
        scope["headers"] = [field for field in scope["headers"] if field[0] not in secret]
    if scope["query_string"]:
        _check_query(scope)
        scope["query_string"] = without_credentials(scope["query_string"])


def _check_query(scope: Scope) -> None:
    """Raises Refused for a query with so many fields that its parsing would delay other clients."""
    if scope["query_string"].count(b"&") >= MAX_QUERY_FIELDS:
        text = f"The query has more than {MAX_QUERY_FIELDS} fields. Send fewer."
        raise Refused(400, "bad_request", text)


class Guard:
    """The rules of one configuration.

    `admin_port` is the only local port for administration and status; None means any port. `own` is
    the listener of the router's own monitor. `sessions` are the signed-in pages.
    """

    def __init__(
        self,
        config: Config,
        admin_port: int | None = None,
        own: MonitorListener | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._sessions = sessions
        self.admin_port = admin_port
        self.own = own
        self.keyring = Keyring(config.auth or AuthConfig())
        self._has_keys = config.auth is not None
        self._origins = Origins(config.settings.cors_origins)
        self._trusted = parse_networks(config.settings.trusted_proxies)
        self._hosts = frozenset(config.settings.allowed_hosts)
        self._cuts_queries = any(server.api_key is not None for server in config.servers)
        """True if credentials are cut out of queries for a server that gets a key from us."""
        self._open = not (self._has_keys or self._hosts or own or admin_port is not None)
        """True if inference needs neither key nor other proof, on any port."""

    def admit(self, scope: Scope, path_class: PathClass) -> None:
        """Admit a request or websocket by its head; raises Refused.

        Stores the identity in the scope and removes its key: no key for this router may reach a
        server.
        """
        fields: dict[bytes, bytes] = dict(scope["headers"])
        if self._open and path_class is PathClass.INFERENCE:
            if b"origin" in fields:
                self._check_origin(scope, fields)
            if self._cuts_queries:
                _check_query(scope)
            scope[IDENTITY] = ANONYMOUS
            self._remember(scope, fields, None)
            return
        path: str = scope["path"]
        if path[:1] != "/":
            raise Refused(400, "bad_request", "The request target is malformed.")
        if self._cuts_queries or path_class is not PathClass.INFERENCE:
            _check_query(scope)
        if self.own is not None and _port(scope) == self.own.port:
            self._admit_own(scope, fields, self.own)
            return
        own_machine = OWN_MACHINE in scope
        if self._hosts and not own_machine:
            self._check_host(fields)
        area = area_of(path_class, path)
        if self.admin_port is not None and not own_machine:
            self._check_listener(scope, area)
        if b"origin" in fields and (area is Area.INFERENCE or path == FEED_PATH):
            self._check_origin(scope, fields)
        identity, secret = ANONYMOUS, None
        if self._has_keys:
            identity = self.keyring.identify(fields)
            if identity.known or self.keyring.has_clients or self._is_repeated_key(scope, fields):
                secret = _credentials(scope)
                _strip(scope, secret)
        if area not in (Area.INFERENCE, Area.MODELS):
            identity = self._administrator(scope, fields, identity)
        scope[IDENTITY] = identity
        self._check_key(scope, area, identity)
        if area is Area.INFERENCE:
            self._remember(scope, fields, secret)

    def _is_repeated_key(self, scope: Scope, fields: Mapping[bytes, bytes]) -> bool:
        """Whether a field that is repeated has a known key, though the last of them has not."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(fields) == len(headers):
            return False
        given = [{name: value} for name, value in headers if name in CREDENTIALS]
        # Not `any`: the time reveals nothing of the keys.
        return True in [self.keyring.identify(one).known for one in given]

    # -- connections that repeat themselves ---------------------------------------------------

    def remembers(self, scope: Scope) -> bool:
        """True if `admit` has admitted an inference request with this head on the same connection.

        The request then has the same identity. Otherwise the connection's cache is cleared, because
        it may belong to other rules.
        """
        memo = (scope.get("extensions") or {}).get(HEAD_MEMO)
        if memo is None:
            return False
        admitted: _Admitted | None = memo.get(Guard)
        if admitted is None or admitted.guard is not self:
            memo.clear()
            return False
        scope[IDENTITY] = admitted.identity
        if admitted.secret is not None:
            _strip(scope, admitted.secret)
        return True

    def _remember(
        self, scope: Scope, fields: Mapping[bytes, bytes], secret: frozenset[bytes] | None
    ) -> None:
        """Not for pages of other origins, whose responses need additional headers."""
        memo = (scope.get("extensions") or {}).get(HEAD_MEMO)
        if memo is not None and b"origin" not in fields:
            memo[Guard] = _Admitted(self, scope[IDENTITY], secret)

    # -- where it comes from ------------------------------------------------------------------

    def _check_host(self, fields: Mapping[bytes, bytes]) -> None:
        """Reject host names that an attacker's DNS could point at the router (DNS rebinding)."""
        host = fields.get(b"host", b"localhost").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower().rstrip(".") not in self._hosts and not is_local_name(host, "localhost"):
            raise Refused(
                421,
                "misdirected_request",
                "The Host header names an unknown host. Use the router's address, or "
                "list the host in allowed_hosts.",
            )

    def _check_origin(self, scope: Scope, fields: Mapping[bytes, bytes]) -> None:
        """Raises Refused for a page that is neither listed nor the router's own."""
        origin = fields[b"origin"].decode("latin-1")
        if origin in self._origins:
            return
        peer: tuple[str, int] | None = scope.get("client")
        host = fields.get(b"host", b"").decode("latin-1")
        hosts = [host]
        if self._trusted and peer is not None and is_in(peer[0], self._trusted):
            hosts += forwarded_hosts(
                get_all(scope["headers"], b"x-forwarded-host").decode("latin-1"),
                get_all(scope["headers"], b"forwarded").decode("latin-1"),
            )
        if not is_own(origin, hosts):
            text = refusal_text(origin, host, peer[0] if peer is not None else None)
            raise Refused(403, "cross_origin", text)

    def _check_listener(self, scope: Scope, area: Area) -> None:
        """Raises Refused for a path that the other listener serves."""
        only_at_the_other = _ONLY_PUBLIC if self._at_admin(scope) else _ONLY_AT_ADMIN
        if area in only_at_the_other:
            raise Refused(404, "not_found", f"There is nothing at {scope['path']}.")

    def _at_admin(self, scope: Scope) -> bool:
        return OWN_MACHINE in scope or _port(scope) == self.admin_port

    def _admit_own(self, scope: Scope, fields: Mapping[bytes, bytes], own: MonitorListener) -> None:
        """The monitor's listener: the holder of its key may do everything, others get a 404."""
        digests = [digest_of(key.decode("latin-1")) for key in keys_in(fields)]
        if not any(hmac.compare_digest(own.digest, digest) for digest in digests):
            raise Refused(404, "not_found", f"There is nothing at {scope['path']}.")
        _strip(scope, _credentials(scope))
        scope[IDENTITY] = _ADMINISTRATOR

    # -- identity -----------------------------------------------------------------------------

    def _administrator(
        self, scope: Scope, fields: Mapping[bytes, bytes], identity: Identity
    ) -> Identity:
        """The identity, with all rights if the request has a proof other than the admin key."""
        if OWN_MACHINE in scope and not self.keyring.has_admin:
            return _ADMINISTRATOR
        if self._sessions is not None and self._sessions.holds(keys_in(fields)):
            _strip(scope, _credentials(scope))
            return _ADMINISTRATOR
        return identity

    def _check_key(self, scope: Scope, area: Area, identity: Identity) -> None:
        ring = self.keyring
        reads = identity.status or not ring.protects_status
        if area in (Area.HEALTH, Area.PAGE):
            scope[MAY_READ] = reads and (self.admin_port is None or self._at_admin(scope))
            return
        allowed = True
        if ring.has_clients and area is Area.INFERENCE:
            allowed = identity.key is not None
        elif ring.has_clients and area is Area.MODELS:
            allowed = identity.known
        elif area is Area.STATUS:
            allowed = reads
        if not allowed:
            raise unauthorized(identity)

    # -- pages of other origins ---------------------------------------------------------------

    def preflight(self, scope: Scope) -> list[tuple[bytes, bytes]] | None:
        """The headers that answer a browser's preflight request.

        None if the request is not a preflight. Raises Refused if the origin is not allowed.
        """
        if scope["type"] != "http" or scope["method"] != "OPTIONS":
            return None
        fields: dict[bytes, bytes] = dict(scope["headers"])
        method = fields.get(b"access-control-request-method", b"").decode("latin-1")
        if not method or b"origin" not in fields:
            return None
        area = area_of(classify(method, scope["raw_path"]), scope["path"])
        if area not in (Area.INFERENCE, Area.MODELS):
            return None
        allow = self._allow_origin(fields)
        if allow is None:
            self._check_origin(scope, fields)
            return None
        wanted = fields.get(b"access-control-request-headers", b"")
        if fields.get(b"access-control-request-private-network") == b"true":
            allow.append((b"access-control-allow-private-network", b"true"))
        return [
            *allow,
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
            (b"access-control-allow-headers", wanted if _is_list(wanted) else b"authorization"),
            (b"access-control-max-age", b"600"),
        ]

    def _allow_origin(self, fields: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]] | None:
        """The headers by which a browser lets a page read a response; None if the page may not."""
        origin = fields.get(b"origin")
        if origin is None or origin.decode("latin-1") not in self._origins:
            return None
        if self._origins.everyone:
            return [(b"access-control-allow-origin", b"*")]
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]

    def for_pages(self, scope: Scope, path_class: PathClass, send: Send) -> Send:
        """`send` with the headers that let a page of an allowed origin read the response."""
        if not self._origins or scope["type"] != "http":
            return send
        allow = self._allow_origin(dict(scope["headers"]))
        if allow is None or area_of(path_class, scope["path"]) not in (
            Area.INFERENCE,
            Area.MODELS,
        ):
            return send
        added = [*allow, (b"access-control-expose-headers", _EXPOSED)]

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        return send_allowed


_EXPOSED = (
    b"request-id, retry-after, x-request-id, x-vllm-router-attempts, x-vllm-router-error, "
    b"x-vllm-router-server"
)


def _is_list(value: bytes) -> bool:
    """True for a list of header names that can be repeated in a response."""
    names = value.replace(b" ", b"").replace(b"-", b"").replace(b"_", b"").split(b",")
    return len(value) <= 1000 and all(name.isalnum() for name in names)


def identity_of(scope: Mapping[str, Any]) -> Identity:
    """The identity that `admit` has stored."""
    identity: Identity = scope.get(IDENTITY, ANONYMOUS)
    return identity


def visible(cards: list[dict[str, Any]], key: KeyConfig | None) -> list[dict[str, Any]]:
    """The models that a key may use."""
    return cards if key is None else [card for card in cards if key.allows(str(card["id"]))]
