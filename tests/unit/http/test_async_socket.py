"""`AsyncSocket`: reads, buffered writes, hang-ups and timeouts, on both implementations."""

from __future__ import annotations

import gc
import socket
import weakref

import pytest
import trio
import trio.testing

from support.socket_pairs import pair, received
from vllm_router.http.io.async_socket import (
    BUFFERED_WRITE_SIZE,
    READ_SIZE,
    AsyncSocket,
    Interrupted,
)
from vllm_router.http.io.closing import reset_on_close
from vllm_router.http.io.sockets import async_socket

pytestmark = pytest.mark.usefixtures("socket_kind")


async def read_all(wire: AsyncSocket) -> bytes:
    got = b""
    while data := await wire.read():
        got += data
    return got


# -- reading ------------------------------------------------------------------------------------


async def test_socket_read_returns_data_then_end():
    with pair() as (wire, peer):
        async with trio.open_nursery() as nursery:
            got = []

            async def read() -> None:
                got.append(await wire.read())
                got.append(await wire.read())
                got.append(await wire.read())

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            peer.send(b"one")
            await trio.testing.wait_all_tasks_blocked()
            peer.send(b"two")
            peer.close()
        assert got == [b"one", b"two", b""]
        assert wire.ended


@pytest.mark.parametrize("size", [READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 3 * READ_SIZE])
async def test_socket_read_beyond_one_buffer_needs_no_new_event(size: int):
    ours, theirs = await _tcp()
    wire = async_socket(ours)
    try:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
                await stream.send_all(b"x" * size)
                await stream.send_eof()

            nursery.start_soon(send)
            with trio.fail_after(60):
                assert len(await read_all(wire)) == size
    finally:
        wire.detach()
        ours.close()
        theirs.close()


async def test_socket_cancelled_read_loses_nothing():
    with pair() as (wire, peer):
        with trio.move_on_after(0.01):
            await wire.read()
        assert wire.is_silent()
        peer.send(b"late")
        await trio.testing.wait_all_tasks_blocked()
        assert not wire.is_silent()
        assert await wire.read() == b"late"
        assert wire.is_silent()


async def test_socket_unread_data_before_end_is_read_first():
    with pair() as (wire, peer):
        peer.send(b"goodbye")
        peer.close()
        await trio.testing.wait_all_tasks_blocked()
        assert wire.ended
        assert await read_all(wire) == b"goodbye"


# -- writing ------------------------------------------------------------------------------------


async def test_socket_end_is_input_without_unread_bytes():
    with pair() as (wire, peer):
        assert (wire.has_input(), wire.has_unread()) == (False, False)
        peer.send(b"rest")
        assert wire.has_input()
        assert wire.has_unread()
        assert await wire.read() == b"rest"
        assert (wire.has_input(), wire.has_unread()) == (False, False)
        peer.close()
        assert wire.has_input()
        assert not wire.has_unread()


async def test_socket_reset_is_input_without_unread_bytes():
    ours, theirs = await _tcp()
    wire = async_socket(ours)
    try:
        reset_on_close(theirs)
        theirs.close()
        assert wire.has_input()
        assert not wire.has_unread()
    finally:
        wire.detach()
        ours.close()


async def test_socket_request_is_sent_to_silent_peer():
    with pair() as (wire, peer):
        wire.write_request(b"request")
        await trio.testing.wait_all_tasks_blocked()
        assert received(peer) == b"request"
        peer.send(b"answer")
        assert await wire.read() == b"answer"


async def test_socket_large_write_is_sent_at_once():
    with pair() as (wire, peer):
        wire.write(b"small")
        wire.write(b"x" * (BUFFERED_WRITE_SIZE + 1))
        assert len(received(peer)) == 5 + BUFFERED_WRITE_SIZE + 1


async def test_socket_write_waits_for_peer_that_does_not_read():
    with pair() as (wire, peer):
        whole = b"x" * 4_000_000
        wire.write(whole)
        assert wire.unsent
        wire.write(b"end")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.drain)
            await trio.testing.wait_all_tasks_blocked()
            got = bytearray()
            with trio.fail_after(60):
                while not got.endswith(b"end"):
                    await trio.lowlevel.wait_readable(peer)
                    got += received(peer)
        assert got == whole + b"end"
        assert not wire.unsent


async def test_socket_rest_is_sent_without_a_waiting_task():
    with pair() as (wire, peer):
        wire.write(b"x" * 1_000_000)
        got = 0
        with trio.fail_after(60):
            while got < 1_000_000:
                await trio.lowlevel.wait_readable(peer)
                got += len(received(peer))
        await trio.testing.wait_all_tasks_blocked()
        assert not wire.unsent


async def test_socket_failed_write_is_reported_and_wakes_waiter():
    calls = []
    with pair(lambda: calls.append(wire.broken)) as (wire, peer):
        wire.write(b"x" * 10_000_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.drain)
            await trio.testing.wait_all_tasks_blocked()
            peer.close()
            with trio.fail_after(60):
                while not wire.broken:
                    await trio.testing.wait_all_tasks_blocked()
        assert calls[-1] is True


async def test_socket_write_failing_before_loop_waits_is_reported_at_once():
    called = trio.Event()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    wire = async_socket(ours, called.set)
    await trio.testing.wait_all_tasks_blocked()
    wire.ended = True  # as if its end event had been read already
    theirs.close()
    wire.write(b"x")
    with trio.fail_after(60):
        await called.wait()
    assert wire.broken
    wire.detach()
    ours.close()


