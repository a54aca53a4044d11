"""The store of `[shared]` in real redis-servers: passwords, TLS, and sentinels that ask for one."""

from __future__ import annotations

import gc
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from support.certificates import Authority
from support.ports import free_port
from support.redis_process import RedisProcess, redis_process
from vllm_router.config.shared import SharedConfig, read_address
from vllm_router.config.tls import File
from vllm_router.config.types import Secret
from vllm_router.routing.sharing.drains import MAX_RECORDS
from vllm_router.runtime.sharing.redis_connector import RedisConnector
from vllm_router.runtime.sharing.store import Store, StoreError, TooMuchToRead, Turn

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


MODULES = ("redis_connector", "redis_sentinel", "redis_store")


def wait_at_most(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in MODULES:
        monkeypatch.setattr(f"vllm_router.runtime.sharing.{module}.TIMEOUT", seconds)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine answers late, which is no fault here."""
    wait_at_most(monkeypatch, 30.0)


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
    authority = Authority(directory, "authority", key_usage=False)
    other = Authority(directory, "other")
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


async def take_turn(url: str, ca: Path | None = None, fleet: str = "default") -> Turn:
    """One turn of a router with this configuration. Raises StoreError."""
    turns: list[Turn] = []

    class Done(Exception):
        pass

    async def use(store: Store) -> None:
        turns.append(await store.turn(b"batch", {"http://a:1": b"record"}, BEFORE))
        turns.append(await store.turn(None, {}, BEFORE))
        raise Done

    file = File(str(ca), Secret("")) if ca is not None else None
    config = SharedConfig(address=read_address(url), ca=file, fleet=fleet)
    with pytest.raises((Done, StoreError)) as ended:
        await RedisConnector().open(config, use)
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


async def test_open_redis_with_another_authority_or_without_tls_fails(
    places: Places, monkeypatch: pytest.MonkeyPatch
):
    wait_at_most(monkeypatch, 1.0)
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


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis without a password, in which other programs write under the keys."""
    with redis_process(tmp_path_factory.mktemp("open")) as process:
        yield process


async def test_open_redis_fleets_and_databases_are_apart(redis: RedisProcess):
    for url, fleet in ((redis.url, "one"), (redis.url, "two"), (f"{redis.url}/3", "one")):
        turn = await take_turn(url, fleet=fleet)
        assert len(turn.entries) == 1
        assert has_batch(turn)


@pytest.mark.parametrize("key", ["log", "drains"])
async def test_open_redis_key_of_another_type_is_named(redis: RedisProcess, key: str):
    name = f"vllm-router:typed-{key}:{key}"
    redis.command("SET", name, "x")
    with pytest.raises(StoreError, match=f"{name}: .*wrong kind of value"):
        await take_turn(redis.url, fleet=f"typed-{key}")


async def test_open_redis_entries_of_other_programs_are_passed_over(redis: RedisProcess):
    many = [part for number in range(1000) for part in (f"f{number}", "x")]
    redis.command("XADD", "vllm-router:foreign:log", "1-2", "other", "x")
    redis.command("XADD", "vllm-router:foreign:log", "1-3", *many, "b", "not looked for so far")
    turn = await take_turn(redis.url, fleet="foreign")
    assert turn.entries[:2] == [((1, 2), b""), ((1, 3), b"")]
    assert has_batch(turn)


async def test_open_redis_map_of_too_many_records_is_read_in_part(redis: RedisProcess):
    script = "for n = 1, 50000 do redis.call('HSET', KEYS[1], n, 'x') end"
    redis.command("EVAL", script, "1", "vllm-router:many:drains")
    turn = await take_turn(redis.url, fleet="many")
    assert len(turn.drains) == MAX_RECORDS
    assert turn.entries[-1][1] == b"batch"


async def test_open_redis_answer_that_is_too_long_is_not_read(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vllm_router.runtime.sharing.redis_connection.MAX_ANSWER", 2**20)
    script = "redis.call('XADD', KEYS[1], '*', 'b', string.rep('x', 1050000))"
    redis.command("EVAL", script, "1", "vllm-router:long:log")
    with pytest.raises(TooMuchToRead, match="more than 1 MB"):
        await take_turn(redis.url, fleet="long")


async def test_open_redis_of_a_cluster_says_so(tmp_path: Path):
    # Without a number, the port of the cluster's bus is 10 000 higher and may be taken.
    bus = ("--cluster-port", str(free_port()))
    with redis_process(tmp_path, "--cluster-enabled", "yes", *bus) as member:
        member.command("CLUSTER", "ADDSLOTS", "0")
        with pytest.raises(StoreError, match="cluster"):
            await take_turn(member.url)


async def test_open_redis_sentinel_that_names_a_dead_primary_is_passed_over(
    places: Places, redis: RedisProcess, tmp_path: Path
):
    replica = RedisProcess(tmp_path, "--replicaof", f"127.0.0.1 {redis.port}")
    dead = f"sentinel monitor main 127.0.0.1 {free_port()} 1\n"
    demoted = f"sentinel monitor main 127.0.0.1 {replica.port} 1\n"
    alive = f"sentinel monitor main 127.0.0.1 {redis.port} 1\n"
    with ExitStack() as ending:
        ending.callback(replica.kill)
        replica.wait()
        sentinels = []
        for text in (dead, demoted, alive):
            sentinels.append(RedisProcess(tmp_path, sentinel=text))
            ending.callback(sentinels[-1].kill)
        for sentinel in sentinels:
            sentinel.wait()
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        assert has_batch(await take_turn(f"sentinel://{hosts}/main", fleet="passed"))
        redis.command("ACL", "SETUSER", "default", "-role")
        hosts = f"127.0.0.1:{sentinels[2].port}"
        assert has_batch(await take_turn(f"sentinel://{hosts}/main", fleet="unasked"))
        redis.command("ACL", "SETUSER", "default", "+role")
        hosts = f"127.0.0.1:{sentinels[0].port}"
        problem = "no sentinel names a Redis called main: .*: Connection refused"
        with pytest.raises(StoreError, match=problem):
            await take_turn(f"sentinel://{hosts}/main")
        with pytest.raises(StoreError, match=f"{hosts} does not know it"):
            await take_turn(f"sentinel://{hosts}/other")
        sentinels[0].kill()
        with pytest.raises(StoreError, match=problem):
            await take_turn(f"sentinel://{hosts}/main")


async def test_redis_connector_makes_its_tls_context_seldom_and_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
):
    threads, make = [], ssl.create_default_context

    def counted(*arguments: Any, **settings: Any) -> ssl.SSLContext:
        threads.append(threading.current_thread())
        return make(*arguments, **settings)

    monkeypatch.setattr(ssl, "create_default_context", counted)
    config = SharedConfig(address=read_address(f"rediss://127.0.0.1:{free_port()}"))
    connector = RedisConnector()
    for _ in range(2):
        with pytest.raises(StoreError, match="Connection refused"):
            await connector.open(config, _turn)
    assert len(threads) == 1
    monkeypatch.setattr("vllm_router.runtime.sharing.redis_connector.CONTEXT_FOR", -1.0)
    with pytest.raises(StoreError, match="Connection refused"):
        await connector.open(config, _turn)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


async def _turn(store: Store) -> None:
    await store.turn(None, {}, BEFORE)


HELLO = b"%3\r\n$5\r\nproto\r\n:3\r\n$7\r\nversion\r\n$3\r\n7.0\r\n$2\r\nid\r\n:1\r\n"


async def test_open_redis_that_sends_what_was_not_asked_for_is_left():
    async def lie(stream: trio.SocketStream) -> None:
        async for asked in stream:
            answer = HELLO if b"HELLO" in asked else b"+OK\r\n"
            await stream.send_all(b">1\r\n+x\r\n" * 1000 if b"XREAD" in asked else answer)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lie, [listener])
        port = listener.socket.getsockname()[1]
        with pytest.raises(StoreError, match="answers to no command"):
            await take_turn(f"redis://127.0.0.1:{port}")
        nursery.cancel_scope.cancel()
