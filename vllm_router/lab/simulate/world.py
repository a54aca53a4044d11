"""Clients, routers and engines on one clock.

Each router has its own fleet, metrics and policy, as it would have in its own process; the servers
are the product's `Server` objects, leased, scraped and failed as the proxy and the probes do it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.model_seeds import seed_of_name
from vllm_router.fleet.server import Lease, Server
from vllm_router.lab.simulate.engine import Engine, Job
from vllm_router.lab.simulate.scene import NONE, PROMPTS_QUEUED, Scene
from vllm_router.lab.simulate.sharing import Sharing
from vllm_router.lab.simulate.text import TOKEN_BYTES, Text
from vllm_router.lab.simulate.traffic import BASE_MODEL, Conversation, Turn, adapter_name
from vllm_router.routing.policies.base import Policy
from vllm_router.routing.prompt.blocks import Prompt, reseeded
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.queue.session_leases import SessionLeases

MAX_ATTEMPTS = 4
SESSION_CHECK = 0.5
"""Seconds between two looks at whether a waiting new session fits."""

FAIL_SECONDS = 0.005
"""Seconds until the error of a server that fails fast."""


@dataclass(slots=True, eq=False)
class Call:
    """One request, from the client's point of view. `server` is the last it was sent to."""

    conversation: Conversation
    text: Text
    arrived: float
    prompt_tokens: int
    output_tokens: int
    info: RoutingInfo
    router: Router
    server: int = -1
    attempts: int = 0
    cached: int = 0
    first_at: float = math.inf
    ended_at: float = math.inf
    failed: bool = False
    lease: Lease | None = None
    tried: tuple[Server, ...] = ()


class Router:
    """One router's view of the servers."""

    def __init__(self, scene: Scene, policy: Policy) -> None:
        settings = Settings(metrics_interval=scene.scrape_interval)
        self.fleet = Fleet(
            Config(
                servers=tuple(
                    ServerConfig(
                        url=f"http://server-{n}:8000",
                        name=f"server-{n}",
                        max_concurrent_requests=scene.configured_capacity(n),
                    )
                    for n in range(len(scene.speeds))
                ),
                settings=settings,
            )
        )
        self.policy = policy
        self.sessions = SessionLeases(scene.session_idle) if scene.session_idle else None
        self.new_sessions: deque[Call] = deque()
        """Requests that begin a session and do not fit yet, with `session_idle`."""
        self.servers = tuple(self.fleet.servers.values())
        self.place = {server: n for n, server in enumerate(self.servers)}
        for place, server in enumerate(self.servers):
            server.listed(_model_cards(scene, place), 0.0)
            self.mark(server, 0.0, up=place not in scene.joining)

    def mark(self, server: Server, now: float, *, up: bool) -> None:
        """Probes have found the server up, or down."""
        for _ in range(3):
            server.checked(Check.GOOD if up else Check.UNREACHABLE, 0.001, now)
        self.fleet.settle(now)


def _scattered(number: int) -> int:
    """32 bits that look random (Knuth's multiplicative hash)."""
    return number * 2654435761 % (1 << 32)


def _model_cards(scene: Scene, place: int) -> dict[str, dict[str, Any]]:
    """The server's `/v1/models`: the base model, and adapters with it as their parent."""
    cards: dict[str, dict[str, Any]] = {BASE_MODEL: {"id": BASE_MODEL, "object": "model"}}
    if place not in scene.without_adapters:
        for number in range(1, scene.adapters + 1):
            name = adapter_name(number)
            cards[name] = {"id": name, "object": "model", "parent": BASE_MODEL}
    return cards


