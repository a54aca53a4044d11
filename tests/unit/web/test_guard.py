"""Admission by the head of a request: keys, listeners, hosts, origins, and what servers may see."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from support.fleet_makers import make_config
from vllm_router.config.auth import AuthConfig, KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.errors import Refused
from vllm_router.http.asgi_types import HEAD_MEMO, OWN_MACHINE, Message
from vllm_router.proxy.identity import ANONYMOUS, Identity
from vllm_router.routing.paths import classify
from vllm_router.web.access import check_admin, is_local_name, is_loopback
from vllm_router.web.guard import MAY_READ, Guard, MonitorListener, identity_of, visible
from vllm_router.web.sessions import Sessions

CHAT = "/v1/chat/completions"
KEY = KeyConfig(name="k", digest=digest_of("sk-k"), models=("m",))
KEYS = AuthConfig(
    keys=(KEY,),
    admin_key=digest_of("sk-admin"),
    status_key=digest_of("sk-status"),
    protect_status=True,
)
ADMINISTRATOR = Identity(status=True, admin=True, given=True)
Fields = tuple[tuple[bytes, bytes], ...]


def guard(auth: AuthConfig | None = None, **options: Any) -> Guard:
    names = ("admin_port", "own", "sessions")
    of_guard = {name: options.pop(name) for name in names if name in options}
    return Guard(msgspec.structs.replace(make_config(1, **options), auth=auth), **of_guard)


def scope_of(
    path: str = CHAT,
    *fields: tuple[bytes, bytes],
    method: str | None = None,
    query: bytes = b"",
    port: int = 8888,
    host: bytes = b"router.test",
    **more: Any,
) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method or ("POST" if path == CHAT else "GET"),
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(b"host", host), *fields],
        "client": ("192.0.2.1", 5),
        "server": ("127.0.0.1", port),
        "extensions": {HEAD_MEMO: {}},
        **more,
    }


def admitted(rules: Guard, scope: dict[str, Any]) -> Identity | tuple[int, str]:
    """The identity of an admitted request, or the status and code of a refusal."""
    try:
        rules.admit(scope, classify(scope["method"], scope["raw_path"]))
    except Refused as refused:
        return refused.status, refused.code
    return identity_of(scope)


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + key.encode()


MISSING, INVALID = (401, "missing_api_key"), (401, "invalid_api_key")
NOT_FOUND = (404, "not_found")


# -- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        (CHAT, {"sk-k"}),
        ("/v1/models", {"sk-k", "sk-status", "sk-admin"}),
        ("/v1/models/m", {"sk-k", "sk-status", "sk-admin"}),
        ("/metrics", {"sk-status", "sk-admin"}),
        ("/ws/load", {"sk-status", "sk-admin"}),
        ("/anything", {"sk-status", "sk-admin"}),
        ("/livez", {"", "sk-none", "sk-k", "sk-status", "sk-admin"}),
        ("/ping", {"", "sk-none", "sk-k", "sk-status", "sk-admin"}),
        ("/health", {"", "sk-none", "sk-k", "sk-status", "sk-admin"}),
        ("/static/app.js", {"", "sk-none", "sk-k", "sk-status", "sk-admin"}),
        # The handlers of these ask for an administrator themselves.
        ("/admin/reload", {"", "sk-none", "sk-k", "sk-status", "sk-admin"}),
        ("/sleep", {"", "sk-none", "sk-k", "sk-status", "sk-admin"}),
    ],
)
@pytest.mark.parametrize("key", ["", "sk-none", "sk-k", "sk-status", "sk-admin"])
def test_guard_area_needs_its_kind_of_key(path: str, accepted: set[str], key: str):
    fields = (bearer(key),) if key else ()
    found = admitted(guard(KEYS), scope_of(path, *fields))
    if key not in accepted:
        assert found == (INVALID if key else MISSING)
        return
    assert isinstance(found, Identity)
    assert found.key == (KEY if key == "sk-k" else None)
    assert (found.status, found.admin) == (key in ("sk-status", "sk-admin"), key == "sk-admin")
    assert found.given is bool(key)


@pytest.mark.parametrize("path", ["/health", "/readyz", "/", "/sign-in"])
def test_guard_public_page_says_more_with_a_right(path: str):
    for key, may_read in (("", False), ("sk-k", False), ("sk-status", True), ("sk-admin", True)):
        scope = scope_of(path, *((bearer(key),) if key else ()))
        assert isinstance(admitted(guard(KEYS), scope), Identity)
        assert scope[MAY_READ] is may_read
    open_ = scope_of(path)
    admitted(guard(), open_)
    assert open_[MAY_READ] is True


def test_guard_without_keys_of_clients_leaves_their_keys_to_the_servers():
    """The key may be one of the server's."""
    only_admin = guard(AuthConfig(admin_key=digest_of("sk-admin")))
    scope = scope_of(CHAT, bearer("sk-of-server"))
    assert admitted(only_admin, scope) == Identity(given=True)
    assert bearer("sk-of-server") in scope["headers"]
    scope = scope_of(CHAT, bearer("sk-admin"), query=b"key=x&a=1")
    assert admitted(only_admin, scope) == ADMINISTRATOR
    assert bearer("sk-admin") not in scope["headers"]
    assert scope["query_string"] == b"a=1"


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key"])
def test_guard_known_key_in_first_of_two_fields_reaches_no_server(name: bytes):
    """Programs differ in which of two equal fields they use; the last one has no rights here."""
    only_admin = guard(AuthConfig(admin_key=digest_of("sk-admin")))
    first = (name, b"Bearer sk-admin" if name == b"authorization" else b"sk-admin")
    scope = scope_of(CHAT, first, bearer("sk-of-server"), (name, b"Bearer x"))
    assert admitted(only_admin, scope) == Identity(given=True)
    assert scope["headers"] == [(b"host", b"router.test")]
    scope = scope_of(CHAT, bearer("sk-1"), bearer("sk-2"))
    admitted(only_admin, scope)
    assert len(scope["headers"]) == 3, "keys of the servers stay"


