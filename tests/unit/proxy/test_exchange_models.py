"""Aliases, fallbacks and policies of single requests, from the client's bytes to the server's."""

from __future__ import annotations

import json

import pytest
import trio

from support.fleet_makers import come_up, eject, make_config
from support.proxy_harness import Rig, lab
from support.scripted_server import DONE, Talk, answer, answering, event, ok, streaming
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.quarantine import shared_digest
from vllm_router.proxy.refusal import names_shown

GOOD = ok(b'{"model":"big"}')
JSON_TYPE = (b"content-type", b"application/json")

TABLES = """
[models]
chat = "big"
tiny = { serves = "small", policy = "round_robin" }
safe = { serves = "big", fallback = "tiny" }
safest = { serves = "gone", fallback = "safe" }
small = { policy = "random" }
"""


def two(rig: Rig) -> None:
    """`a` has the big model, `b` the small one."""
    come_up(rig.server("a"), trio.current_time(), "big")
    come_up(rig.server("b"), trio.current_time(), "small")


def models(**options: object) -> dict[str, object]:
    return {"tables": TABLES, "up": False, **options}


@pytest.mark.parametrize("watched", [False, True])
async def test_models_server_gets_its_own_name_and_the_rest_unchanged(autojump_clock, watched):
    body = b'{ "model" : "chat",  "x":"\\u00e9", "y": {"model":"chat"} }'
    async with lab(answering(GOOD), answering(GOOD), **models(watched=watched)) as rig:
        two(rig)
        digest = (b"content-digest", b"sha-256=:abc=:")
        got = await rig.post(body, headers=(JSON_TYPE, digest, (b"x-kept", b"1")))
        assert got.body == b'{"model":"big"}', "answers are not edited"
        (seen,) = rig.scripted["a"].requests
        assert seen.body == body.replace(b'"chat",', b'"big",')
        assert seen[b"content-length"] == b"%d" % len(seen.body)
        assert seen[b"content-digest"] is None
        assert seen[b"x-kept"] == b"1"
        record = rig.recorder.last
        assert (record.model, record.served_model, record.policy) == ("chat", "big", "least_load")


async def test_models_body_in_pieces_is_edited_as_a_whole(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), **models()) as rig:
        two(rig)
        await rig.post([b'{"mod', b'el":"ch', b'at"}'])
        (seen,) = rig.scripted["a"].requests
        assert (seen.body, seen[b"content-length"]) == (b'{"model":"big"}', b"15")


async def test_models_long_conversation_is_edited_in_every_turn(autojump_clock):
    """The first turn is read in slices, the second from where the first ended."""
    messages = [{"role": "user", "content": "x" * 200_000} for _ in range(3)]
    async with lab(answering(GOOD), answering(GOOD), **models(policy="adaptive")) as rig:
        two(rig)
        for _ in range(2):
            body = json.dumps({"model": "chat", "messages": messages}).encode()
            await rig.post(body)
            seen = rig.scripted["a"].requests[-1]
            assert seen.body == body.replace(b'"chat"', b'"big"')
            assert rig.recorder.last.model == "chat"
            messages.append({"role": "user", "content": "y" * 1000})


async def test_models_name_used_by_servers_is_sent_unchanged(autojump_clock):
    body = b'{"model" :"big"}'
    async with lab(answering(GOOD), answering(GOOD), **models()) as rig:
        two(rig)
        await rig.post(body)
        (seen,) = rig.scripted["a"].requests
        assert seen.body == body
        assert rig.recorder.last.served_model is None


async def test_models_fallback_answers_while_no_server_has_the_model(autojump_clock):
    async with lab(answering(GOOD), answering(ok(b'{"small":1}')), **models()) as rig:
        two(rig)
        assert (await rig.post({"model": "safe"}))[b"x-vllm-router-server"] == b"a"
        rig.down("a")
        for asked in ("safe", "safest"):
            got = await rig.post({"model": asked})
            assert got[b"x-vllm-router-server"] == b"b"
            assert json.loads(rig.scripted["b"].requests[-1].body) == {"model": "small"}
            record = rig.recorder.last
            assert (record.model, record.served_model) == (asked, "small")
            assert record.policy == "round_robin", "the policy of the model that answers"
        refused = await rig.post({"model": "chat"})
        assert (refused.status, refused.code) == (503, "no_server_available")
        assert "'chat'" in refused.json["error"]["message"]


