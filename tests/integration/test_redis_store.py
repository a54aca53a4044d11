"""The store of `[shared]` in real redis-servers: passwords, TLS, and sentinels that ask for one."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from support.certificates import Authority
from support.ports import free_port
from support.redis_process import RedisProcess, redis_process
from vllm_router.config.shared import SharedConfig, read_address
from vllm_router.config.tls import File
from vllm_router.config.types import Secret
from vllm_router.runtime.sharing.redis_store import open_redis
from vllm_router.runtime.sharing.store import Store, StoreError, Turn

WORD = "pa:ss/w@rd"
QUOTED = "pa%3Ass%2Fw%40rd"
BEFORE = (0, 1)

# coredis leaves memory streams of broken connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed <Memory:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Such streams are collected here, not in the middle of another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


class Places(NamedTuple):
    plain: int
    tls: int
    sentinel: int
    authority: Path
    other: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """A Redis with and without TLS, and its sentinel; all ask for a password."""
    directory = tmp_path_factory.mktemp("redis")
    authority, other = Authority(directory, "authority"), Authority(directory, "other")
    certificate, key = authority.sign("redis")
    tls = free_port()
    with ExitStack() as ending:
        redis = ending.enter_context(
            redis_process(
                directory,
                *("--requirepass", WORD, "--tls-port", str(tls), "--tls-auth-clients", "no"),
                *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
                *("--user", "gw", "on", f">{WORD}", "~vllm-router:*", "+@all"),
            )
        )
        text = (
            f"sentinel monitor main 127.0.0.1 {redis.port} 1\n"
            f'sentinel auth-pass main "{WORD}"\nrequirepass "{WORD}"\n'
        )
        sentinel = RedisProcess(directory, sentinel=text)
        ending.callback(sentinel.kill)
        sentinel.wait()
        yield Places(redis.port, tls, sentinel.port, authority.file, other.file)


async def take_turn(url: str, ca: Path | None = None) -> Turn:
    """One turn of a router with this configuration. Raises StoreError."""
    turns: list[Turn] = []

    class Done(Exception):
        pass

    async def use(store: Store) -> None:
        turns.append(await store.turn(b"batch", {"http://a:1": b"record"}, BEFORE))
        turns.append(await store.turn(None, {}, BEFORE))
        raise Done

    file = File(str(ca), Secret("")) if ca is not None else None
    config = SharedConfig(address=read_address(url), ca=file)
    with pytest.raises((Done, StoreError)) as ended:
        await open_redis(config, use)
    if isinstance(ended.value, StoreError):
        raise ended.value
    return turns[1]


def has_batch(turn: Turn) -> bool:
    return (turn.entries[-1][1], turn.drains) == (b"batch", {b"http://a:1": b"record"})


@pytest.mark.parametrize("user", ["", "default", "gw"])
async def test_open_redis_with_password_works(places: Places, user: str):
    assert has_batch(await take_turn(f"redis://{user}:{QUOTED}@127.0.0.1:{places.plain}"))


@pytest.mark.parametrize("credentials", ["", ":wrong@", f"unknown:{QUOTED}@"])
async def test_open_redis_with_wrong_password_says_so(places: Places, credentials: str):
    with pytest.raises(StoreError, match=r"(?i)auth|password") as error:
        await take_turn(f"redis://{credentials}127.0.0.1:{places.plain}")
    assert "wrong" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_open_redis_with_tls_and_its_authority_works(places: Places, host: str):
    url = f"rediss://gw:{QUOTED}@{host}:{places.tls}"
    assert has_batch(await take_turn(url, places.authority))


async def test_open_redis_with_another_authority_or_without_tls_fails(places: Places):
    for url, ca in (
        (f"rediss://:{QUOTED}@127.0.0.1:{places.tls}", places.other),
        (f"rediss://:{QUOTED}@127.0.0.1:{places.tls}", None),
        (f"rediss://:{QUOTED}@127.0.0.1:{places.plain}", places.authority),
        (f"redis://:{QUOTED}@127.0.0.1:{places.tls}", None),
    ):
        with pytest.raises(StoreError) as error:
            await take_turn(url, ca)
        assert WORD not in str(error.value)
        assert str(error.value)


async def test_open_redis_through_sentinel_with_password_works(places: Places):
    # The sentinel takes a moment until it has talked to the Redis.
    with trio.fail_after(60):
        while True:
            try:
                turn = await take_turn(f"sentinel://:{QUOTED}@127.0.0.1:{places.sentinel}/main")
                break
            except StoreError:
                await trio.sleep(0.05)
    assert has_batch(turn)
    with pytest.raises(StoreError, match="no sentinel names a Redis called main"):
        await take_turn(f"sentinel://127.0.0.1:{places.sentinel}/main")