def test_guard_removes_every_credential_before_a_server_sees_it():
    scope = scope_of(
        CHAT, bearer("sk-k"), (b"cookie", b"c"), (b"x-a", b"1"), query=b"api-key=s&b=2"
    )
    assert admitted(guard(KEYS), scope) == Identity(KEY, given=True)
    assert scope["headers"] == [(b"host", b"router.test"), (b"x-a", b"1")]
    assert scope["query_string"] == b"b=2"


def test_guard_unprotected_status_is_open_to_all():
    rules = guard(AuthConfig(admin_key=digest_of("sk-admin")))
    assert admitted(rules, scope_of("/metrics")) == ANONYMOUS


def test_guard_malformed_path_is_refused():
    assert admitted(guard(KEYS), scope_of("metrics")) == (400, "bad_request")


def test_guard_models_shown_are_allowed_to_the_key():
    cards = [{"id": "m"}, {"id": "n"}]
    assert visible(cards, None) == cards
    assert visible(cards, KEY) == [{"id": "m"}]


# -- administrators -----------------------------------------------------------------------------


def test_guard_own_machine_is_an_administrator_unless_there_is_a_key():
    for path in ("/metrics", "/admin/reload", "/sleep", "/health"):
        scope = scope_of(path, **{OWN_MACHINE: True})
        assert admitted(guard(), scope) == ADMINISTRATOR
        scope = scope_of(path, **{OWN_MACHINE: True})
        assert admitted(guard(KEYS), scope) != ADMINISTRATOR
    assert admitted(guard(), scope_of(CHAT, **{OWN_MACHINE: True})) == ANONYMOUS


def test_guard_page_that_signed_in_is_an_administrator():
    sessions = Sessions(lambda: 0.0)
    key = sessions.exchange(sessions.new_code())
    assert key is not None
    rules = guard(KEYS, sessions=sessions)
    scope = scope_of("/metrics", bearer(key))
    assert admitted(rules, scope) == ADMINISTRATOR
    assert bearer(key) not in scope["headers"]
    assert admitted(rules, scope_of(CHAT, bearer(key))) == INVALID
    assert admitted(rules, scope_of("/metrics", bearer("sk-none"))) == INVALID
    sessions.end()
    assert admitted(rules, scope_of("/metrics", bearer(key))) == INVALID


def test_guard_monitor_listener_needs_its_key():
    rules = guard(KEYS, own=MonitorListener(9999, digest_of("own")))
    for fields in ((), (bearer("sk-admin"),)):
        assert admitted(rules, scope_of("/metrics", *fields, port=9999)) == NOT_FOUND
    scope = scope_of("/metrics", bearer("own"), port=9999)
    assert admitted(rules, scope) == ADMINISTRATOR
    assert scope["headers"] == [(b"host", b"router.test")]
    assert admitted(rules, scope_of("/metrics", bearer("own"))) == INVALID


@pytest.mark.parametrize(
    ("identity", "has_key", "code"),
    [
        (ADMINISTRATOR, True, None),
        (ADMINISTRATOR, False, None),
        (ANONYMOUS, True, "missing_api_key"),
        (Identity(status=True, given=True), True, "invalid_api_key"),
        (Identity(status=True, given=True), False, "admin_local_only"),
    ],
)
def test_check_admin_refuses_all_others(identity: Identity, has_key: bool, code: str | None):
    if code is None:
        check_admin(identity, has_admin_key=has_key)
        return
    with pytest.raises(Refused) as caught:
        check_admin(identity, has_admin_key=has_key)
    assert caught.value.code == code