async def test_models_fallback_precedes_ejected_servers(autojump_clock):
    async with lab(answering(GOOD), answering(ok(b'{"small":1}')), **models()) as rig:
        two(rig)
        eject(rig.server("a"), trio.current_time())
        rig.fleet.settle(trio.current_time())
        assert (await rig.post({"model": "safe"}))[b"x-vllm-router-server"] == b"b"
        assert (await rig.post({"model": "chat"}))[b"x-vllm-router-server"] == b"a"


@pytest.mark.parametrize("status", [500, 503])
async def test_models_refusal_by_all_servers_falls_back_silently(autojump_clock, status):
    broken = answer(status, b'{"error":{}}')
    async with lab(answering(broken), answering(ok(b'{"small":1}')), **models()) as rig:
        two(rig)
        got = await rig.post({"model": "safe"})
        assert (got.status, got[b"x-vllm-router-attempts"]) == (200, b"2")
        assert rig.scripted["a"].requests[0].body == b'{"model":"big"}'.replace(b":", b": ")
        assert rig.scripted["b"].requests[0].body == b'{"model": "small"}'
        assert (await rig.post({"model": "chat"})).status == status, "chat has no fallback"


async def test_models_last_server_of_the_fallback_failing_passes_its_error(autojump_clock):
    broken = answering(answer(500, b'{"error":{}}'))
    async with lab(broken, broken, **models()) as rig:
        two(rig)
        got = await rig.post({"model": "safe"})
        assert (got.status, got[b"x-vllm-router-attempts"]) == (500, b"2")
        assert rig.requests() == {"a": 1, "b": 1}


async def test_models_fallback_without_servers_is_503(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), **models()) as rig:
        two(rig)
        for name in "ab":
            rig.down(name)
        got = await rig.post({"model": "safe"})
        assert (got.status, got.code) == (503, "no_server_available")


async def test_models_fallback_answers_once_the_first_probes_show_no_server(autojump_clock):
    async with lab(answering(GOOD), answering(ok(b'{"small":1}')), **models()) as rig:
        come_up(rig.server("b"), trio.current_time(), "small")
        client = rig.start({"model": "safe"})
        await trio.sleep(0.1)
        come_up(rig.server("a"), trio.current_time(), "other")
        rig.fleet.settle(trio.current_time())
        await trio.sleep(0.1)
        assert client.got[b"x-vllm-router-server"] == b"b"


async def test_models_fallback_waits_until_all_servers_are_tried(autojump_clock):
    async with lab(answering(GOOD), answering(ok(b'{"small":1}')), **models()) as rig:
        come_up(rig.server("b"), trio.current_time(), "small")
        client = rig.start({"model": "safe"})
        await trio.sleep(0.1)
        come_up(rig.server("a"), trio.current_time(), "big")
        await trio.sleep(0.1)
        assert client.got[b"x-vllm-router-server"] == b"a"


async def test_models_request_without_one_stays_as_it_is(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), **models()) as rig:
        two(rig)
        for body in (b'{"prompt":"x"}', b'{"prompt":"' + b"x" * 1_000_000 + b'"}'):
            assert (await rig.post(body)).status == 200
            (seen,) = [request for s in rig.scripted.values() for request in s.requests[-1:]][:1]
            assert seen.body == body
            assert (rig.recorder.last.model, rig.recorder.last.served_model) == (None, None)
            for scripted in rig.scripted.values():
                scripted.requests.clear()


async def test_models_unknown_model_error_lists_public_names(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), **models()) as rig:
        two(rig)
        got = await rig.post({"model": "missing"})
        assert got.code == "model_not_found"
        assert got.json["error"]["message"].endswith(
            "Available models: chat, safe, safest, small, tiny."
        )


async def test_models_of_key_are_public_names_with_their_fallbacks(autojump_clock):
    key = KeyConfig(name="k", digest=digest_of("k"), models=("safe",))
    async with lab(answering(GOOD), answering(ok(b'{"small":1}')), **models()) as rig:
        two(rig)

        async def ask(model: str) -> int:
            client = rig.client({"model": model})
            client._scope[IDENTITY] = Identity(key, given=True)
            return (await client.run()).status

        assert await ask("safe") == 200
        assert await ask("big") == await ask("chat") == await ask("tiny") == 403
        rig.down("a")
        assert await ask("safe") == 200
        assert [len(rig.scripted[name].requests) for name in "ab"] == [1, 1]


