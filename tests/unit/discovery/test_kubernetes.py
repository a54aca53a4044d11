"""The source `kubernetes` against a double of the API, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from support.kubernetes_api import (
    SELECTOR,
    KubernetesApi,
    answer,
    endpoint,
    slice_of,
    status,
)
from support.one_piece import OnePiece
from support.source_notes import Notes
from vllm_router.config.discovery import KubernetesSource, TargetState
from vllm_router.config.parser import parse
from vllm_router.discovery.kubernetes.slices import EndpointSlice, targets_of
from vllm_router.discovery.kubernetes.source import MAX_PAUSE, RELIST, SILENCE, Kubernetes
from vllm_router.discovery.source import Again
from vllm_router.errors import ConfigError

UP, DRAIN, WAIT = TargetState.UP, TargetState.DRAIN, TargetState.WAIT


def config(**options: Any) -> KubernetesSource:
    return KubernetesSource(
        **{
            "name": "kubernetes",
            "url": "http://api.test",
            "namespace": "ml",
            "selector": SELECTOR,
            **options,
        }
    )


@asynccontextmanager
async def following(
    api: KubernetesApi, again: Again | None = None, **options: Any
) -> AsyncIterator[Notes]:
    notes = Notes()
    source = Kubernetes(config(**options), api.connect)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, notes, again or Again())
        yield notes
        nursery.cancel_scope.cancel()


def two() -> KubernetesApi:
    api = KubernetesApi()
    api.put(slice_of("one", ["10.0.0.1", "10.0.0.2"]))
    return api


FIRST = ["10.0.0.1:8000", "10.0.0.2:8000"]


async def watching(api: KubernetesApi, notes: Notes, addresses: list[str] = FIRST) -> None:
    """Wait until the set is known and a watch is open."""
    await notes.until(lambda it: it.sets[-1:] == [addresses])
    while not api.watchers:
        await trio.sleep(0.01)


async def test_kubernetes_lists_then_follows_events(autojump_clock: MockClock) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        assert notes.last["10.0.0.1:8000"].name == "vllm-10.0.0.1"
        api.put(slice_of("two", ["10.0.0.3"]))
        await notes.until(lambda it: it.sets[-1] == [*FIRST, "10.0.0.3:8000"])
        api.put(slice_of("one", ["10.0.0.2"]))
        await notes.until(lambda it: it.sets[-1] == ["10.0.0.2:8000", "10.0.0.3:8000"])
        api.delete("two")
        await notes.until(lambda it: it.sets[-1] == ["10.0.0.2:8000"])
        assert len(api.lists) == 1, "all of it came by the watch"
        assert trio.current_time() < 5


async def test_kubernetes_event_between_list_and_watch_is_not_lost(
    autojump_clock: MockClock,
) -> None:
    api = two()
    put = [slice_of("two", ["10.0.0.3"])]

    def fault(target: str, is_watch: bool) -> None:
        if is_watch and put:
            api.put(put.pop())

    api.fault = fault
    async with following(api) as notes:
        await notes.until(lambda it: it.sets[-1:] == [[*FIRST, "10.0.0.3:8000"]])


async def test_kubernetes_missed_delete_is_repaired_by_next_list(
    autojump_clock: MockClock,
) -> None:
    """The defect that cost users of another router 22 hours."""
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        for _ in range(3):
            await trio.sleep(30)
            api.bookmark()
        api.put(slice_of("one", ["10.0.0.1"]), missed=True)
        with trio.move_on_after(RELIST):
            while notes.sets[-1] == FIRST:
                await trio.sleep(30)
                api.bookmark()
        await notes.until(lambda it: it.sets[-1] == ["10.0.0.1:8000"])
        assert trio.current_time() < 2 * RELIST


@pytest.mark.parametrize("how", ["cut", "end", "expire", "garbage", "unknown", "long", "silence"])
async def test_kubernetes_watch_that_ends_is_followed_by_list(
    autojump_clock: MockClock, how: str
) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        began = trio.current_time()
        (watcher,) = api.watchers
        match how:
            case "cut":
                watcher.cut()
            case "end":
                watcher.end()
            case "expire":
                api.expire()
            case "garbage":
                watcher.raw(b"<html>\n")
            case "unknown":
                watcher.put("RENAMED", api.slices["one"])
            case "long":
                watcher.raw(b" " * 4_100_000)
            case "silence":
                watcher.silent = True
        api.put(slice_of("two", ["10.0.0.3"]), missed=True)
        await notes.until(lambda it: it.sets[-1] == [*FIRST, "10.0.0.3:8000"])
        assert trio.current_time() - began < (SILENCE + 1 if how == "silence" else 2)
        assert notes.failures == 0, "the end of a watch is no failure of the source"


async def test_kubernetes_expired_version_as_status_is_followed_by_list(
    autojump_clock: MockClock,
) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        refused = []

        def fault(target: str, is_watch: bool) -> httpx.Response | None:
            if is_watch and len(refused) < 3:
                refused.append(target)
                return status(410, "too old resource version")
            return None

        api.fault = fault
        api.compact()
        api.watchers[0].cut()
        await notes.until(lambda it: len(refused) == 3)
        await watching(api, notes)
        api.put(slice_of("two", ["10.0.0.3"]))
        await notes.until(lambda it: it.sets[-1] == [*FIRST, "10.0.0.3:8000"])
        assert notes.failures == 0


async def test_kubernetes_bookmarks_confirm_and_keep_the_watch(autojump_clock: MockClock) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        for _ in range(4):
            await trio.sleep(60)
            api.bookmark()
        await notes.until(lambda it: it.confirmations >= 4)
        assert len(api.lists) == 1


async def test_kubernetes_lists_again_every_few_minutes(autojump_clock: MockClock) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        for _ in range(60):
            await trio.sleep(60)
            api.bookmark()
    assert 3600 / RELIST - 1 <= len(api.lists) <= 3600 / RELIST + 2


async def test_kubernetes_api_gone_for_an_hour_keeps_the_set(autojump_clock: MockClock) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        sets = len(notes.sets)
        api.fault = lambda target, is_watch: httpx.ConnectError("connection refused")
        api.watchers[0].cut()
        await trio.sleep(3600)
        assert len(notes.sets) == sets
        assert notes.problem == "connection refused"
        assert len(api.lists) < 3600 / MAX_PAUSE * 1.2 + 20
        api.put(slice_of("two", ["10.0.0.3"]))
        api.fault = lambda target, is_watch: None
        began = trio.current_time()
        await notes.until(lambda it: it.sets[-1] == [*FIRST, "10.0.0.3:8000"])
        assert trio.current_time() - began < MAX_PAUSE * 1.3
        assert notes.problem is None


async def test_kubernetes_api_that_hangs_is_a_failure(autojump_clock: MockClock) -> None:
    api = two()
    api.stalled = True
    async with following(api) as notes:
        await notes.until(lambda it: it.problem is not None)
        assert notes.problem == "no whole list within 10 s"
        api.stalled = False
        await notes.until(lambda it: it.sets == [FIRST])


BROKEN: dict[str, Any] = {
    "500": lambda: status(500, "boom"),
    "empty": lambda: httpx.Response(200, stream=OnePiece(b"")),
    "html": lambda: httpx.Response(200, stream=OnePiece(b"<html>")),
    "no items": lambda: answer({"kind": "Status"}),
    "refused": lambda: httpx.ConnectError("refused"),
    "401": lambda: status(401, "Unauthorized"),
    "404": lambda: status(404),
    "redirect": lambda: httpx.Response(302, headers={"location": "/"}, stream=OnePiece(b"")),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_kubernetes_broken_api_is_listed_at_a_bounded_pace(
    autojump_clock: MockClock, what: str
) -> None:
    api = two()
    api.fault = lambda target, is_watch: BROKEN[what]()
    async with following(api) as notes:
        await trio.sleep(600)
    gaps = [after - before for before, after in zip(api.lists, api.lists[1:], strict=False)]
    assert min(gaps) >= 0.2
    assert len(api.lists) < 600 / MAX_PAUSE * 1.2 + 20
    assert notes.sets == []


@pytest.mark.parametrize("how", ["refuse", "cut", "expire", "event then cut"])
async def test_kubernetes_broken_watch_is_relisted_at_most_every_200_ms(
    autojump_clock: MockClock, how: str
) -> None:
    api = two()
    if how == "refuse":
        api.fault = lambda target, is_watch: status(410) if is_watch else None
    async with following(api):
        for number in range(600):
            for watcher in list(api.watchers):
                if how == "event then cut":
                    api.put(slice_of("one", [f"10.0.1.{number % 250}"]))
                if how == "expire":
                    api.expire()
                watcher.cut()
            await trio.sleep(0.01)
    gaps = [after - before for before, after in zip(api.lists, api.lists[1:], strict=False)]
    assert min(gaps) >= 0.199
    assert 4 <= len(api.lists) <= 31


async def test_kubernetes_retry_after_is_heeded(autojump_clock: MockClock) -> None:
    api = two()
    api.fault = lambda target, is_watch: status(429, "slow down", **{"retry-after": "30"})
    async with following(api) as notes:
        await trio.sleep(29)
        assert len(api.lists) == 1
        assert notes.problem == "it answered 429: slow down"
        api.fault = lambda target, is_watch: None
        await notes.until(lambda it: it.sets == [FIRST])


async def test_kubernetes_forbidden_says_which_role_is_needed(autojump_clock: MockClock) -> None:
    api = two()
    api.fault = lambda target, is_watch: status(403, "forbidden: User x")
    async with following(api) as notes:
        await notes.until(lambda it: it.problem is not None)
        assert "forbidden: User x" in (notes.problem or "")
        assert "list and watch endpointslices.discovery.k8s.io" in (notes.problem or "")
        api.fault = lambda target, is_watch: None
        await notes.until(lambda it: it.sets == [FIRST] and it.problem is None)


async def test_kubernetes_token_is_read_before_every_request(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    api, token = two(), tmp_path / "token"
    token.write_text("first\n")
    async with following(api, token_file=str(token)) as notes:
        await watching(api, notes)
        token.write_text("second\n")
        api.watchers[0].end()
        await notes.until(lambda it: len(it.sets) == 2)
        await watching(api, notes)
        token.unlink()
        api.watchers[0].end()
        await notes.until(lambda it: it.problem is not None)
        assert "No such file" in (notes.problem or "")
        token.write_text("third")
        await notes.until(lambda it: it.problem is None)
    assert list(dict.fromkeys(api.tokens)) == ["Bearer first", "Bearer second", "Bearer third"]


async def test_kubernetes_old_api_is_found_by_its_version(autojump_clock: MockClock) -> None:
    api = KubernetesApi("v1beta1")
    api.put(slice_of("one", ["10.0.0.1"]))
    async with following(api) as notes:
        await watching(api, notes, ["10.0.0.1:8000"])
        assert notes.failures == 0


async def test_kubernetes_second_look_ends_the_watch_and_lists(autojump_clock: MockClock) -> None:
    api, again = two(), Again()
    async with following(api, again) as notes:
        await watching(api, notes)
        again()
        await notes.until(lambda it: len(it.sets) == 2)
        assert len(api.lists) == 2


async def test_kubernetes_burst_of_events_is_published_in_few_sets(
    autojump_clock: MockClock,
) -> None:
    api = two()
    async with following(api) as notes:
        await watching(api, notes)
        for number in range(300):
            api.put(slice_of("many", [f"10.1.{n // 250}.{n % 250}" for n in range(number % 50)]))
        await trio.sleep(5)
        assert len(notes.sets) < 10
        assert len(notes.sets[-1]) == 2 + 299 % 50


async def test_kubernetes_bad_slice_is_named_and_others_are_used(
    autojump_clock: MockClock,
) -> None:
    api = two()
    api.put({"metadata": {"name": "odd"}, "endpoints": "none"})
    async with following(api) as notes:
        await watching(api, notes)
        assert "items[1]" in notes.left_out[0]


# -- slices -----------------------------------------------------------------------------------


def read(*slices: Any, port: str | int | None = None) -> Any:
    return targets_of([msgspec.convert(one, EndpointSlice) for one in slices], port)


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({}, UP),
        ({"ready": None}, UP),
        ({"ready": True}, UP),
        ({"ready": True, "serving": None, "terminating": None}, UP),
        ({"ready": False}, WAIT),
        ({"ready": False, "serving": False}, WAIT),
        ({"ready": False, "serving": True}, DRAIN),
        ({"ready": False, "serving": True, "terminating": True}, DRAIN),
        ({"ready": False, "serving": False, "terminating": True}, DRAIN),
        ({"ready": True, "serving": True, "terminating": True}, DRAIN),
        ({"terminating": True}, DRAIN),
    ],
)
def test_slices_conditions_decide_the_state(conditions: Any, state: TargetState) -> None:
    found = read(slice_of("one", [endpoint("10.0.0.1", **conditions)])).found
    assert [one.state for one in found] == [state]


def test_slices_without_conditions_are_up() -> None:
    one = slice_of("one", [{"addresses": ["10.0.0.1"]}])
    (found,) = read(one).found
    assert (found.state, found.name) == (UP, None)


def test_slices_ipv6_address_is_bracketed() -> None:
    (found,) = read(slice_of("one", ["fd00::1"], family="IPv6")).found
    assert found.address == "[fd00::1]:8000"


def test_slices_pod_with_both_families_is_one_target() -> None:
    four = slice_of("b-four", [endpoint("10.0.0.1", uid="p1"), endpoint("10.0.0.2", uid="p2")])
    six = slice_of("a-six", [endpoint("fd00::1", uid="p1"), endpoint("fd00::3", uid="p3")])
    six["addressType"] = "IPv6"
    found = read(six, four).found
    assert [one.address for one in found] == ["10.0.0.1:8000", "10.0.0.2:8000", "[fd00::3]:8000"]


def test_slices_endpoint_in_two_slices_is_found_in_both_and_merged_later() -> None:
    found = read(
        slice_of("one", [endpoint("10.0.0.1", ready=False)]),
        slice_of("two", [endpoint("10.0.0.1", ready=True)]),
    ).found
    assert [one.state for one in found] == [WAIT, UP]


def test_slices_port_is_chosen_by_name_or_number() -> None:
    one = slice_of("one", ["10.0.0.1"])
    one["ports"] = [{"name": "http", "port": 8000}, {"name": "metrics", "port": 9000}]
    assert [t.address for t in read(one, port="metrics").found] == ["10.0.0.1:9000"]
    assert [t.address for t in read(one, port=1234).found] == ["10.0.0.1:1234"]
    assert read(one).problems == [
        "slice one: expected one TCP port, got http 8000, metrics 9000: set port"
    ]
    assert read(one, port="grpc").problems == [
        'slice one: expected a port named "grpc", got http 8000, metrics 9000'
    ]
    one["ports"] = None
    assert read(one).problems == ["slice one: expected one TCP port, got no ports: set port"]
    assert [t.address for t in read(one, port=8000).found] == ["10.0.0.1:8000"]


def test_slices_annotations_and_labels_set_options() -> None:
    one = slice_of(
        "one",
        ["10.0.0.1"],
        labels={"vllm-router/weight": "1", "app": "vllm"},
        annotations={
            "vllm-router/weight": "2",
            "vllm-router/max-concurrent-requests": "64",
            "vllm-router/models": "org/a,b",
        },
    )
    (found,) = read(one).found
    assert found.labels == {
        "weight": "2",
        "max_concurrent_requests": "64",
        "models": "org/a,b",
    }


@pytest.mark.parametrize(
    "one",
    [
        {"metadata": {"name": "x"}},
        {"metadata": {"name": "x"}, "endpoints": None, "ports": None},
        {"metadata": {"name": "x"}, "endpoints": [{"addresses": []}], "ports": [{"port": 1}]},
    ],
)
def test_slices_without_endpoints_have_no_targets(one: Any) -> None:
    result = read(one)
    assert (result.found, result.problems) == ([], [])


# -- the table --------------------------------------------------------------------------------

POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def table(text: str, environ: dict[str, str] | None = None) -> KubernetesSource:
    def files(path: str) -> bytes:
        return {"ca.crt": b"-----BEGIN", "namespace": b"ml\n"}[path.rpartition("/")[2]]

    made = parse(
        f"[discovery]\nkubernetes = {text}\n".encode(), "servers.toml", environ or {}, files
    )
    assert made.discovery is not None
    (source,) = made.discovery.sources
    assert isinstance(source, KubernetesSource)
    return source


def test_table_in_a_pod_finds_api_token_authority_and_namespace() -> None:
    source = table('{ service = "vllm", port = "http" }', POD)
    assert source.url == "https://10.96.0.1:443"
    assert source.namespace == "ml"
    assert source.selector == SELECTOR
    assert source.token_file == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert source.ca is not None
    assert source.ca.path.endswith("ca.crt")


def test_table_in_a_pod_with_ipv6_brackets_the_api() -> None:
    source = table('{ service = "vllm" }', {**POD, "KUBERNETES_SERVICE_HOST": "fd00::1"})
    assert source.url == "https://[fd00::1]:443"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{ service = "vllm", namespace = "ml" }', "discovery.kubernetes.api: expected the URL"),
        ('{ api = "http://x", service = "v" }', "discovery.kubernetes.namespace: expected"),
        ('{ api = "http://x", namespace = "ml" }', "service: expected either service or selector"),
        (
            '{ api = "http://x", namespace = "ml", service = "v", selector = "a=b" }',
            "expected either service or selector",
        ),
        ('{ api = "http://x", namespace = "M L", service = "v" }', "a name of Kubernetes"),
        ('{ api = "http://x", namespace = "m", service = "v", port = 0 }', "port: expected the n"),
        (
            '{ api = "http://x", namespace = "m", service = "v", api_key = "k", token_file = "t" }',
            "token_file: expected token_file or api_key, got both",
        ),
    ],
)
def test_table_problem_names_key(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        table(text)
    assert any(problem in line for line in raised.value.problems), raised.value.problems
