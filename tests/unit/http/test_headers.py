"""Headers that pass the router in either direction, and headers that it writes itself."""

from __future__ import annotations

import pytest

from vllm_router.http.addresses import is_in, parse_networks, plain_host, plain_peer
from vllm_router.http.request_ids import request_id
from vllm_router.proxy.headers import (
    MAX_VIA,
    VIA,
    ForwardedFields,
    RequestHeads,
    connection_field,
    forwarding_fields,
    loops,
    parse_retry_after,
    sooner,
)
from vllm_router.proxy.identity import is_credential, without_credentials
from vllm_router.proxy.server_response import ServerHead

Fields = list[tuple[bytes, bytes]]


def sent(headers: Fields, *, api_key: str | None = None, prefix: str = "", **options) -> Fields:
    """The headers that a server gets, as `(name, value)`."""
    head = written(headers, api_key=api_key, prefix=prefix, **options)
    return [tuple(line.split(b": ", 1)) for line in head.split(b"\r\n")[1:-2]]


def written(
    headers: Fields,
    *,
    api_key: str | None = None,
    prefix: str = "",
    client: str = "192.0.2.7",
    trusted: tuple[str, ...] = (),
    target: bytes = b"/v1/completions",
) -> bytes:
    heads = RequestHeads("server:8000", prefix, api_key)
    added = forwarding_fields(headers, dict(headers), client, "http", parse_networks(trusted))
    forwarded = ForwardedFields(headers, connection_field(headers, dict(headers)))
    return heads.write("POST", target, forwarded, added + b"\r\nx-request-id: rid", 5)


def test_request_headers_have_whole_head():
    assert written([(b"host", b"router"), (b"accept", b"*/*")]) == (
        b"POST /v1/completions HTTP/1.1\r\n"
        b"host: server:8000\r\n"
        b"accept: */*\r\n"
        b"via: 1.1 vllm-router\r\n"
        b"x-forwarded-for: 192.0.2.7\r\n"
        b"x-forwarded-proto: http\r\n"
        b"x-forwarded-host: router\r\n"
        b"x-request-id: rid\r\n"
        b"content-length: 5\r\n\r\n"
    )


def test_request_headers_server_path_precedes_request_path():
    head = written([], prefix="/vllm", target=b"/v1/completions?a=b")
    assert head.startswith(b"POST /vllm/v1/completions?a=b HTTP/1.1\r\n")


def test_request_headers_end_to_end_keep_order_and_repetitions():
    headers = [
        (b"authorization", b"Bearer client"),
        (b"content-type", b"application/json"),
        (b"x-a", b"1"),
        (b"cookie", b"c=1"),
        (b"x-a", b"2"),
        (b"accept-encoding", b"gzip"),
    ]
    assert sent(headers)[1:7] == headers


@pytest.mark.parametrize(
    "name",
    [
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authorization",
        b"proxy-authenticate",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"expect",
        b"forwarded",
        b"x-real-ip",
        b"x-forwarded-port",
        b"x-router-policy",
    ],
)
def test_request_headers_hop_by_hop_and_forwarding_are_dropped(name):
    assert name not in dict(sent([(name, b"x")]))


@pytest.mark.parametrize(
    "connection",
    [
        [(b"connection", b"close, X-Secret")],
        [(b"connection", b"x-secret,keep-alive")],
        [(b"connection", b"close"), (b"connection", b"X-SECRET")],
        [(b"connection", b"X-Secret"), (b"connection", b"close")],
    ],
)
def test_request_headers_named_by_connection_are_dropped(connection):
    fields = dict(sent([*connection, (b"x-secret", b"1"), (b"x-other", b"2")]))
    assert b"x-secret" not in fields
    assert fields[b"x-other"] == b"2"


def test_request_headers_connection_cannot_remove_needed_ones():
    headers = [
        (b"connection", b"authorization, content-type, content-encoding, content-length, host"),
        (b"authorization", b"Bearer k"),
        (b"content-type", b"application/json"),
        (b"content-encoding", b"gzip"),
    ]
    fields = dict(sent(headers))
    assert fields[b"authorization"] == b"Bearer k"
    assert fields[b"content-type"] == b"application/json"
    assert fields[b"content-encoding"] == b"gzip"
    assert fields[b"content-length"] == b"5"
    assert fields[b"host"] == b"server:8000"


