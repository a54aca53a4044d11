"""What the fields of a request head decide: persistence, framing, and what is refused."""

from __future__ import annotations

import re

import pytest

from vllm_router.http.chunked import MAX_PIECES, ChunkedBody
from vllm_router.http.http_error import HttpError
from vllm_router.http.request_head import Head, check_partial, read_head, without_empty_lines
from vllm_router.http.request_line import check_method, request_line, split_target


def head(*fields: bytes, line: bytes = b"POST /v1/x HTTP/1.1", host: bool = True) -> Head:
    lines = [line, *([b"Host: a"] if host else []), *fields]
    return read_head(b"\r\n".join(lines) + b"\r\n\r\n", request_line(line))


OLD = b"POST /v1/x HTTP/1.0"


# -- persistence --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "line", "kept"),
    [
        ((), b"GET / HTTP/1.1", True),
        ((b"Connection: close",), b"GET / HTTP/1.1", False),
        ((b"Connection: keep-alive, Close",), b"GET / HTTP/1.1", False),
        ((b"Connection: close", b"Connection: keep-alive"), b"GET / HTTP/1.1", False),
        ((b"Connection: keep-alive", b"Connection: close"), b"GET / HTTP/1.1", False),
        ((b"Connection: x-close",), b"GET / HTTP/1.1", True),
        ((), OLD, False),
        ((b"Connection: Keep-Alive",), OLD, True),
        ((b"Connection: x, keep-alive",), OLD, True),
        ((b"Connection: close",), OLD, False),
    ],
)
def test_request_head_connection_options_decide_keep_alive(fields, line, kept):
    assert head(*fields, line=line).keep_alive is kept


# -- framing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "length", "chunked"),
    [
        ((), 0, False),
        ((b"Content-Length: 0",), 0, False),
        ((b"Content-Length: 12",), 12, False),
        ((b"Transfer-Encoding: chunked",), 0, True),
        ((b"Transfer-Encoding: Chunked",), 0, True),
    ],
)
def test_request_head_headers_decide_framing(fields, length, chunked):
    found = head(*fields)
    assert (found.content_length, found.chunked) == (length, chunked)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((b"Host: b",), 400),
        ((b"Content-Length: 1", b"Content-Length: 1"), 400),
        ((b"Content-Length: 1", b"Transfer-Encoding: chunked"), 400),
        ((b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
        ((b"Transfer-Encoding: gzip, chunked",), 400),
        ((b"Transfer-Encoding: identity",), 400),
        ((b"Content-Length: -1",), 400),
        ((b"Content-Length: +1",), 400),
        ((b"Content-Length: 1e3",), 400),
        ((b"Content-Length: " + b"9" * 30,), 400),
        ((b"Expect: nothing",), 417),
    ],
)
def test_request_head_with_ambiguous_headers_is_refused(fields, status):
    with pytest.raises(HttpError) as caught:
        head(*fields)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([(b"Content-Length", b"1")] * 2, "more than one Content-Length field"),
        ([(b"Transfer-Encoding", b"chunked")] * 2, "more than one Transfer-Encoding field"),
        ([(b"Host", b"b")], "more than one Host field"),
        (
            [(b"Content-Length", b"1"), (b"Transfer-Encoding", b"chunked")],
            "both Content-Length and Transfer-Encoding",
        ),
        ([(b"Content-Length", b"+1")], "malformed Content-Length"),
        ([(b"Content-Length", b"9" * 19)], "malformed Content-Length"),
    ],
)
def test_request_head_framing_is_checked_whatever_the_parser_accepts(fields, said):
    """llhttp refuses most of these first; a new version of it must not let them through."""
    unparsed = Head("POST", b"/", b"", "1.1")
    for name, value in [(b"Host", b"a"), *fields]:
        unparsed.on_header(name, value)
    with pytest.raises(HttpError, match=re.escape(said)) as caught:
        unparsed.check()
    assert caught.value.status == 400


def test_request_head_transfer_encoding_of_http_1_0_is_refused():
    with pytest.raises(HttpError, match=r"HTTP/1\.0"):
        head(b"Transfer-Encoding: chunked", line=OLD)


