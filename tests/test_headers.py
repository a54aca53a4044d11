"""Which fields pass the router in either direction, and which it writes itself."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from vllm_router.proxy.headers import (
    MAX_VIA,
    VIA,
    ForwardedFields,
    RequestHeads,
    answer_headers,
    connection_field,
    forwarding_fields,
    loops,
    parse_retry_after,
    request_id,
)

Fields = list[tuple[bytes, bytes]]


def sent(headers: Fields, *, api_key: str | None = None, prefix: str = "", **options) -> Fields:
    """The fields a server gets, as `(name, value)`."""
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
    networks = tuple(ip_network(network) for network in trusted)
    added = forwarding_fields(headers, dict(headers), client, "http", networks)
    forwarded = ForwardedFields(headers, connection_field(headers, dict(headers)))
    return heads.write("POST", target, forwarded, added + b"\r\nx-request-id: rid", 5)


def test_a_whole_head():
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


def test_a_servers_path_goes_before_the_requests():
    head = written([], prefix="/vllm", target=b"/v1/completions?a=b")
    assert head.startswith(b"POST /vllm/v1/completions?a=b HTTP/1.1\r\n")


def test_end_to_end_fields_keep_their_order_values_and_repetitions():
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
    ],
)
def test_hop_by_hop_fields_and_claims_go_no_further(name):
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
def test_fields_that_connection_names_go_no_further(connection):
    fields = dict(sent([*connection, (b"x-secret", b"1"), (b"x-other", b"2")]))
    assert b"x-secret" not in fields
    assert fields[b"x-other"] == b"2"


def test_connection_cannot_strip_what_a_request_needs():
    headers = [
        (b"connection", b"authorization, content-type, content-length, host"),
        (b"authorization", b"Bearer k"),
        (b"content-type", b"application/json"),
    ]
    fields = dict(sent(headers))
    assert fields[b"authorization"] == b"Bearer k"
    assert fields[b"content-type"] == b"application/json"
    assert fields[b"content-length"] == b"5"
    assert fields[b"host"] == b"server:8000"


def test_a_servers_own_key_replaces_the_clients():
    headers = [(b"authorization", b"Bearer client")]
    keys = [value for name, value in sent(headers, api_key="own") if name == b"authorization"]
    assert keys == [b"Bearer own"]


def test_lengths_and_hosts_are_ours():
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


def test_claims_of_strangers_are_not_believed():
    fields = dict(sent(CLAIMS, trusted=("10.0.0.0/8",)))
    assert fields[b"x-forwarded-for"] == b"192.0.2.7"
    assert fields[b"x-forwarded-proto"] == b"http"
    assert fields[b"x-forwarded-host"] == b"router"


@pytest.mark.parametrize(
    ("client", "network"), [("10.1.1.1", "10.0.0.0/8"), ("2001:db8::1", "2001:db8::/32")]
)
def test_claims_of_trusted_proxies_are_carried_on(client, network):
    fields = sent(CLAIMS, client=client, trusted=(network,))
    (value,) = [value for name, value in fields if name == b"x-forwarded-for"]
    assert value == b"10.9.9.9, 10.8.8.8, " + client.encode()
    assert dict(fields)[b"x-forwarded-proto"] == b"https"
    assert dict(fields)[b"x-forwarded-host"] == b"api.example.com"


def test_a_client_without_an_address_is_nobody_to_trust():
    fields = dict(sent(CLAIMS, client="unknown", trusted=("0.0.0.0/0",)))
    assert fields[b"x-forwarded-for"] == b"unknown"


def test_via_is_appended_and_too_many_of_ours_are_a_loop():
    earlier = [(b"via", b"1.1 cdn")]
    assert dict(sent(earlier))[b"via"] == b"1.1 cdn, 1.1 vllm-router"
    assert not loops(earlier)
    assert not loops([(b"via", b", ".join([VIA] * (MAX_VIA - 1)))])
    assert loops([(b"via", b", ".join([VIA] * MAX_VIA))])
    assert loops([(b"via", VIA)] * MAX_VIA)


@pytest.mark.parametrize("given", [b"abc-1.2:3@x", b"a" * 128])
def test_a_fit_request_id_is_kept(given):
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, b"", b"a" * 129, b"a b", b"a\nb", b"caf\xc3\xa9", b"<x>"])
def test_any_other_request_id_is_replaced(given):
    made = request_id(given)
    assert len(made) == 32
    assert made != request_id(given)


# -- answers -----------------------------------------------------------------------------------


def answered(headers: Fields) -> Fields:
    return answer_headers(headers, dict(headers), b"gpu-1", 2, b"rid")


def test_an_answers_fields_pass_and_ours_are_added():
    headers = [(b"content-type", b"text/plain"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    assert answered(headers) == [
        *headers,
        (b"x-request-id", b"rid"),
        (b"x-vllm-router-server", b"gpu-1"),
        (b"x-vllm-router-attempts", b"2"),
    ]


def test_an_engines_request_id_is_kept():
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
def test_hop_by_hop_fields_of_an_answer_stay_with_us(headers):
    assert len(answered(headers)) == 3


def test_an_engine_cannot_say_that_it_is_another():
    fields = answered([(b"x-vllm-router-server", b"fake"), (b"x-vllm-router-attempts", b"9")])
    assert dict(fields)[b"x-vllm-router-server"] == b"gpu-1"
    assert len(fields) == 3


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
        (b"1e9", None),
        (b"soon", None),
        (b"Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_retry_after_in_seconds(value, seconds):
    assert parse_retry_after(value) == seconds