async def test_models_follow_reload(autojump_clock):
    async with lab(answering(GOOD), answering(ok(b'{"small":1}')), up=False) as rig:
        two(rig)
        assert (await rig.post({"model": "chat"})).status == 404
        new = make_config(2, tables=TABLES)
        rig.fleet.apply(new)
        pools = {server: rig.context.upstreams[server].pool for server in rig.servers}
        rig.proxy.apply(new)
        for server, pool in pools.items():
            rig.context.upstreams[server].pool = pool
        assert (await rig.post({"model": "chat"})).status == 200


# -- X-Router-Policy ---------------------------------------------------------------------------


def wanting(name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return (JSON_TYPE, (b"x-router-policy", name))


async def test_policy_header_chooses_policy_where_allowed(autojump_clock):
    async with lab(answering(GOOD), policy_header=True) as rig:
        await rig.post(headers=wanting(b"adaptive"))
        assert rig.recorder.last.policy == "adaptive"
        assert rig.scripted["a"].requests[0][b"x-router-policy"] is None
        await rig.post()
        assert rig.recorder.last.policy == "least_load"


async def test_policy_header_is_ignored_and_dropped_where_not_allowed(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        for name in (b"adaptive", b"nonsense"):
            assert (await rig.post(headers=wanting(name))).status == 200
            assert rig.recorder.last.policy == "least_load"
            assert rig.scripted["a"].requests[-1][b"x-router-policy"] is None


@pytest.mark.parametrize("name", [b"nonsense", b"", b"Adaptive", b"\xff"])
async def test_policy_header_unknown_policy_error_lists_names(autojump_clock, name):
    async with lab(answering(GOOD), policy_header=True) as rig:
        got = await rig.post(headers=wanting(name))
        assert (got.status, got.code) == (400, "unknown_policy")
        assert "adaptive, least_load," in got.json["error"]["message"]
        assert not rig.requests().total()


async def test_policy_header_precedes_policy_of_model(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), **models(policy_header=True)) as rig:
        two(rig)
        await rig.post({"model": "tiny"})
        assert rig.recorder.last.policy == "round_robin"
        await rig.post({"model": "tiny"}, headers=wanting(b"prefix"))
        assert rig.recorder.last.policy == "prefix"


async def test_policy_receives_first_token_and_usage_of_its_pick(autojump_clock):
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":2000,"completion_tokens":3}}\n\n'
    async with lab(streaming(event("hi"), usage, DONE), policy_header=True) as rig:
        messages = [{"role": "user", "content": "x" * 4000}]
        body = {"model": "m", "stream": True, "messages": messages}
        await rig.post(body, headers=wanting(b"adaptive"))
        adaptive = rig.context.policies.named("adaptive")
        (server,) = rig.servers
        assert adaptive.statistics(server).prompt_tokens > 900
        assert adaptive._estimates[server].queued == 0
        assert adaptive.index._bytes_per_token["m"] < 4.0


def test_models_error_shortens_long_list_of_names():
    assert names_shown([]) == ""
    assert names_shown(["a", "b"]) == "a, b"
    assert names_shown([f"m{n}" for n in range(2000)]).endswith("m18, m19 and 1980 more")
    assert len(names_shown(["x" * 512] * 2000)) < 2200


async def test_models_request_that_kills_servers_of_both_models_is_quarantined(autojump_clock):
    """The client repeats the request with the name of its own model."""

    async def dies(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(1)

    async with lab(dies, dies, dies, **models()) as rig:
        shared: list[bytes] = []
        rig.context.quarantine.on_new = shared.append
        for name, model in (("a", "big"), ("b", "small"), ("c", "small")):
            come_up(rig.server(name), trio.current_time(), model)
        assert (await rig.post({"model": "safe"})).code == "server_disconnected"
        dead = rig.requests()
        assert (dead["a"], dead.total()) == (1, 2)
        again = await rig.post({"model": "safe"})
        assert (again.code, rig.requests()) == ("poison_request", dead)
        sent = [one.body for server in rig.scripted.values() for one in server.requests]
        assert set(shared) == {shared_digest(b"/v1/chat/completions", body) for body in sent}