def test_request_head_host_is_required_since_http_1_1():
    assert head(line=OLD, host=False).http_version == "1.0"
    with pytest.raises(HttpError, match="no Host"):
        head(host=False)


def test_request_head_continue_is_expected_by_http_1_1_only():
    assert head(b"Expect: 100-Continue").expects_continue
    assert not head(b"Expect: 100-continue", line=OLD).expects_continue


def test_request_head_has_the_parts_of_its_line():
    found = head(line=b"PUT /a%20b?c=d HTTP/1.0")
    assert (found.method, found.path, found.query) == ("PUT", b"/a%20b", b"c=d")
    assert (found.http_version, found.expects_continue, found.chunked) == ("1.0", False, False)


@pytest.mark.parametrize(
    ("fields", "line", "status", "said"),
    [
        ((), b"FOO / HTTP/1.1", 501, "unknown method"),
        ((b"X: a\nY: b",), b"GET / HTTP/1.1", 400, "bare CR, bare LF or NUL in the head"),
        ((b"X: a\0",), b"GET / HTTP/1.1", 400, "bare CR, bare LF or NUL in the head"),
        ((b"X y: 1",), b"GET / HTTP/1.1", 400, "malformed head: "),
    ],
)
def test_request_head_refused_by_the_parser_says_why(fields, line, status, said):
    with pytest.raises(HttpError, match=re.escape(said)) as caught:
        head(*fields, line=line)
    assert caught.value.status == status


def test_request_head_longest_length_has_18_digits():
    assert head(b"Content-Length: " + b"9" * 18).content_length == 10**18 - 1


@pytest.mark.parametrize("value", [b"a/b", b"a b", b"a:b", b"[::1"])
def test_request_head_malformed_host_is_refused(value):
    with pytest.raises(HttpError, match="malformed Host field"):
        head(b"Host: " + value, host=False)


def test_request_head_headers_are_lower_case_and_stripped():
    assert head(b"X-A: b \t").headers == [(b"host", b"a"), (b"x-a", b"b")]


def test_request_head_thousand_headers_pass_and_one_more_is_refused():
    fields = [b"X: 1"] * 999
    assert len(head(*fields).headers) == 1000
    with pytest.raises(HttpError) as caught:
        head(*fields, b"X: 1", b"X: 1")
    assert caught.value.status == 431


# -- the request line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"POST /v1/x", 400),
        (b"POST  /v1/x HTTP/1.1", 400),
        (b"POST /v1/x HTTP/1.1 ", 400),
        (b"PO(ST /v1/x HTTP/1.1", 400),
        (b"P\xc3\x96ST /v1/x HTTP/1.1", 400),
        (b"POST /v1/\x7f HTTP/1.1", 400),
        (b"POST /v1/x#a HTTP/1.1", 400),
        (b"POST /v1/x HTTP/3.0", 505),
        (b"POST /v1/x HTTP/1.10", 400),
        (b"POST /v1/x http/1.1", 400),
    ],
)
def test_request_line_malformed_is_refused(line, status):
    with pytest.raises(HttpError) as caught:
        request_line(line)
    assert caught.value.status == status


@pytest.mark.parametrize("method", ["CONNECT", "TRACE"])
def test_check_method_unsupported_method_is_refused(method):
    with pytest.raises(HttpError) as caught:
        check_method(method)
    assert caught.value.status == 501
    check_method("POST")


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a?b=c?d", b"/a", b"b=c?d"),
        (b"http://h:1/a?b", b"/a", b"b"),
        (b"HTTPS://h?b", b"/", b"b"),
        (b"http://h", b"/", b""),
    ],
)
def test_split_target_forms_give_path_and_query(target, path, query):
    assert split_target("GET", target) == (path, query)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("OPTIONS", b"*", 204),
        ("GET", b"*", 400),
        ("OPTIONS", b"*a", 400),
        ("OPTIONS", b"a:80", 400),
        ("GET", b"http:///a", 400),
        ("GET", b"ftp://h/a", 400),
    ],
)
def test_split_target_without_a_path_has_its_status(method, target, status):
    with pytest.raises(HttpError) as caught:
        split_target(method, target)
    assert caught.value.status == status


