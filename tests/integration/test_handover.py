"""Listening sockets that two processes share, tested within one process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from vllm_router.http.server.socket_handover import (
    notify,
    passed_sockets,
    redirect_handshakes,
    spread_handshakes,
)


@contextlib.contextmanager
def sharing(family: socket.AddressFamily, host: str, count: int) -> Iterator[list[socket.socket]]:
    """`count` sockets that listen at the same address, oldest first."""
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket(family))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, listeners[0].getsockname()[1] if listeners else 0))
            sock.listen(200)
            sock.setblocking(False)
            listeners.append(sock)
        yield listeners


def connections(listeners: list[socket.socket], count: int) -> list[int]:
    """How many of `count` connections each listener gets."""
    address = listeners[0].getsockname()
    for _ in range(count):
        socket.create_connection(address[:2]).close()
    got = []
    for listener in listeners:
        got.append(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                got[-1] += 1
    return got


FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


@pytest.mark.parametrize(("family", "host"), FAMILIES, ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("count", [2, 4])
def test_successor_gets_new_connections_once_old_socket_detaches(family, host, count):
    with sharing(family, host, count) as listeners:
        assert all(connections(listeners, 200))
        assert redirect_handshakes(listeners[0])
        assert connections(listeners, 50) == [0] * (count - 1) + [50]
        listeners[0].close()
        spread_handshakes(listeners[-1])
        assert all(connections(listeners[1:], 200))


def test_successor_missing_leaves_connections_in_place():
    with sharing(*FAMILIES[0], 1) as listeners:
        assert not redirect_handshakes(listeners[0])
        spread_handshakes(listeners[0])
        assert connections(listeners, 20) == [20]


def test_successor_on_other_port_is_ignored():
    with sharing(*FAMILIES[0], 1) as listeners, sharing(*FAMILIES[0], 3):
        assert not redirect_handshakes(listeners[0])


def test_passed_sockets_are_taken_only_by_addressed_process():
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "A": "b"}
    assert passed_sockets(environ) == [3, 4]
    assert environ == {"A": "b"}
    assert passed_sockets(environ) == []
    assert passed_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "2"}) == []


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
def test_passed_sockets_invalid_number_is_named(name):
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1"} | {name: "one"}
    with pytest.raises(ValueError, match=f"{name}: expected a number, got 'one'"):
        passed_sockets(environ)


@pytest.mark.parametrize("address", ["@vllm-router-test-{pid}", "{tmp}/notify"])
def test_notify_state_is_sent_to_requested_address(tmp_path, address):
    address = address.format(pid=os.getpid(), tmp=tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        notify("READY=1", {"NOTIFY_SOCKET": address})
        assert receiver.recv(100) == b"READY=1"


def test_notify_without_address_is_no_error(tmp_path):
    notify("READY=1", {})
    notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