# -- listeners and hosts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "public", "admin"),
    [
        (CHAT, True, False),
        ("/v1/models", True, True),
        ("/livez", True, True),
        ("/health", True, True),
        ("/", False, True),
        ("/metrics", False, True),
        ("/admin/reload", False, True),
        ("/sleep", False, True),
    ],
)
def test_guard_admin_port_divides_the_paths(path: str, public: bool, admin: bool):
    rules = guard(admin_port=9000)
    for port, served in ((8888, public), (9000, admin)):
        found = admitted(rules, scope_of(path, port=port))
        assert (found != NOT_FOUND) is served
    assert admitted(rules, scope_of(path, server=None)) == admitted(rules, scope_of(path))
    assert admitted(rules, scope_of(path, **{OWN_MACHINE: True})) != NOT_FOUND


def test_guard_admin_port_alone_says_more_of_health():
    rules = guard(admin_port=9000)
    for more, may_read in (({}, False), ({"port": 9000}, True), ({OWN_MACHINE: True}, True)):
        scope = scope_of("/health", **more)
        admitted(rules, scope)
        assert scope[MAY_READ] is may_read


@pytest.mark.parametrize("path", [CHAT, "/metrics"])
@pytest.mark.parametrize(
    ("host", "known"),
    [
        (b"llm.example", True),
        (b"LLM.example:8443", True),
        (b"llm.example.", True),
        (b"localhost:8888", True),
        (b"a.localhost", True),
        (b"127.0.0.1:8888", True),
        (b"[::1]:8888", True),
        (b"evil.example", False),
        (b"llm.example.evil", False),
        (b"", False),
    ],
)
def test_guard_allowed_hosts_reject_others(path: str, host: bytes, known: bool):
    rules = guard(allowed_hosts=["llm.example"])
    found = admitted(rules, scope_of(path, host=host))
    assert found == (ANONYMOUS if known else (421, "misdirected_request"))
    assert isinstance(admitted(rules, scope_of(path, host=host, **{OWN_MACHINE: True})), Identity)


@pytest.mark.parametrize(
    ("client", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("localhost", False),
        (None, False),
    ],
)
def test_is_loopback_knows_addresses_of_this_machine(client: str | None, loopback: bool):
    assert is_loopback(client) is loopback


def test_is_local_name_of_machine_or_broken_host():
    assert is_local_name("gpu-1:80", "GPU-1")
    assert not is_local_name("gpu-2", "GPU-1")
    assert not is_local_name("[::1", "GPU-1")
    assert not is_local_name(None, "GPU-1")


# -- pages of other origins ---------------------------------------------------------------------

CROSS = (403, "cross_origin")


def origin(value: bytes) -> tuple[bytes, bytes]:
    return b"origin", value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (CHAT, b"https://app.example", ANONYMOUS),
        (CHAT, b"http://router.test", ANONYMOUS),
        (CHAT, b"https://evil.example", CROSS),
        (CHAT, b"null", CROSS),
        (CHAT, b"http://[::1", CROSS),
        ("/ws/load", b"https://evil.example", CROSS),
        ("/ws/load", b"http://router.test", ANONYMOUS),
        ("/metrics", b"https://evil.example", ANONYMOUS),
    ],
)
@pytest.mark.parametrize("auth", [None, AuthConfig(admin_key=digest_of("sk-admin"))])
def test_guard_origin_must_be_listed_or_its_own(path, value, expected, auth):
    rules = guard(auth, cors_origins=["https://app.example"])
    assert admitted(rules, scope_of(path, origin(value))) == expected


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    "field",
    [(b"x-forwarded-host", b"llm.example"), (b"forwarded", b"for=10.1.1.1;host=llm.example")],
)
def test_guard_origin_of_proxy_counts_if_the_proxy_is_trusted(trusted: bool, field):
    rules = guard(trusted_proxies=["192.0.2.0/24" if trusted else "10.0.0.0/8"])
    found = admitted(rules, scope_of(CHAT, origin(b"https://llm.example"), field))
    assert found == (ANONYMOUS if trusted else CROSS)


def preflight(rules: Guard, *fields: tuple[bytes, bytes], path: str = CHAT, **more: Any) -> Any:
    asked = (b"access-control-request-method", b"POST")
    scope = scope_of(path, *(fields or (origin(b"https://app.example"),)), asked, **more)
    found = rules.preflight({**scope, "method": more.get("method", "OPTIONS")})
    return None if found is None else dict(found)