def test_refusal_of_options_for_server_lists_methods():
    with pytest.raises(HttpError) as caught:
        split_target("OPTIONS", b"*")
    assert caught.value.status == 204
    answer = caught.value.encode()
    assert b"\r\nallow: GET, HEAD, POST, OPTIONS\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


# -- the beginning of a head --------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P",
        b"\r",
        b"!a",
        b"~a",
        b"POST /v1/x HTTP/1.1",
        b"POST /v1/x HTTP/1.1\r\nHost",
        b"PRI * HTTP/2.0\r\n",
        b"OPTIONS * HTTP/1.1\r\nHo",
    ],
)
def test_check_partial_possible_beginning_is_waited_for(data):
    for length in range(1, len(data) + 1):
        check_partial(data[:length], 0)
        check_partial(data[:length], max(0, length - 4))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03",
        b" POST",
        b"GET /\n",
        b"GET / HTTP/1.1\r\nA: \0",
        b"nonsense\r\n",
        b"TRACE / HTTP/1.1\r\n",
        b"GET nowhere HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nA: b\rc",
    ],
)
def test_check_partial_impossible_beginning_is_refused(data):
    with pytest.raises(HttpError):
        check_partial(data, 0)
    with pytest.raises(HttpError):
        check_partial(data, max(0, len(data) - 4))  # callers keep three bytes of what they checked


def test_check_partial_reads_the_line_once_it_is_complete():
    data = b"nonsense\r\nA"
    end = data.index(b"\r\n")
    with pytest.raises(HttpError):
        check_partial(data, end + 1)  # the line feed is new
    check_partial(data, end + 2)


def test_request_head_empty_lines_before_it_are_dropped():
    assert without_empty_lines(b"\r\n\r\nGET") == b"GET"
    assert without_empty_lines(b"GET\r\n") == b"GET\r\n"


# -- chunks -------------------------------------------------------------------------------------


def test_chunked_body_returns_at_most_the_piece_limit():
    coding = ChunkedBody()
    data = b"1\r\nx\r\n" * (MAX_PIECES + 1) + b"0\r\n\r\nGET"
    pieces, used = coding.feed(data)
    assert len(pieces) == MAX_PIECES == 1000
    assert not coding.complete
    rest, more = coding.feed(data[used:])
    assert (rest, data[used + more :]) == ([b"x"], b"GET")
    assert coding.complete


def test_chunked_body_tiny_chunks_with_extensions_are_refused():
    ChunkedBody().feed(b"1\r\nx\r\n" * 100_000)
    coding = ChunkedBody()
    with pytest.raises(HttpError, match="too much framing"):
        for _ in range(1000):
            coding.feed(b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n")


def test_chunked_body_data_bytes_allow_for_extensions():
    coding = ChunkedBody()
    for _ in range(1000):
        coding.feed(b"64;" + b"a" * 100 + b"\r\n" + b"x" * 100 + b"\r\n")
    coding.feed(b"0\r\nX: y\r\n\r\n")
    assert coding.complete


@pytest.mark.parametrize(("size", "good"), [(16384, True), (16385, False)])
def test_chunked_body_trailers_have_a_total_limit(size, good):
    coding = ChunkedBody()
    half = b"X: " + b"a" * (8192 - 5) + b"\r\n"
    trailers = half + b"Y: " + b"a" * (size - len(half) - 5) + b"\r\n"
    assert len(trailers) == size
    if good:
        coding.feed(b"0\r\n" + trailers + b"\r\n")
        assert coding.complete
    else:
        with pytest.raises(HttpError, match="trailer"):
            coding.feed(b"0\r\n" + trailers + b"\r\n")


@pytest.mark.parametrize(("last", "good"), [(90, True), (91, False)])
def test_chunked_body_framing_beyond_the_data_has_a_limit(last, good):
    """16 KiB, of which each chunk makes up for 16 bytes and twice its data."""
    coding = ChunkedBody()

    def feed(length: int) -> None:
        coding.feed(b"1;" + b"a" * (length - 4) + b"\r\nx\r\n")

    for _ in range(4):
        feed(4096)
    if good:
        feed(last)
    else:
        with pytest.raises(HttpError, match="too much framing"):
            feed(last)
