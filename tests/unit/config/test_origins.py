"""Origins of pages: valid entries, matching, and the error for a refused page."""

from __future__ import annotations

from typing import Any

import pytest

from support.fleet_makers import make_config
from vllm_router.config.origins import Origins, forwarded_hosts, is_own, read_origin, refusal_text
from vllm_router.config.parser import parse
from vllm_router.errors import ConfigError, Refused
from vllm_router.routing.paths import classify
from vllm_router.web.guard import Guard


def origins(*listed: str) -> Origins:
    return Origins(map(read_origin, listed))


# -- valid entries ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://App.Example:443", "https://app.example"),
        ("https://app.example/", "https://app.example"),
        ("http://app.example:80/", "http://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("app://-", "app://-"),
        ("chrome-extension://ABCDEFghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ("moz-extension://0f0c-1", "moz-extension://0f0c-1"),
        ("vscode-webview://*", "vscode-webview://*"),
        ("vscode-file://vscode-app", "vscode-file://vscode-app"),
        ("tauri://localhost", "tauri://localhost"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("ionic://localhost/", "ionic://localhost"),
        ("file://", "file://"),
        ("file:///", "file://"),
        ("null", "null"),
        ("*", "*"),
        ("http://localhost:*", "http://localhost:*"),
        ("https://*.example.com", "https://*.example.com"),
        ("https://*.example.com:*/", "https://*.example.com:*"),
        ("http://[::1]:*", "http://[::1]:*"),
    ],
)
def test_origin_listed_is_normalised_like_browsers_do(text, kept):
    assert read_origin(text) == kept


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("app.example", "the scheme is missing"),
        ("localhost:3000", "the scheme is missing"),
        ("", "the scheme is missing"),
        ("https://app.example/path", "an origin has no path"),
        ("https://app.example/?q", "an origin has no path"),
        ("https://", "the host is missing"),
        ("https://*", 'for every https origin write "*"'),
        ("http://*:3000", 'for every http origin write "*"'),
        ("https://a:70000", "a port is at most 65535"),
        ("https://bücher.example", "xn--"),
        ("https://user@app.example", ""),
        ("https://app.*.example", ""),
        ("https://a*.example", ""),
        ("https://*", ""),
        ("*://app.example", ""),
        ("https://a\r\nx", ""),
        ("https://a b", ""),
        ("https://a.example, https://b.example", ""),
        (" https://a.example", ""),
        ("https:app.example", "the scheme is missing"),
    ],
)
def test_origin_invalid_error_names_key_and_expectation(text, hint):
    toml = b'[servers]\nservers = [{ url = "http://h:1" }]\n[config]\ncors_origins = [%b]\n'
    quoted = '"' + text.replace("\r", "\\r").replace("\n", "\\n") + '"'
    with pytest.raises(ConfigError) as caught:
        parse(toml % quoted.encode(), "servers.toml", {})
    (problem,) = caught.value.problems
    assert problem.startswith("servers.toml:4:17: config.cors_origins[0]: expected an origin like")
    assert hint in problem
    hidden = "@" in text or "?" in text  # possible secrets are not shown
    assert hidden or problem.endswith(f"got {quoted}")


# -- matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("https://app.example", "HTTPS://App.Example"),
        ("http://localhost:*", "http://localhost"),
        ("http://localhost:*", "http://localhost:5173"),
        ("https://*.example.com", "https://a.example.com"),
        ("https://*.example.com", "https://a.b-c.example.com"),
        ("https://*.example.com:*", "https://a.example.com:8443"),
        ("vscode-webview://*", "vscode-webview://1a2b3c"),
        ("chrome-extension://*", "chrome-extension://abc"),
        ("null", "null"),
        ("file://", "file://"),
        ("*", "https://anything"),
        ("*", "null"),
    ],
)
def test_origin_listed_is_allowed(listed, origin):
    assert origin in origins("https://other.example", listed)


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://app.example", "http://app.example"),
        ("https://app.example", "https://app.example:8443"),
        ("https://app.example", "https://app.example.evil"),
        ("http://localhost:*", "http://localhost.evil:80"),
        ("http://localhost:*", "http://localhost:80.evil"),
        ("http://localhost:*", "http://localhost:80@evil"),
        ("http://localhost:*", "http://localhost:"),
        ("http://localhost:*", "https://localhost:80"),
        ("https://*.example.com", "https://example.com"),
        ("https://*.example.com", "https://evilexample.com"),
        ("https://*.example.com", "https://a.example.com.evil"),
        ("https://*.example.com", "https://evil/a.example.com"),
        ("https://*.example.com", "https://evil#.example.com"),
        ("https://*.example.com", "https://.example.com"),
        ("https://*.example.com", "https://a.example.com:8443"),
        ("https://*.example.com", "https://aXexampleXcom"),
        ("vscode-webview://*", "https://vscode-webview"),
        ("vscode-webview://*", "vscode-webview://a/b"),
        ("https://app.example", "null"),
        ("file://", "null"),
    ],
)
def test_origin_unlisted_is_refused(listed, origin):
    assert origin not in origins("https://other.example", listed)