# -- stream_into --------------------------------------------------------------------------------


async def test_stream_into_runs_between_tasks_until_enough():
    with pair() as (wire, peer):
        got = []
        woken = False

        def take(data: bytes) -> bool:
            got.append(data)
            return data != b"stop"

        async def pour() -> None:
            nonlocal woken
            await wire.stream_into(take)
            woken = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            for piece in (b"one", b"two", b"stop"):
                await trio.testing.wait_all_tasks_blocked()
                assert not woken
                peer.send(piece)
        assert got == [b"one", b"two", b"stop"]
        peer.send(b"more")
        assert await wire.read() == b"more"


async def test_stream_into_delivers_end():
    with pair() as (wire, peer):
        got = []

        def take(data: bytes) -> bool:
            got.append(data)
            return bool(data)

        peer.send(b"all")
        peer.close()
        with trio.fail_after(60):
            await wire.stream_into(take)
        assert got == [b"all", b""]


async def test_stream_into_delivers_large_input_to_its_end():
    ours, theirs = await _tcp()
    wire = async_socket(ours)
    try:
        theirs.setblocking(True)
        size = 0

        def take(data: bytes) -> bool:
            nonlocal size
            size += len(data)
            return size < 5 * READ_SIZE

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, theirs.sendall, b"x" * (5 * READ_SIZE))
            with trio.fail_after(60):
                await wire.stream_into(take)
        assert size == 5 * READ_SIZE
    finally:
        wire.detach()
        ours.close()
        theirs.close()


async def test_stream_into_error_of_sink_reaches_task():
    with pair() as (wire, peer):
        peer.send(b"x")
        with pytest.raises(ZeroDivisionError):
            await wire.stream_into(lambda data: bool(1 / 0))
        peer.send(b"y")
        assert await wire.read() == b"y"


async def test_stream_into_cancelled_loses_nothing():
    with pair() as (wire, peer):
        got = []

        def take(data: bytes) -> bool:
            got.append(data)
            return True

        with trio.move_on_after(0.01):
            await wire.stream_into(take)
        peer.send(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        assert await wire.read() == b"x"


# -- the hub ------------------------------------------------------------------------------------


async def test_socket_end_is_reported_once():
    calls = []
    with pair(lambda: calls.append(1)) as (wire, peer):
        peer.send(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert calls == []
        peer.close()
        await trio.testing.wait_all_tasks_blocked()
        assert calls == [1]
        assert await wire.read() == b"x"


async def test_socket_detached_is_not_touched_again():
    with pair() as (wire, peer):
        wire.write(b"last words")
        wire.detach()
        wire.detach()
        assert received(peer) == b"last words"
        peer.send(b"x")
        await trio.lowlevel.wait_readable(wire.sock)
        assert wire.sock.recv(10) == b"x"
        assert wire.is_silent()


async def test_socket_detached_is_freed_without_garbage_collection():
    class Owner:
        def __init__(self, sock: socket.socket) -> None:
            self.wire = async_socket(sock, self.hung_up)

        def hung_up(self) -> None:
            raise AssertionError

    ours, theirs = socket.socketpair()
    with ours, theirs:
        gc.disable()
        try:
            owner = Owner(ours)
            seen = weakref.ref(owner)
            owner.wire.write(b"x")
            owner.wire.detach()
            await trio.testing.wait_all_tasks_blocked()
            del owner
            assert seen() is None
        finally:
            gc.enable()


async def _tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    return ours, theirs


# -- waits with an end --------------------------------------------------------------------------


async def test_wait_ends_at_its_time(autojump_clock):
    with pair() as (wire, peer):
        for seconds in (600.0, 2.0, 5.0):
            began = trio.current_time()
            with pytest.raises(Interrupted):
                await wire.read(until=began + seconds)
            assert trio.current_time() - began == pytest.approx(seconds)
        peer.send(b"x")
        assert await wire.read(until=trio.current_time() + 1) == b"x"


async def test_wait_has_its_own_end_each_time(autojump_clock):
    took = {}

    async def wait(wire: AsyncSocket, seconds: float) -> None:
        began = trio.current_time()
        with pytest.raises(Interrupted):
            await wire.read(until=began + seconds)
        took[seconds] = trio.current_time() - began

    with pair() as (one, _), pair() as (two, _), pair() as (three, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, one, 30.0)
            nursery.start_soon(wait, two, 10.0)
            await trio.sleep(1)
            nursery.start_soon(wait, three, 5.0)
    assert took == {seconds: pytest.approx(seconds) for seconds in (30.0, 10.0, 5.0)}


async def test_wait_that_ended_ends_no_later_one(autojump_clock):
    with pair() as (wire, peer):
        peer.send(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert await wire.read(until=trio.current_time() + 3) == b"x"
        with trio.move_on_after(10) as scope:
            await wire.read()
        assert scope.cancelled_caught


async def test_wait_can_be_ended_from_outside():
    with pair() as (wire, peer):
        assert not wire.interrupt()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(Interrupted):
                    await wire.read()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert wire.interrupt()
            assert not wire.interrupt()
        peer.send(b"x")
        assert await wire.read() == b"x"