def test_request_headers_server_key_replaces_client_key():
    headers = [(b"authorization", b"Bearer client")]
    keys = [value for name, value in sent(headers, api_key="own") if name == b"authorization"]
    assert keys == [b"Bearer own"]


CREDENTIALS = (
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"apikey",
    b"api_key",
    b"x-apikey",
    b"x-goog-api-key",
    b"ocp-apim-subscription-key",
    b"openai-api-key",
    b"x-litellm-api-key",
    b"x-functions-key",
    b"x-access-key",
    b"x-key",
    b"cookie",
    b"cookie2",
    b"x-auth-token",
    b"x-access-token",
    b"x-api-token",
    b"token",
    b"private-token",
    b"x-amz-security-token",
    b"x-ms-token-aad-access-token",
    b"x-forwarded-access-token",
    b"x-auth-request-access-token",
    b"x-amzn-oidc-accesstoken",
    b"x-amzn-oidc-data",
    b"cf-access-jwt-assertion",
    b"cf-access-client-secret",
    b"x-goog-iap-jwt-assertion",
    b"x-original-authorization",
    b"x-authorization",
    b"x-ms-authorization-auxiliary",
    b"helicone-auth",
    b"dpop",
    b"x-password",
    b"x-forwarded-client-cert",
    b"client-cert-chain",
)
NO_CREDENTIALS = (
    b"accept",
    b"anthropic-beta",
    b"anthropic-version",
    b"cache-control",
    b"content-type",
    b"idempotency-key",
    b"openai-organization",
    b"sec-websocket-key",
    b"traceparent",
    b"user-agent",
    b"x-idempotency-key",
    b"x-max-tokens",
    b"x-request-timeout",
    b"x-session-id",
    b"x-stainless-retry-count",
    b"x-vllm-priority",
)


@pytest.mark.parametrize("name", CREDENTIALS)
def test_request_headers_server_key_removes_client_credentials(name):
    assert is_credential(name)
    fields = sent([(name, b"client-secret"), (b"x-other", b"1")], api_key="own")
    assert b"client-secret" not in [value for _, value in fields]
    assert (b"x-other", b"1") in fields
    assert (b"authorization", b"Bearer own") in fields


@pytest.mark.parametrize("name", NO_CREDENTIALS)
def test_request_headers_server_key_keeps_other_headers(name):
    assert not is_credential(name)
    assert (name, b"1") in sent([(name, b"1")], api_key="own")


@pytest.mark.parametrize("name", sorted(set(CREDENTIALS) - {b"client-cert-chain"}))
def test_request_headers_without_server_key_keep_client_key(name):
    assert (name, b"client-secret") in sent([(name, b"client-secret")])


@pytest.mark.parametrize(
    ("query", "left"),
    [
        (b"api-key=s", b""),
        (b"a=1&key=s&b=2", b"a=1&b=2"),
        (b"KEY=s&api%2Dkey=s&api_key=s&access_token=s&%6bey=s", b""),
        (b"api-version=2024-10-21&code=s&sig=s", b"api-version=2024-10-21"),
        (b"beta=true", b"beta=true"),
        (b"max_tokens=1&model=key", b"max_tokens=1&model=key"),
        (b"a=1&&b", b"a=1&&b"),
    ],
)
def test_request_query_loses_credentials_for_server_with_key(query, left):
    assert without_credentials(query) == left
    head = written([], api_key="own", target=b"/v1/completions?" + query)
    mark = b"?" if left else b""
    assert head.startswith(b"POST /v1/completions%b%b HTTP/1.1\r\n" % (mark, left))
    kept = written([], target=b"/v1/completions?" + query)
    assert kept.startswith(b"POST /v1/completions?%b HTTP/1.1\r\n" % query)


def test_request_headers_length_and_host_are_set_by_router():
    fields = sent([(b"content-length", b"99"), (b"host", b"evil")])
    assert [v for n, v in fields if n == b"content-length"] == [b"5"]
    assert [v for n, v in fields if n == b"host"] == [b"server:8000"]


# -- earlier hops ------------------------------------------------------------------------------

CLAIMS = [
    (b"host", b"router"),
    (b"x-forwarded-for", b"10.9.9.9"),
    (b"x-forwarded-for", b"10.8.8.8"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"api.example.com"),
]