def test_origin_empty_list_allows_none():
    assert not origins()
    assert "null" not in origins()


# -- the router's own page ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://10.0.0.1:8888", "10.0.0.1:8888"),
        ("https://LLM.example", "llm.example"),
        ("https://llm.example", "llm.example:443"),
        ("http://llm.example", "llm.example:80"),
        ("http://[::1]:8888", "[::1]:8888"),
    ],
)
def test_origin_of_same_host_is_allowed(origin, host):
    assert is_own(origin, ["other", host])


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("null", ""),
        ("null", "null"),
        ("https://llm.example", "llm.example:80"),
        ("https://llm.example", ""),
        ("x", "x"),
        ("http://[", "["),
    ],
)
def test_origin_of_other_host_is_refused(origin, host):
    assert not is_own(origin, [host])


def test_origin_hosts_forwarded_by_proxies_are_read():
    assert forwarded_hosts("a.example, b:1", 'for=1;host="c:2";proto=https, Host=d') == [
        "a.example",
        "b:1",
        "c:2",
        "d",
    ]
    assert forwarded_hosts("", "") == []


def asked(path: str, headers: dict[str, str], peer: str = "192.0.2.9", **settings: Any) -> None:
    """Admit a request or a websocket by its head. Raises Refused."""
    method = "GET" if path == "/ws/load" else "POST"
    scope = {
        "type": "websocket" if path == "/ws/load" else "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": (peer, 5),
    }
    Guard(make_config(**settings)).admit(scope, classify(method, path.encode()))


OURS = {"origin": "https://llm.example", "host": "127.0.0.1:8888"}


@pytest.mark.parametrize("path", ["/ws/load", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "forwarded",
    [
        {"x-forwarded-host": "llm.example"},
        {"x-forwarded-host": "llm.example:443"},
        {"x-forwarded-host": "outer.example, llm.example"},
        {"forwarded": "for=192.0.2.1;host=llm.example;proto=https"},
    ],
)
@pytest.mark.parametrize("peer", ["192.0.2.9", "::ffff:192.0.2.9"])
def test_origin_host_from_trusted_proxy_is_allowed(path, forwarded, peer):
    asked(path, OURS | forwarded, peer, trusted_proxies=["192.0.2.0/24"])


@pytest.mark.parametrize("path", ["/ws/load", "/v1/chat/completions"])
def test_origin_host_from_stranger_is_ignored(path):
    for trusted in ([], ["10.0.0.0/8"]):
        with pytest.raises(Refused):
            asked(path, OURS | {"x-forwarded-host": "llm.example"}, trusted_proxies=trusted)


@pytest.mark.parametrize("path", ["/ws/load", "/v1/chat/completions"])
def test_origin_refusal_says_what_to_configure(path):
    with pytest.raises(Refused) as caught:
        asked(path, OURS)
    assert (caught.value.status, caught.value.code) == (403, "cross_origin")
    assert caught.value.message == (
        "Pages of https://llm.example may not use this router; to allow them, set "
        'cors_origins = ["https://llm.example"] in [config]. '
        "If this is the router's own page behind a proxy that changes the Host header "
        "(here 127.0.0.1:8888), let the proxy forward Host unchanged, or set "
        'trusted_proxies = ["192.0.2.9"] and let the proxy send X-Forwarded-Host.'
    )
    asked(path, OURS, cors_origins=["https://llm.example"])
    headers = OURS | {"x-forwarded-host": "llm.example"}
    asked(path, headers, trusted_proxies=["192.0.2.9"])


@pytest.mark.parametrize("origin", ["null", "app://x", "chrome-extension://ab", "file://"])
def test_origin_refusal_names_an_entry_that_works(origin):
    text = refusal_text(origin, "h", None)
    assert f'cors_origins = ["{origin}"]' in text
    assert origin in origins(origin)


@pytest.mark.parametrize("origin", ["", "x" * 5000, "a b", "*://x"])
def test_origin_refusal_of_invalid_origin_suggests_no_entry(origin):
    text = refusal_text(origin, "h", "192.0.2.1")
    assert text == f'The Origin header "{origin[:200]}" is not a valid origin.'
