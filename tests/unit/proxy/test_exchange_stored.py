"""Stored responses: requests about them go to the server that has them."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest
import trio

from support.fleet_makers import make_config
from support.proxy_harness import Got, Rig, lab
from support.scripted_server import END, SSE, Talk, answer, answering, chunk, ok
from vllm_router.config.auth import KeyConfig
from vllm_router.config.limits import LimitsConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.owners import Owners

RESPONSES = "/v1/responses"
USAGE = {"input_tokens": 1, "output_tokens": 1}
MISSING = {"message": "not found", "type": "invalid_request_error", "param": "response_id"}


class Keeper:
    """A server with a store of responses. `asked` are the request lines."""

    numbers = count()

    def __init__(self, seconds: float = 0.0) -> None:
        self.stored: set[str] = set()
        self.asked: list[str] = []
        self.seconds = seconds
        self.left = 0

    async def __call__(self, talk: Talk) -> None:
        while True:
            request = await talk.request()
            method, target = request.line.decode().split(" ")[:2]
            path = target.partition("?")[0]
            self.asked.append(f"{method} {target}")
            identifier = path.removeprefix("/v1/responses").strip("/").partition("/")[0]
            if self.seconds:
                with trio.move_on_after(self.seconds):
                    await talk.gone()
                    self.left += 1
                    return
            if identifier:
                found = identifier in self.stored
                body = {"id": identifier, "status": "completed", "usage": USAGE}
                reply = body if found else {"error": {**MISSING, "code": 404}}
                await talk.send(answer(200 if found else 404, json.dumps(reply).encode()))
            else:
                await talk.send(self._create(json.loads(request.body)))

    def _create(self, body: dict[str, Any]) -> bytes:
        previous = body.get("previous_response_id")
        if previous is not None and previous not in self.stored:
            return answer(404, json.dumps({"error": {**MISSING, "code": 404}}).encode())
        identifier = f"resp_{next(self.numbers)}"
        self.stored.add(identifier)
        response = {"id": identifier, "object": "response", "status": "completed", "usage": USAGE}
        if not body.get("stream"):
            return ok(json.dumps(response).encode())
        events = b"".join(
            f"event: {kind}\ndata: {json.dumps({**more, 'type': kind})}\n\n".encode()
            for kind, more in (
                ("response.created", {"response": {**response, "status": "in_progress"}}),
                ("response.output_text.delta", {"delta": "hi"}),
                ("response.completed", {"response": response}),
            )
        )
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % SSE
        return head + chunk(events) + END


def identifier_of(got: Got) -> str:
    if got.body.startswith(b"event:"):
        return json.loads(got.body.split(b"data: ", 1)[1].split(b"\n", 1)[0])["response"]["id"]
    return got.json["id"]


async def create(rig: Rig, server: str, **body: Any) -> str:
    """Create a response on this server."""
    rig.prefer(server)
    got = await rig.post({"model": "m", "input": "hi", **body}, path=RESPONSES)
    assert (got.status, got[b"x-vllm-router-server"]) == (200, server.encode())
    return identifier_of(got)


async def call(rig: Rig, method: str, path: str, key: KeyConfig | None = None, **more: Any) -> Got:
    client = rig.client(more.pop("body", b""), method=method, path=path, **more)
    if key is not None:
        client._scope[IDENTITY] = Identity(key, given=True)
    return await client.run()


def key_of(name: str, **limits: Any) -> KeyConfig:
    return KeyConfig(name=name, digest=digest_of(name), **limits)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_stored_response_requests_go_to_its_server(autojump_clock, stream, watched):
    keepers = Keeper(), Keeper(), Keeper()
    async with lab(*keepers, watched=watched) as rig:
        identifier = await create(rig, "b", stream=stream)
        rig.prefer("a")
        for keeper in keepers:
            keeper.asked.clear()
        path = f"{RESPONSES}/{identifier}"
        for method, target in (
            ("GET", path),
            ("POST", f"{path}/cancel"),
            ("DELETE", path),
            ("GET", f"{path}/input_items"),
        ):
            got = await call(rig, method, target)
            assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
            assert rig.recorder.last.owner is rig.server("b")
            assert rig.recorder.last.prompt_tokens is None
        body = {"model": "m", "input": "and?", "previous_response_id": identifier}
        got = await rig.post(body, path=RESPONSES)
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert (keepers[0].asked, keepers[2].asked) == ([], [])


async def test_stored_response_is_read_on_a_kept_connection_and_cancelled_on_a_new_one(
    autojump_clock,
):
    """A cancellation may not be sent twice, so no kept connection is used that may be closed."""
    async with lab(Keeper()) as rig:
        path = f"{RESPONSES}/{await create(rig, 'a')}"
        talks = rig.scripted["a"].talks
        before = len(talks)
        assert (await call(rig, "GET", path)).status == 200
        assert len(talks) == before
        assert (await call(rig, "POST", f"{path}/cancel")).status == 200
        assert len(talks) == before + 1


async def test_stored_response_query_reaches_server(autojump_clock):
    keeper = Keeper()
    async with lab(keeper) as rig:
        identifier = await create(rig, "a")
        target = f"{RESPONSES}/{identifier}"
        await call(rig, "GET", target, query=b"stream=true&starting_after=4")
        assert keeper.asked[-1] == f"GET {target}?stream=true&starting_after=4"


async def test_response_with_store_false_is_not_remembered(autojump_clock):
    async with lab(Keeper(), Keeper()) as rig:
        await create(rig, "a", store=False)
        assert len(rig.context.owners) == 0
        await create(rig, "a", store=True)
        await create(rig, "a")
        assert len(rig.context.owners) == 2


@pytest.mark.parametrize("how", ["read", "continue"])
async def test_stored_response_unknown_to_router_is_asked_of_all_servers(autojump_clock, how):
    keepers = Keeper(), Keeper(seconds=3.0), Keeper()
    keepers[2].stored.add("resp_old")
    async with lab(*keepers) as rig:
        if how == "read":
            got = await call(rig, "GET", f"{RESPONSES}/resp_old")
        else:
            body = {"model": "m", "input": "x", "previous_response_id": "resp_old"}
            got = await rig.post(body, path=RESPONSES)
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"c")
        assert got.took < 1.0, "the slow server was waited for"
        assert rig.context.owners.find("resp_old") is not None
        assert keepers[0].asked == [f"GET {RESPONSES}/resp_old"]
        await trio.sleep(0.1)
        assert keepers[1].left == 1, "the request to the slow server was not cancelled"


@pytest.mark.parametrize(
    ("continues", "code", "param"),
    [
        (False, "response_not_found", "response_id"),
        (True, "previous_response_not_found", "previous_response_id"),
    ],
)
async def test_stored_response_no_server_has_is_404(autojump_clock, continues, code, param):
    async with lab(Keeper(), Keeper()) as rig:

        async def ask() -> Got:
            if not continues:
                return await call(rig, "GET", f"{RESPONSES}/resp_none")
            body = {"model": "m", "input": "x", "previous_response_id": "resp_none"}
            return await rig.post(body, path=RESPONSES)

        got = await ask()
        assert (got.status, got.code, got.json["error"]["param"]) == (404, code, param)
        assert "'resp_none'" in got.json["error"]["message"]
        rig.down("a")
        got = await ask()
        assert (got.status, got.code) == (503, "response_unavailable")
        assert got[b"retry-after"] is not None
        assert "Not asked, or without an answer: a." in got.json["error"]["message"]


async def test_stored_response_of_removed_server_is_404(autojump_clock):
    async with lab(Keeper(), Keeper(), Keeper()) as rig:
        identifier = await create(rig, "c")
        config = make_config(2, policy="least_load")
        rig.fleet.apply(config)
        rig.fleet.gone()
        rig.proxy.apply(config)
        for name in ("a", "b"):
            rig.context.upstreams[rig.server(name)].pool.close()
        body = {"model": "m", "input": "x", "previous_response_id": identifier}
        got = await rig.post(body, path=RESPONSES)
        assert (got.status, got.code) == (404, "previous_response_not_found")
        assert "no longer in the fleet" in got.json["error"]["message"]


@pytest.mark.parametrize("limits", [None, LimitsConfig(queue_timeout=5.0)])
async def test_chain_waits_for_its_server_and_uses_no_other(autojump_clock, limits):
    keepers = Keeper(), Keeper()
    async with lab(*keepers) as rig:
        identifier = await create(rig, "b")
        rig.proxy._apply_limits(limits)
        rig.down("b")
        before = len(keepers[0].asked)
        body = {"model": "m", "input": "x", "previous_response_id": identifier}
        got = await rig.post(body, path=RESPONSES)
        assert (got.status, got.code) == (503, "response_unavailable")
        assert "The server b, which has the stored response" in got.json["error"]["message"]
        assert got.took == (5.0 if limits else pytest.approx(0.0, abs=0.1))
        assert len(keepers[0].asked) == before


async def test_chain_that_fails_on_its_server_goes_to_no_other(autojump_clock):
    keepers = Keeper(), Keeper()
    async with lab(*keepers) as rig:
        identifier = await create(rig, "b")
        rig.scripted["b"].refuses = True
        await trio.sleep(5.0)  # kept connections expire
        body = {"model": "m", "input": "x", "previous_response_id": identifier}
        got = await rig.post(body, path=RESPONSES)
        assert (got.status, got.code) == (503, "connect_failed")
        assert keepers[0].asked == []


@pytest.mark.parametrize(
    ("reply", "status", "outcome"),
    [
        (answer(404, b'{"error":{"message":"gone"}}'), 404, Outcome.ANSWERED),
        (answer(401, b'{"error":{"message":"no"}}'), 401, Outcome.ANSWERED),
        (answer(302, b"", b"location: http://else.test/"), 502, Outcome.MISDIRECTED),
    ],
)
async def test_stored_response_error_of_its_server_is_passed_on_unless_it_redirects(
    autojump_clock, reply, status, outcome
):
    async with lab(Keeper(), Keeper()) as rig:
        identifier = await create(rig, "b")
        rig.scripted["b"].script = answering(reply)
        await trio.sleep(5.0)  # kept connections expire
        got = await call(rig, "GET", f"{RESPONSES}/{identifier}")
        assert got.status == status
        assert rig.recorder.attempts[-1] == ("b", outcome)
        assert rig.requests()["a"] == 0


async def test_cancel_waits_for_no_place_of_a_full_server(autojump_clock):
    keepers = Keeper(), Keeper(seconds=20.0)
    async with lab(*keepers) as rig:
        rig.context.owners.remember("resp_1", rig.server("b").url, "")
        keepers[1].stored.add("resp_1")
        rig.proxy._apply_limits(LimitsConfig(queue_timeout=5.0))
        rig.server("b").cap = 1
        rig.prefer("b")
        busy = rig.start({"model": "m", "previous_response_id": "resp_1"}, path=RESPONSES)
        await trio.sleep(1.0)
        assert rig.server("b").at_cap
        keepers[1].seconds = 0.0
        got = await call(rig, "POST", f"{RESPONSES}/resp_1/cancel")
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        await trio.sleep(20.0)
        assert busy.done


async def test_stored_response_of_draining_server_can_be_read_but_not_continued(autojump_clock):
    async with lab(Keeper(), Keeper()) as rig:
        identifier = await create(rig, "b")
        rig.server("b").drain(on=True)
        assert (await call(rig, "GET", f"{RESPONSES}/{identifier}")).status == 200
        body = {"model": "m", "input": "x", "previous_response_id": identifier}
        got = await rig.post(body, path=RESPONSES)
        assert (got.status, got.code) == (503, "response_unavailable")


async def test_stored_response_belongs_to_key_that_made_it(autojump_clock):
    ann, ben = key_of("ann"), key_of("ben")
    async with lab(Keeper(), Keeper()) as rig:
        body = json.dumps({"model": "m", "input": "x"}).encode()
        made = await call(rig, "POST", RESPONSES, ann, body=body)
        path = f"{RESPONSES}/{made.json['id']}"
        assert (await call(rig, "GET", path, ann)).status == 200
        for method, target in (("GET", path), ("POST", f"{path}/cancel"), ("DELETE", path)):
            got = await call(rig, method, target, ben)
            assert (got.status, got.code) == (404, "response_not_found")
        chain = {"model": "m", "input": "x", "previous_response_id": made.json["id"]}
        got = await call(rig, "POST", RESPONSES, ben, body=json.dumps(chain).encode())
        assert (got.status, got.code) == (404, "previous_response_not_found")
        assert (await call(rig, "GET", path)).status == 200, "without keys all is open"


async def test_key_limited_to_models_gets_only_responses_known_as_its_own(autojump_clock):
    limited = key_of("limited", models=("m",))
    keepers = Keeper(), Keeper()
    keepers[0].stored.add("resp_old")
    async with lab(*keepers) as rig:
        got = await call(rig, "GET", f"{RESPONSES}/resp_old", limited)
        assert (got.status, got.code) == (404, "response_not_found")
        assert keepers[0].asked == []
        assert (await call(rig, "GET", f"{RESPONSES}/resp_old", key_of("other"))).status == 200
        got = await call(rig, "GET", f"{RESPONSES}/resp_old", limited)
        assert got.status == 404, "that another key has found it makes it no own one"
        body = json.dumps({"model": "m", "input": "x"}).encode()
        made = await call(rig, "POST", RESPONSES, limited, body=body)
        assert (await call(rig, "GET", f"{RESPONSES}/{made.json['id']}", limited)).status == 200


async def test_stored_responses_survive_reload(autojump_clock):
    async with lab(Keeper(), Keeper()) as rig:
        identifier = await create(rig, "b")
        config = make_config(2, policy="least_load", max_retries=1)
        rig.fleet.apply(config)
        rig.proxy.apply(config)
        rig.prefer("a")
        got = await call(rig, "GET", f"{RESPONSES}/{identifier}")
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")


@pytest.mark.parametrize("identifier", ["resp_ä/../x", "x" * 600, "resp\r\nhost: evil", "\ud800"])
async def test_chain_with_odd_id_is_404(autojump_clock, identifier):
    keepers = Keeper(), Keeper()
    async with lab(*keepers) as rig:
        body = {"model": "m", "input": "x", "previous_response_id": identifier}
        got = await rig.post(body, path=RESPONSES)
        assert got.status == 404
        for keeper in keepers:
            assert all(
                line.startswith(("GET /v1/responses/", "POST /v1/")) for line in keeper.asked
            )
            assert not any("/../" in line for line in keeper.asked)


async def test_previous_response_id_of_other_apis_means_nothing(autojump_clock):
    async with lab(Keeper(), Keeper()) as rig:
        got = await rig.post({"model": "m", "previous_response_id": "resp_none"})
        assert rig.recorder.last.owner is None
        assert got[b"x-vllm-router-server"] is not None


@pytest.mark.parametrize("status", [400, 404, 405, 410, 422, 501])
async def test_stored_response_that_all_servers_refuse_is_not_found(autojump_clock, status):
    """Engines answer 400 for an id that cannot be one of theirs."""
    odd = answering(answer(status, b'{"error":{"message":"Invalid id"}}'))
    async with lab(odd, Keeper()) as rig:
        got = await rig.post(b"", path=f"{RESPONSES}/foo", method="GET")
        assert (got.status, got.code) == (404, "response_not_found")


async def test_stored_response_is_not_on_server_that_answers_with_a_page(autojump_clock):
    page = answering(answer(200, b"<html>Sign in</html>", content_type=b"text/html"))
    keeper = Keeper(0.1)
    keeper.stored.add("resp_x")
    async with lab(page, keeper) as rig:
        got = await rig.post(b"", path=f"{RESPONSES}/resp_x", method="GET")
        assert (got.status, got.json["id"]) == (200, "resp_x")


async def test_stored_response_announced_late_is_found_by_limited_key(autojump_clock):
    """The other process that made it announces it some moments after its client has the id."""
    limited = key_of("limited", models=("m",))
    keepers = Keeper(), Keeper()
    keepers[1].stored.add("resp_x")
    async with lab(*keepers) as rig:
        other = Owners()
        other.on_new = rig.context.owners.take
        rig.context.owners.on_new = other.take

        async def announce() -> None:
            await trio.sleep(0.4)
            other.remember("resp_x", rig.server("b").url, "limited")

        rig.nursery.start_soon(announce)
        got = await call(rig, "GET", f"{RESPONSES}/resp_x", limited)
        assert got.status == 200
        got = await call(rig, "GET", f"{RESPONSES}/resp_y", limited)
        assert (got.status, got.code) == (404, "response_not_found")
        assert keepers[0].asked == []


async def test_stored_response_announced_while_servers_are_asked_keeps_its_key(autojump_clock):
    keepers = Keeper(1.0), Keeper(1.0)
    keepers[1].stored.add("resp_x")
    ann, ben = key_of("ann", models=("m",)), key_of("ben")
    async with lab(*keepers) as rig:

        async def announce() -> None:
            await trio.sleep(0.5)
            rig.context.owners.remember("resp_x", rig.server("b").url, "ann")

        rig.nursery.start_soon(announce)
        got = await call(rig, "GET", f"{RESPONSES}/resp_x", ben)
        assert (got.status, got.code) == (404, "response_not_found")
        assert (await call(rig, "GET", f"{RESPONSES}/resp_x", ann)).status == 200
