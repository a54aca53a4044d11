"""Explain a routing decision: every server with its score, or the reason for its exclusion."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import trio

from vllm_router.errors import InvalidBody, Refused
from vllm_router.fleet.candidates import choose
from vllm_router.fleet.reason import NONE, Reason, because
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.observability.slices import each
from vllm_router.proxy.request import wanted_policy
from vllm_router.proxy.slices import in_slices
from vllm_router.routing.policies import Policy
from vllm_router.routing.prompt.blocks import reseeded
from vllm_router.routing.prompt.body_reader import read_in_slices
from vllm_router.routing.prompt.routing_info import EXPLAIN, SHORT, RoutingInfo, read_at_once
from vllm_router.routing.prompt.session import session_hint
from vllm_router.steps import Steps
from vllm_router.web.reasons import reason_fields
from vllm_router.web.router import Router
from vllm_router.web.status import encoded

RANKED_AT_ONCE = 200
"""Candidates that are listed in one slice."""


def explain(
    router: Router, info: RoutingInfo, policy: Policy | None = None
) -> Steps[dict[str, Any]]:
    """The decision for such a request now. Takes no lease and changes no policy state.

    Candidates are in the order of preference, if the policy has one: `policy`, or the model's
    policy. All that scores follow from, and the figures of all servers, are read in one step, so
    that they belong together; the following steps make the rows of the page from them.
    """
    now = trio.current_time()
    fleet, asked = router.fleet, info.model
    if asked is not None:
        names = fleet.names
        answering = names.resolve(asked, lambda served: fleet.available(served, now))
        prompt = reseeded(info.prompt, fleet.seeds.of(asked), fleet.seeds.of(answering))
        info = msgspec.structs.replace(info, model=names.served(answering), prompt=prompt)
        policy = policy or router.proxy.context.policies.for_model(answering)
    policy = policy or router.proxy.context.policies.default
    owner = _owner(router, info)
    allowed = fleet.candidates(info.model, now)
    for _ in policy.prepare(allowed, info, now):
        yield
        now = trio.current_time()
        allowed = fleet.candidates(info.model, now)
    if owner is not None:
        allowed = choose((owner,), None, now, ())
    full = {server for server in allowed if server.at_cap}
    candidates = [server for server in allowed if server not in full] if full else allowed
    ranking = None
    if candidates:
        # As for a request: policies recognise the candidates by their identity, and measuring a
        # thousand anew takes 3 ms, here and with the next request.
        skips_full = full and policy.skips_full(allowed)
        ranking = _rank(policy, allowed if skips_full else candidates, info, now)
        next(ranking)
    figures, chosen = _Figures(fleet.all_servers()), set(candidates)
    out = [
        (server, _why_out(server, info.model, now, owner))
        for server in figures.servers
        if server not in chosen
    ]
    if info.previous is not None:
        note = because("owner_known", server=owner.name) if owner else because("owner_unknown")
    elif candidates:
        note = _note(candidates, now)
    else:
        note = _none_free(allowed, info, router)
    would_wait = not candidates and _may_wait(router, info)
    yield
    picked, ranked = (yield from ranking) if ranking is not None else (None, [])
    ranked = [one for one in ranked if one.server in chosen]
    # Other policies consider more than the score.
    if candidates and note is NONE and policy.name in ("adaptive", "least_load"):
        equals = sum(row.score == ranked[0].score for row in ranked)
        if equals > 1:
            note = because("equal_servers", n=equals)
    page: dict[str, Any] = {
        "model": asked,
        "served_model": info.model,
        "stream": info.stream,
        "session": info.session,
        "session_source": info.session_source or None,
        "model_known": info.model is None or fleet.knows(info.model),
        "policy": policy.name,
        "formula": policy.formula(),
        "owner": owner.name if owner is not None else None,
        "picked": picked.name if picked is not None else None,
        "would_wait": would_wait,
        **reason_fields(note, "note"),
    }
    page["candidates"] = yield from each(
        ranked, lambda one: encoded(_explained_row(figures.row(one.server), one))
    )
    page["out"] = yield from each(
        out, lambda one: encoded({**figures.row(one[0]), **_why_fields(*one, now)})
    )
    return page


def _owner(router: Router, info: RoutingInfo) -> Server | None:
    """The server of the stored response that the request continues, if the router knows it."""
    if info.previous is None:
        return None
    known = router.proxy.context.owners.find(info.previous)
    if known is None:
        return None
    return next((s for s in router.fleet.all_servers() if s.url == known.url), None)


def policy_of(router: Router, fields: Mapping[str, str]) -> Policy | None:
    """The policy that the request names. Raises Refused if the client may not choose one."""
    name = fields.get("x-router-policy")
    given = {} if name is None else {b"x-router-policy": name.encode("latin-1", "replace")}
    return wanted_policy(router.proxy.context.policies, given)


async def routing_info_of(
    router: Router, fields: Mapping[str, str], body: bytes, policy: Policy | None
) -> RoutingInfo:
    """The routing information of a request with this body, for `policy` or the configured ones.

    Raises Refused for a body that cannot be read.
    """
    read = policy or router.proxy.context.policies
    content_type = fields.get("content-type", "").encode("latin-1")
    context = router.proxy.context
    session = None
    if read.needs_session:
        headers = {name.encode("latin-1"): text.encode("latin-1") for name, text in fields.items()}
        session = session_hint(headers, context.settings.session_sources)
    about = (EXPLAIN, content_type, body, session)
    wanted, seeds = read.needs_prompt, router.fleet.seeds.of
    info = read_at_once(*about, with_prompt=wanted, shortest=SHORT, seeds=seeds)
    if info is not None:
        return info
    steps = read_in_slices(*about, with_prompt=wanted, shortest=SHORT, seeds=seeds)
    try:
        return (await in_slices(steps, context.body_turns)).info
    except InvalidBody as error:
        values = {"problem": str(error)}
        raise Refused(400, "invalid_body", str(error), values=values) from None


class _Ranked(NamedTuple):
    """A candidate; `score` is None if the policy has none."""

    server: Server
    score: float | None
    parts: Mapping[str, float]


_Ranking = tuple[Server | None, list[_Ranked]]
"""The choice, and all candidates with their scores."""


def _rank(
    policy: Policy, candidates: Sequence[Server], info: RoutingInfo, now: float
) -> Steps[_Ranking]:
    """The ranking; all that may change meanwhile is read before the first step."""
    explained = yield from policy.explain_in_steps(candidates, info, now)
    if explained is None:
        # Choosing may change the state of such a policy (round robin): use a copy.
        picked, _ = copy.copy(policy).pick(candidates, info, now)
        by_load = sorted(candidates, key=lambda server: server.load_estimate.effective)
        yield
        return picked, [_Ranked(server, None, {}) for server in by_load]
    yield
    ranked = yield from each(explained, lambda one: _Ranked(*one), RANKED_AT_ONCE)
    return ranked[0].server, ranked


class _Figures:
    """The figures of servers that change with requests and scrapes, copied at one moment."""

    def __init__(self, servers: Sequence[Server]) -> None:
        loads = [server.load_estimate for server in servers]
        self.servers = servers
        self._places = {server: place for place, server in enumerate(servers)}
        self._running = [load.running for load in loads]
        self._waiting = [load.waiting for load in loads]
        self._leases = [server.in_flight for server in servers]
        self._load = [load.value for load in loads]
        self._fresh = [load.fresh for load in loads]

    def row(self, server: Server) -> dict[str, Any]:
        """The load of the server and its components."""
        place = self._places[server]
        return {
            "server": server.name,
            "load": round(self._load[place], 4),
            "running": self._running[place],
            "waiting": self._waiting[place],
            "leases": self._leases[place],
            "capacity": server.capacity,
            "capacity_source": server.capacity_estimate.source,
            "max_in_flight": server.config.max_in_flight,
            "metrics_fresh": self._fresh[place],
        }


def _explained_row(figures: dict[str, Any], ranked: _Ranked) -> dict[str, Any]:
    return {**figures, "score": ranked.score, "parts": dict(ranked.parts)}


def _note(candidates: Sequence[Server], now: float) -> Reason:
    """The note on a special choice; NONE for a normal one."""
    if not any(server.passive_health.admits(now) for server in candidates):
        return because("all_ejected")
    if all(now < server.backoff_until for server in candidates):
        return because("all_full")
    if any(server.models is None for server in candidates):
        return because("lists_unread")
    refusing = [one for one in candidates if one.refusals.known and one.refusals.count()]
    if refusing:
        avoided = because("refuser_avoided", server=refusing[0].name)
        return avoided.and_also(refusing[0].refusals.reason())
    return NONE


def _none_free(allowed: Sequence[Server], info: RoutingInfo, router: Router) -> Reason:
    """Why no server is chosen, and what happens to the request."""
    model, admission = info.model, router.proxy.context.admission
    if not allowed and model is not None and not router.fleet.knows(model):
        return because("model_unknown", model=repr(model))
    why = "capped" if allowed else "none"
    if admission is None or not _may_wait(router, info):
        return because(f"{why}_refused")
    return because(f"{why}_waits", n=admission.ahead(model, info.priority)[0])


def _may_wait(router: Router, info: RoutingInfo) -> bool:
    """True if the request could wait for a server."""
    admission, model = router.proxy.context.admission, info.model
    if admission is None:
        return False
    busy = bool(router.fleet.candidates(model, trio.current_time()))
    return (busy or model is None or router.fleet.knows(model)) and admission.ahead(model)[1]


_OTHER_OWNER, _NOT_LISTED = because("other_owner"), because("not_listed")
_LIST_UNREAD = because("list_unread")


def _why_out(
    server: Server, model: str | None, now: float, owner: Server | None
) -> tuple[State, Reason] | None:
    """The state of a server that is no candidate, and why it is none; None: it lacks the model.

    Then its state is no reason and can be read later: a thousand states take 3 ms.
    """
    models = server.catalog.names
    if owner is None and model is not None and models is not None and model not in models:
        return None
    state, reason = server.current_state(now)
    if owner is not None and server is not owner:
        reason = _OTHER_OWNER
    elif model is not None and models is not None and model not in models:
        reason = _NOT_LISTED
    elif state is State.EJECTED:
        left = server.passive_health.until - now
        reason = reason.and_also(_in("trial_in", left) if left > 0 else because("trial_runs"))
    elif state is State.SILENT:
        left = server.silence.until - now
        reason = reason.and_also(_in("trial_in", left) if left > 0 else because("trial_due"))
    elif state is State.REFUSING:
        moments = [moment - now for moment in server.refusals.moments() if moment > now]
        reason = reason.and_also(_in("tried_in", min(moments)) if moments else because("tried_now"))
    elif state is State.FULL:
        reason = reason.and_also(_in("tried_in", server.backoff_until - now))
    elif state is State.UP and server.at_cap:
        most = server.config.max_in_flight
        reason = because("at_max_in_flight", n=server.in_flight, most=most)
    elif state is State.UP and model is not None:
        reason = _LIST_UNREAD
    return state, reason


def _why_fields(server: Server, why: tuple[State, Reason] | None, now: float) -> dict[str, Any]:
    state, reason = why or (server.current_state(now)[0], _NOT_LISTED)
    return {"state": state, **reason_fields(reason)}


def _in(code: str, seconds: float) -> Reason:
    return because(code, seconds=f"{seconds:.1f}")