def test_request_headers_forwarding_of_strangers_is_dropped():
    fields = dict(sent(CLAIMS, trusted=("10.0.0.0/8",)))
    assert fields[b"x-forwarded-for"] == b"192.0.2.7"
    assert fields[b"x-forwarded-proto"] == b"http"
    assert fields[b"x-forwarded-host"] == b"router"


@pytest.mark.parametrize(
    ("client", "network"), [("10.1.1.1", "10.0.0.0/8"), ("2001:db8::1", "2001:db8::/32")]
)
def test_request_headers_forwarding_of_trusted_proxies_is_extended(client, network):
    fields = sent(CLAIMS, client=client, trusted=(network,))
    (value,) = [value for name, value in fields if name == b"x-forwarded-for"]
    assert value == b"10.9.9.9, 10.8.8.8, " + client.encode()
    assert dict(fields)[b"x-forwarded-proto"] == b"https"
    assert dict(fields)[b"x-forwarded-host"] == b"api.example.com"


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("::ffff:10.1.1.1", "10.0.0.0/8"),
        ("::ffff:10.1.1.1", "10.1.1.1"),
        ("::ffff:a01:101", "10.0.0.0/8"),
        ("10.1.1.1", "::ffff:10.0.0.0/104"),
        ("::ffff:10.1.1.1", "::ffff:10.1.1.1"),
        ("::ffff:10.1.1.1", "0.0.0.0/0"),
    ],
)
def test_networks_ipv4_mapped_address_matches_ipv4(client, network):
    assert is_in(client, parse_networks((network,)))
    fields = dict(sent(CLAIMS, client=client, trusted=(network,)))
    assert fields[b"x-forwarded-proto"] == b"https"


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("::ffff:11.1.1.1", "10.0.0.0/8"),
        ("::a01:101", "10.0.0.0/8"),
        ("64:ff9b::a01:101", "10.0.0.0/8"),
        ("10.1.1.1", "2001:db8::/32"),
        ("unix", "0.0.0.0/0"),
        (None, "::/0"),
    ],
)
def test_networks_other_ipv6_address_matches_no_ipv4(client, network):
    assert not is_in(client, parse_networks((network,)))


def test_request_headers_trusted_proxy_without_claims_is_the_first_hop():
    fields = sent([(b"host", b"router")], client="10.1.1.1", trusted=("10.0.0.0/8",))
    assert fields[1:4] == [
        (b"via", VIA),
        (b"x-forwarded-for", b"10.1.1.1"),
        (b"x-forwarded-proto", b"http"),
    ]
    assert fields[4] == (b"x-forwarded-host", b"router")


def test_request_headers_set_by_router_appear_once():
    given = [b"via", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"]
    names = [name for name, _ in sent([(name, b"x") for name in [*given, b"x-request-id"]])]
    for name in [*given[:3], b"x-request-id", b"host", b"content-length"]:
        assert names.count(name) == 1
    assert b"x-forwarded-host" not in names, "the request has no Host"


def test_request_headers_ipv4_mapped_peer_is_named_by_ipv4():
    assert plain_peer(("::ffff:192.0.2.1", 5)) == ("192.0.2.1", 5)
    assert plain_peer(("::1", 5, 0, 0)) == ("::1", 5)
    assert plain_peer(("192.0.2.1", 5)) == ("192.0.2.1", 5)
    assert plain_host("router") == "router"


def test_networks_client_without_address_is_untrusted():
    fields = dict(sent(CLAIMS, client="unknown", trusted=("0.0.0.0/0",)))
    assert fields[b"x-forwarded-for"] == b"unknown"


def test_request_headers_via_is_appended_and_detects_loop():
    earlier = [(b"via", b"1.1 cdn")]
    assert dict(sent(earlier))[b"via"] == b"1.1 cdn, 1.1 vllm-router"
    assert not loops(earlier)
    assert not loops([(b"via", b", ".join([VIA] * (MAX_VIA - 1)))])
    assert loops([(b"via", b", ".join([VIA] * MAX_VIA))])
    assert loops([(b"via", VIA)] * MAX_VIA)


@pytest.mark.parametrize("given", [b"abc-1.2:3@x", b"a" * 128])
def test_request_id_valid_is_kept(given):
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, b"", b"a" * 129, b"a b", b"a\nb", b"caf\xc3\xa9", b"<x>"])
def test_request_id_invalid_is_replaced(given):
    made = request_id(given)
    assert len(made) == 32
    assert made != request_id(given)


