"""Messages between the processes of a router: whole, in order, with their descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import trio

from support.front_harness import PATIENCE
from vllm_router.runtime.workers.channel import LARGEST, Channel, pair


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = map(Channel, pair())
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("size", [1, LARGEST, LARGEST + 1, 3_000_000])
async def test_channel_message_of_any_size_arrives_whole(ends: tuple[Channel, Channel], size: int):
    one, other = ends
    before = _descriptors()
    message = b"\x01" * size
    with trio.fail_after(PATIENCE):
        await one.send(message)
        assert await other.receive() == (message, None)
    assert _descriptors() == before


@pytest.mark.parametrize("size", [10, LARGEST + 1])
async def test_channel_descriptor_comes_with_message_of_any_size(
    ends: tuple[Channel, Channel], size: int
):
    one, other = ends
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, trio.fail_after(PATIENCE):
            await one.send(b"x" * size, [theirs.fileno()])
            message, fileno = await other.receive()
        assert len(message) == size
        assert fileno is not None
        with socket.socket(fileno=fileno) as theirs:
            theirs.sendall(b"hello")
            assert ours.recv(10) == b"hello"
        assert ours.recv(10) == b""


async def test_channel_sender_waits_for_slow_reader_without_loss(
    ends: tuple[Channel, Channel],
):
    one, other = ends
    messages = [bytes([number]) * (LARGEST - 1 + number % 3) for number in range(30)]
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for message in messages:
                    await one.send(message)

            nursery.start_soon(send)
            assert [(await other.receive())[0] for _ in messages] == messages


async def test_channel_end_is_seen_on_both_sides(ends: tuple[Channel, Channel]):
    one, other = ends
    other.close()
    assert await one.receive() == (b"", None)
    with pytest.raises(trio.BrokenResourceError):
        await one.send(b"x")
    assert not one.send_now(b"x")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
