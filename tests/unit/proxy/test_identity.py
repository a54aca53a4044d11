"""Which key of a request counts, and what its holder may do."""

from __future__ import annotations

import base64

import pytest

from vllm_router.config.auth import AuthConfig, KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.proxy.identity import Identity, Keyring, keys_in, without_credentials

KEYS = (
    KeyConfig(name="a", digest=digest_of("sk-a")),
    KeyConfig(name="b", digest=digest_of("sk-b")),
)


@pytest.fixture
def ring() -> Keyring:
    config = AuthConfig(
        keys=KEYS, admin_key=digest_of("sk-admin"), status_key=digest_of("sk-status")
    )
    return Keyring(config)


def subprotocol(key: bytes) -> bytes:
    return b"vllm-router.key." + base64.urlsafe_b64encode(key).rstrip(b"=")


@pytest.mark.parametrize(
    ("identity", "known"),
    [
        (Identity(), False),
        (Identity(given=True), False),
        (Identity(KEYS[0], given=True), True),
        (Identity(status=True, given=True), True),
        (Identity(status=True, admin=True, given=True), True),
    ],
)
def test_identity_is_known_by_a_key_or_a_right(identity: Identity, known: bool):
    assert identity.known is known


def test_keyring_identifies_rights_of_each_key(ring: Keyring):
    found = {
        key: ring.identify({b"x-api-key": key}) for key in (b"sk-a", b"sk-admin", b"sk-status")
    }
    assert found[b"sk-a"] == Identity(KEYS[0], given=True)
    assert found[b"sk-admin"] == Identity(status=True, admin=True, given=True)
    assert found[b"sk-status"] == Identity(status=True, given=True)


def test_keys_in_looks_at_few_of_very_many_subprotocols():
    """Each costs a comparison with every known key, before the client has proved anything."""
    many = [subprotocol(b"%d" % number) for number in range(3000)]
    found = keys_in({b"sec-websocket-protocol": b",".join(many)})
    assert found == [b"%d" % number for number in range(16)]


def test_keyring_last_known_of_several_keys_counts(ring: Keyring):
    headers = {b"authorization": b"Bearer sk-a", b"x-api-key": b"sk-b"}
    assert ring.identify(headers).key is KEYS[1]
    assert ring.identify({**headers, b"x-api-key": b"sk-unknown"}).key is KEYS[0]


def test_keyring_without_a_known_key_is_unknown_or_anonymous(ring: Keyring):
    assert ring.identify({b"x-api-key": b"sk-unknown"}) == Identity(given=True)
    assert ring.identify({}) == Identity(given=False)


@pytest.mark.parametrize(
    ("headers", "keys"),
    [
        ({b"authorization": b"Bearer  sk-a "}, [b"sk-a"]),
        ({b"authorization": b"Bearer"}, []),
        ({b"authorization": b"Basic sk-a"}, []),
        ({b"x-api-key": b" sk-a\t"}, [b"sk-a"]),
        ({b"x-api-key": b"\xffsk"}, [b"\xffsk"]),
        ({b"sec-websocket-protocol": b"x , " + subprotocol(b"sk-\xe9") + b" ,y"}, [b"sk-\xe9"]),
        *(({b"sec-websocket-protocol": subprotocol(b"s" * n)}, [b"s" * n]) for n in range(1, 9)),
        ({b"sec-websocket-protocol": b"vllm-router.key.a"}, []),
        ({b"sec-websocket-protocol": b"vllm-router.key."}, []),
        (
            {
                b"authorization": b"Bearer 1",
                b"x-api-key": b"2",
                b"sec-websocket-protocol": subprotocol(b"3") + b"," + subprotocol(b"4"),
            },
            [b"1", b"2", b"3", b"4"],
        ),
    ],
)
def test_keys_in_headers_are_found_and_stripped(headers: dict[bytes, bytes], keys: list[bytes]):
    assert keys_in(headers) == keys


def test_keyring_key_beyond_ascii_is_compared_as_latin_1():
    ring = Keyring(AuthConfig(keys=(KeyConfig(name="e", digest=digest_of("sk-\xe9")),)))
    assert ring.identify({b"x-api-key": b"sk-\xe9"}).key is not None
    assert ring.identify({b"x-api-key": "sk-\xe9".encode()}).key is None


def test_keyring_reports_its_kinds_of_keys(ring: Keyring):
    assert (ring.has_clients, ring.has_admin, ring.protects_status) == (True, True, False)
    only_status = Keyring(AuthConfig(status_key=digest_of("x"), protect_status=True))
    assert (only_status.has_clients, only_status.has_admin) == (False, False)
    assert only_status.protects_status


@pytest.mark.parametrize(
    ("query", "left"),
    [
        (b"a=1&key=x&b=2", b"a=1&b=2"),
        (b"%6bey=x", b""),
        (b"api+key=x&Key=y", b"api+key=x"),
        (b"+key+=x", b""),
        (b"keys=1", b"keys=1"),
        (b"idempotency-key=1&access-key=2", b"idempotency-key=1"),
    ],
)
def test_without_credentials_drops_secret_parameters(query: bytes, left: bytes):
    assert without_credentials(query) == left