# -- responses ---------------------------------------------------------------------------------


def length_in(headers: Fields) -> int | None:
    lengths = [int(value) for name, value in headers if name == b"content-length"]
    return lengths[0] if lengths else None


def answered(headers: Fields) -> Fields:
    return ServerHead(headers).for_client(length_in(headers), b"gpu-1", 2, b"rid", anthropic=False)


def test_response_headers_pass_and_router_headers_are_added():
    headers = [(b"content-type", b"text/plain"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    assert answered(headers) == [
        *headers,
        (b"x-request-id", b"rid"),
        (b"x-vllm-router-server", b"gpu-1"),
        (b"x-vllm-router-attempts", b"2"),
    ]


def test_response_headers_engine_request_id_is_kept():
    fields = answered([(b"x-request-id", b"theirs")])
    assert [value for name, value in fields if name == b"x-request-id"] == [b"theirs"]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"connection", b"close, x-secret"), (b"x-secret", b"1")],
        [(b"connection", b"close"), (b"connection", b"x-secret"), (b"x-secret", b"1")],
        [(b"connection", b"x-secret"), (b"connection", b"close"), (b"x-secret", b"1")],
        [(b"transfer-encoding", b"chunked"), (b"keep-alive", b"timeout=5"), (b"trailer", b"x")],
    ],
)
def test_response_headers_hop_by_hop_are_dropped(headers):
    assert len(answered(headers)) == 3


@pytest.mark.parametrize(
    "name",
    [
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate"),
        *(b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"http2-settings", b"alt-svc"),
        *(b"access-control-allow-credentials", b"access-control-allow-headers"),
        *(b"access-control-allow-methods", b"access-control-allow-origin"),
        *(b"access-control-allow-private-network", b"access-control-expose-headers"),
        b"access-control-max-age",
    ],
)
def test_response_headers_for_the_router_alone_are_dropped(name):
    fields = answered([(name, b"x"), (b"x-other", b"1")])
    assert [other for other, _ in fields if other == name] == []
    assert fields[0] == (b"x-other", b"1")


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (b"9", b"5"),
        (b"6", b"5"),
        (b"5.5", b"5"),
        (b"5", b"5"),
        (b"4.5", b"4.5"),
        (b"0", b"0"),
        (b"soon", b"soon"),
        (b"Wed, 21 Oct 2026 07:28:00 GMT", b"Wed, 21 Oct 2026 07:28:00 GMT"),
    ],
)
def test_sooner_shortens_a_retry_after_that_is_longer(given, left):
    headers = [(b"x-a", b"9"), (b"retry-after", given)]
    assert sooner(headers, 4.2) == [(b"x-a", b"9"), (b"retry-after", left)]
    assert headers[1] == (b"retry-after", given)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"5", 5.0),
        (b"0", 0.0),
        (b" 7 ", 7.0),
        (b"1.5", 1.5),
        (b"", None),
        (b"-1", None),
        (b"nan", None),
        (b"inf", None),
        (b"999999.5", 999999.5),
        (b"1000000", None),
        (b"1e9", None),
        (b"soon", None),
        (b"Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_seconds(value, seconds):
    assert parse_retry_after(value) == seconds


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(b"content-type", b"text/event-stream; charset=utf-8")], [b"no"]),
        ([(b"content-type", b"Text/Event-Stream")], [b"no"]),
        ([(b"content-type", b"application/x-ndjson")], [b"no"]),
        ([(b"content-type", b"audio/wav")], [b"no"]),
        ([(b"content-type", b"audio/wav"), (b"content-length", b"9")], []),
        ([(b"content-type", b"application/json")], []),
        ([], []),
        # A server that sets it otherwise has its reasons.
        ([(b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"yes")], [b"yes"]),
    ],
)
def test_response_headers_of_stream_disable_nginx_buffering(given, expected):
    headers = ServerHead(given).for_client(length_in(given), b"gpu-1", 1, b"rid", anthropic=True)
    assert [value for name, value in headers if name == b"x-accel-buffering"] == expected
