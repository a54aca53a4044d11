"""The event loop hub: what its sockets do beyond the `AsyncSocket` interface."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.lowlevel import Abort, RaiseCancelT

from support.socket_pairs import pair, received
from vllm_router.http.io import trio_internals
from vllm_router.http.io.hub import EventLoopHub


async def test_socket_writes_of_one_turn_are_sent_together():
    with pair() as (wire, peer):
        wire.write(b"one ")
        wire.write(b"two")
        assert received(peer) == b""
        await trio.testing.wait_all_tasks_blocked()
        assert received(peer) == b"one two"


async def test_socket_request_is_not_sent_after_unsolicited_input():
    with pair() as (wire, peer):
        wire.write_request(b"request")
        peer.send(b"unasked")  # after the check, before the request is sent
        with pytest.raises(ConnectionAbortedError):
            await wire.read()
        assert received(peer) == b""
        assert wire.broken


async def test_socket_request_is_not_sent_to_closed_peer():
    with pair() as (wire, peer):
        wire.write_request(b"request")
        peer.close()
        with pytest.raises(ConnectionAbortedError):
            await wire.read()


async def test_hub_defect_in_one_socket_is_logged_and_costs_no_other(
    caplog: pytest.LogCaptureFixture,
):
    with pair(lambda: print(1 / 0)) as (_, theirs), pair() as (wire, peer):
        theirs.close()
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"x")
        with trio.fail_after(60):
            assert await wire.read() == b"x"
    assert "ZeroDivisionError" in caplog.text


async def test_hub_finds_epoll_of_trio():
    """Trio's I/O manager is private; without it, each pass costs one more task switch."""
    with pair():
        assert EventLoopHub.of_this_run().in_trio_epoll


async def test_hub_without_trios_epoll_wakes_for_its_own(monkeypatch: pytest.MonkeyPatch):
    """The fallback for a Trio whose I/O manager has changed."""
    monkeypatch.setattr(trio_internals, "register_in_trio_epoll", lambda fileno: False)
    with pair() as (wire, peer):
        assert not EventLoopHub.of_this_run().in_trio_epoll
        for number in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_when_blocked, peer, b"%d" % number)
                with trio.fail_after(30):
                    assert await wire.read() == b"%d" % number


def test_trap_is_made_as_trio_makes_it():
    def abort(_: RaiseCancelT) -> Abort:
        return Abort.SUCCEEDED

    trap = trio_internals.make_trap(abort)
    assert trap == trio_internals.ask_for_trap(abort)
    # No coroutine is made for it.
    assert trio_internals.make_trap is type(trap)


def test_hub_register_in_trio_epoll_without_the_private_name_reports_it():
    """Outside of a run there is no I/O manager, as in a Trio that has moved it."""
    assert trio_internals.register_in_trio_epoll(0) is False


async def _send_when_blocked(peer, data: bytes) -> None:
    await trio.testing.wait_all_tasks_blocked()
    peer.send(data)