class World:
    """Runs one scene to its end; `calls` are then the results."""

    def __init__(
        self,
        scene: Scene,
        conversations: Sequence[Conversation],
        make_policy: Callable[[Random], Policy],
        seed: int,
    ) -> None:
        self.scene = scene
        self.rng = rng = Random(seed)
        slow = dict(scene.slow)
        self.engines = [
            Engine(scene.hardware.faster(speed / slow.get(place, 1.0)))
            for place, speed in enumerate(scene.speeds)
        ]
        self.routers = [
            Router(scene, make_policy(Random(rng.random()))) for _ in range(scene.routers)
        ]
        self.places = {f"server-{place}": place for place in range(len(scene.speeds))}
        self.calls: list[Call] = []
        self.choosing: Job | None = None
        """The job for which a policy chooses a server now, for policies that know everything."""
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._ticket = itertools.count()
        self._down: set[int] = set(scene.joining)
        for conversation in conversations:
            self._next_turn(conversation, conversation.start, first=True)
        for router in self.routers:
            interval = getattr(router.policy, "scrape_interval", scene.scrape_interval)
            for place in range(len(scene.speeds)):
                self._at(rng.random() * interval, self._scrape, router, place, interval)
        if scene.share != NONE and scene.routers > 1:
            sharing = Sharing(self.routers, queued=scene.share == PROMPTS_QUEUED)
            for number in range(scene.routers):
                phase = number / scene.routers * scene.share_period
                self._at(phase, self._publish, sharing, number)
        if scene.session_idle:
            for router in self.routers:
                self._at(SESSION_CHECK, self._look_for_idle_sessions, router)
        for place in scene.restarting:
            self._at(scene.failing_from, self._go_down, place)
        for place in scene.joining:
            self._at(scene.joining_at, self._come_up, place)
        for place in scene.draining:
            self._at(scene.draining_at, self._drain, place)
        for router in self.routers:
            watch = getattr(router.policy, "watch", None)
            if watch is not None:
                watch(self)

    def run(self, progress: Callable[[float], None] | None = None) -> World:
        """Run until all traffic is answered or has timed out."""
        end = self.scene.seconds + self.scene.patience
        events, shown = self._events, 0.0
        while events and events[0][0] <= end:
            self.now, _, act, arguments = heapq.heappop(events)
            if self.now > self.scene.seconds and not self._open:
                break
            act(*arguments)
            if progress is not None and self.now >= shown + 1.0:
                progress(self.now - shown)
                shown = self.now
        return self

    _open = 0

    def _at(self, time: float, act: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (time, next(self._ticket), act, arguments))

    # -- clients ------------------------------------------------------------------------------

    def _next_turn(self, conversation: Conversation, now: float, *, first: bool = False) -> None:
        turn = next(conversation.turns, None)
        if turn is None:
            return
        at = now if first else now + turn.pause
        if at < self.scene.seconds:
            self._at(at, self._ask, conversation, turn)

    def _ask(self, conversation: Conversation, turn: Turn) -> None:
        if turn.begins is not None:
            conversation.begin(turn.begins)
        text = conversation.text
        conversation.count += 1
        text.add(hash((conversation.number, conversation.count, 1)), turn.added)
        prompt = text.length
        text.add(hash((conversation.number, conversation.count, 2)), turn.output)
        model = adapter_name(conversation.adapter) if conversation.adapter else BASE_MODEL
        info = RoutingInfo(
            model,
            self.rng.random() >= self.scene.plain and conversation.stream,
            session=conversation.session,
            prompt=reseeded(
                Prompt(
                    text.chain(prompt),
                    prompt * TOKEN_BYTES,
                    None,
                    conversation.shared * TOKEN_BYTES,
                    conversation.earlier * TOKEN_BYTES,
                    _scattered(conversation.number),
                ),
                0,
                seed_of_name(model) if conversation.adapter else 0,
            ),
        )
        conversation.earlier = prompt
        if self.scene.sticky:
            router = self.routers[_scattered(conversation.number) % len(self.routers)]
        else:
            router = self.rng.choice(self.routers)
        call = Call(conversation, text, self.now, prompt, turn.output, info, router)
        self.calls.append(call)
        self._open += 1
        self._send(call)

    def _done(self, call: Call) -> None:
        self._open -= 1
        call.ended_at = self.now
        if not call.failed:
            self._next_turn(call.conversation, self.now)

    # -- routers ------------------------------------------------------------------------------

    def _send(self, call: Call) -> None:
        router, now = call.router, self.now
        fleet = router.fleet
        model = call.info.model
        if call.tried:
            self._send_to(call, fleet.others(model, now, call.tried))
        elif router.sessions is not None and router.sessions.is_new(call.info):
            router.new_sessions.append(call)
            self._admit(router)
        else:
            self._send_to(call, fleet.candidates(model, now))

    def _admit(self, router: Router) -> None:
        """Send the waiting new sessions that fit into a cache, in their order."""
        sessions, waiting = router.sessions, router.new_sessions
        while sessions is not None and waiting:
            info = waiting[0].info
            candidates = router.fleet.candidates(info.model, self.now)
            fitting = sessions.fitting(info, candidates, self.now)
            if not fitting:
                return
            self._send_to(waiting.popleft(), tuple(fitting))

    def _look_for_idle_sessions(self, router: Router) -> None:
        self._admit(router)
        self._at(self.now + SESSION_CHECK, self._look_for_idle_sessions, router)

    def _send_to(self, call: Call, candidates: Sequence[Server]) -> None:
        router, now = call.router, self.now
        if not candidates or call.attempts == MAX_ATTEMPTS:
            call.failed = True
            self._done(call)
            return
        # What the text has grown by since does not matter: a conversation waits for its answers.
        job = Job(
            call,
            call.text,
            call.prompt_tokens,
            call.output_tokens,
            now,
            call.conversation.adapter,
        )
        self.choosing = job
        server, note = router.policy.pick(candidates, call.info, now)
        call.lease = lease = server.lease(now)
        call.attempts += 1
        call.server = place = router.place[server]
        router.policy.leased(lease, note, call.info, now)
        if router.sessions is not None:
            router.sessions.begin(call.info, server, now)
        failing = place in self.scene.failing and now >= self.scene.failing_from
        if failing or place in self._down:
            self._at(now + FAIL_SECONDS, self._failed, call)
            return
        if self.engines[place].submit(job, now):
            self._at(self.engines[place].step_end, self._step, place)

    def _failed(self, call: Call) -> None:
        server = self._release(call, failed=True)
        server.failed(self.now, trial=call.lease is not None and call.lease.trial, jitter=1.0)
        call.tried = (*call.tried, server)
        self._send(call)

    def _release(self, call: Call, *, failed: bool) -> Server:
        lease = call.lease
        assert lease is not None
        lease.release()
        call.router.policy.ended(lease, self.now, failed=failed)
        if call.router.sessions is not None:
            call.router.sessions.end(call.info, self.now)
        return lease.server

    def _publish(self, sharing: Sharing, number: int) -> None:
        sharing.publish(number, self.now)
        self._at(self.now + self.scene.share_period, self._publish, sharing, number)

    def _scrape(self, router: Router, place: int, interval: float) -> None:
        server = router.servers[place]
        if place not in self._down:
            server.scraped(self.engines[place].metrics(), self.now, server.in_flight)
        router.fleet.settle(self.now)
        self._at(self.now + interval * (0.95 + 0.1 * self.rng.random()), self._scrape,
                 router, place, interval)  # fmt: skip

    # -- servers ------------------------------------------------------------------------------

    def _step(self, place: int) -> None:
        engine = self.engines[place]
        first, last = engine.finish_step()
        for job in first:
            call = job.owner
            assert isinstance(call, Call)
            call.first_at, call.cached = self.now, job.cached
            if call.info.stream and call.lease is not None:
                call.lease.last_byte_at = self.now
                call.router.policy.first_byte(call.lease)
        for job in last:
            call = job.owner
            assert isinstance(call, Call)
            lease = call.lease
            assert lease is not None
            call.router.policy.learned(lease, call.prompt_tokens, None)
            server = self._release(call, failed=False)
            server.answered(self.now, trial=lease.trial)
            self._done(call)
        if engine.step_end < math.inf:
            self._at(engine.step_end, self._step, place)

    def _go_down(self, place: int) -> None:
        """The server takes no more requests; it finishes the running ones, then restarts."""
        self._down.add(place)
        for router in self.routers:
            router.mark(router.servers[place], self.now, up=False)
        self._at(self.now + 5.0, self._come_up, place)

    def _drain(self, place: int) -> None:
        for router in self.routers:
            router.servers[place].drain(on=True)

    def _come_up(self, place: int) -> None:
        if self.engines[place].running:
            self._at(self.now + 0.5, self._come_up, place)
            return
        self._down.discard(place)
        self.engines[place].restart()
        for router in self.routers:
            router.mark(router.servers[place], self.now, up=True)