def test_guard_preflight_of_listed_origin_is_answered():
    rules = guard(cors_origins=["https://app.example"])
    allowed = {
        b"access-control-allow-origin": b"https://app.example",
        b"vary": b"origin",
        b"access-control-allow-methods": b"GET, HEAD, POST, DELETE",
        b"access-control-allow-headers": b"authorization",
        b"access-control-max-age": b"600",
    }
    assert preflight(rules) == allowed
    page = origin(b"https://app.example")
    wanted = (b"access-control-request-headers", b"Content-Type, x_a")
    asked = preflight(rules, page, wanted)
    assert asked[b"access-control-allow-headers"] == b"Content-Type, x_a"
    for bad in (b"a\r\nb", b"a:b", b"a," * 501):
        odd = (b"access-control-request-headers", bad)
        assert preflight(rules, page, odd)[b"access-control-allow-headers"] == b"authorization"
    private = (b"access-control-request-private-network", b"true")
    assert preflight(rules, page, private)[b"access-control-allow-private-network"] == b"true"
    assert b"access-control-allow-private-network" not in preflight(rules, page)


def test_guard_preflight_of_everyone_names_no_origin():
    found = preflight(guard(cors_origins=["*"]))
    assert found[b"access-control-allow-origin"] == b"*"
    assert b"vary" not in found


def test_guard_preflight_of_other_origin_is_refused():
    with pytest.raises(Refused) as caught:
        preflight(guard(), origin(b"https://evil.example"))
    assert (caught.value.status, caught.value.code) == CROSS
    assert preflight(guard(), origin(b"http://router.test")) is None


def test_guard_preflight_is_an_options_request_for_models_or_inference():
    rules = guard(cors_origins=["*"])
    assert preflight(rules, method="POST") is None
    assert preflight(rules, (b"x-a", b"no origin")) is None
    assert preflight(rules, path="/metrics") is None
    assert preflight(rules, type="websocket") is None
    assert preflight(rules, path="/v1/models") is not None
    no_method = scope_of(CHAT, origin(b"https://app.example"), method="OPTIONS")
    assert rules.preflight(no_method) is None


@pytest.mark.parametrize(
    ("path", "value", "kind", "added"),
    [
        (CHAT, b"https://app.example", "http", True),
        ("/v1/models", b"https://app.example", "http", True),
        ("/metrics", b"https://app.example", "http", False),
        (CHAT, b"https://evil.example", "http", False),
        (CHAT, None, "http", False),
        (CHAT, b"https://app.example", "websocket", False),
    ],
)
async def test_guard_lets_pages_of_listed_origins_read_responses(path, value, kind, added):
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = scope_of(path, *((origin(value),) if value is not None else ()), type=kind)
    rules = guard(cors_origins=["https://app.example"])
    through = rules.for_pages(scope, classify(scope["method"], scope["raw_path"]), send)
    assert (through is not send) is added
    await through({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1")]})
    await through({"type": "http.response.body", "body": b"x"})
    headers = dict(sent[0]["headers"])
    assert headers[b"x-a"] == b"1"
    assert (headers.get(b"access-control-allow-origin") == value) is (added or value is None)
    assert (b"access-control-expose-headers" in headers) is added
    assert sent[1] == {"type": "http.response.body", "body": b"x"}
    assert guard().for_pages(scope, classify(scope["method"], scope["raw_path"]), send) is send


# -- connections that repeat themselves ---------------------------------------------------------


@pytest.mark.parametrize("auth", [None, KEYS])
def test_guard_remembers_an_admitted_head_of_the_connection(auth: AuthConfig | None):
    rules = guard(auth)
    first = scope_of(CHAT, bearer("sk-k"))
    assert not rules.remembers(first)
    found = admitted(rules, first)
    again = scope_of(CHAT, bearer("sk-k"), query=b"key=s&a=1", extensions=first["extensions"])
    assert rules.remembers(again)
    assert identity_of(again) == found
    assert (bearer("sk-k") in again["headers"]) is (auth is None)
    assert again["query_string"] == (b"key=s&a=1" if auth is None else b"a=1")
    other = guard(auth)
    assert not other.remembers(scope_of(CHAT, extensions=first["extensions"]))
    assert first["extensions"] == {HEAD_MEMO: {}}


def test_guard_remembers_neither_pages_nor_other_paths():
    for path, fields in ((CHAT, (origin(b"http://router.test"),)), ("/v1/models", ())):
        for rules in (guard(), guard(AuthConfig(admin_key=digest_of("sk-admin")))):
            scope = scope_of(path, *fields)
            admitted(rules, scope)
            assert not rules.remembers(scope_of(CHAT, extensions=scope["extensions"]))
    assert not guard().remembers(scope_of(CHAT, extensions=None))
    assert not guard().remembers(scope_of(CHAT, extensions={}))
