"""Any sequence of events in the admission queue, compared with a plain list as a model.

Requests arrive, with or without a fallback model, are served, fail and return, disconnect, and are
displaced; servers go down, come back, change their caps and their models.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_router.routing.queue.entry import OfferResult, QueueEntry, Route
from vllm_router.routing.queue.waiting_queue import WaitingQueue

SERVERS = {"a": "xy", "b": "x", "c": "z", "d": "yz"}
"""Servers by name, and the models that each has at first."""

FALLBACK = {"x": "z"}
"""The model that stands in for another, for requests that say so."""

QUEUE_SIZE = 5


class Request(QueueEntry):
    """A waiter, with the state that the model keeps of it."""

    falls_back = False
    tried: frozenset[str] = frozenset()


class Overload(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue: WaitingQueue[Request] = WaitingQueue()
        self.models = dict(SERVERS)
        self.caps = dict.fromkeys(SERVERS, 1)
        self.up = set(SERVERS)
        self.running: list[tuple[str, Request]] = []
        self.waiting: list[Request] = []
        self.passed: defaultdict[Request, Counter[tuple[str, Route]]] = defaultdict(Counter)
        self.come = self.gone = 0
        self.now = 1.0

    # -- what the router knows ----------------------------------------------------------------

    def candidates(self, one: Request) -> list[str]:
        """The servers available now, as an exchange chooses them."""
        for model in (one.model, *([FALLBACK[one.model]] if one.falls_back else [])):
            found = [
                name
                for name, models in self.models.items()
                if model in models and name in self.up and name not in one.tried
            ]
            if found:
                return found
        return []

    def route(self, one: Request) -> Route:
        models = one.model + (FALLBACK[one.model] if one.falls_back else "")
        servers = {name for name, there in self.models.items() if set(there) & set(models)}
        more = (one.model if one.falls_back else None, one.tried)
        return Route(frozenset(servers - one.tried), more)

    def free(self, one: Request) -> list[str]:
        running = Counter(name for name, _ in self.running)
        return [name for name in self.candidates(one) if running[name] < self.caps[name]]

    # -- admission ----------------------------------------------------------------------------

    def give(self, one: Request) -> OfferResult:
        free = self.free(one)
        if not free:
            return OfferResult.BLOCKED
        one.server = free[0]
        self.check_order(one)
        self.waiting.remove(one)
        self.running.append((free[0], one))
        return OfferResult.SERVED

    def check_order(self, served: Request) -> None:
        """Check that no waiting request was entitled to the server instead."""
        for other in self.waiting:
            if (other.key, other.priority) == (served.key, served.priority) and (
                served.server in other.route.servers
            ):
                self.passed[other].clear()  # its key has a turn now
            if other is served or served.server not in self.candidates(other):
                continue
            mine, its = (
                (served.priority, not served.returning),
                (other.priority, not other.returning),
            )
            assert mine <= its, "a request went before its betters"
            if mine != its:
                continue
            if (other.key, other.route) == (served.key, served.route) or served.returning:
                assert served.number < other.number or served.route != other.route, "overtaken"
            elif other.key != served.key and self.is_first(other):
                turns = self.passed[other]
                turns[served.key, served.route] += 1
                assert turns[served.key, served.route] <= 1, f"two turns in a row: {served.key}"

    def is_first(self, one: Request) -> bool:
        """Whether no earlier request of the same key waits for the same model."""
        alike = (one.key, one.route, one.priority, one.returning)
        return not any(
            (other.key, other.route, other.priority, other.returning) == alike
            and other.number < one.number
            for other in self.waiting
        )

    def admit(self) -> None:
        self.now += 1.0
        before = len(self.running)
        admitted = self.queue.admit(self.now, self.give)
        assert admitted == [one for _, one in self.running[before:]]

    # -- events -------------------------------------------------------------------------------

    @rule(
        model=st.sampled_from("xxyz"),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        keys=st.lists(st.sampled_from("pqr"), min_size=1, max_size=5),
        falls_back=st.booleans(),
    )
    def arrive(self, model: str, priority: int, keys: list[str], falls_back: bool) -> None:
        for key in keys:
            self.arrive_one(model, priority, key, falls_back)

    def arrive_one(self, model: str, priority: int, key: str, falls_back: bool) -> None:
        self.come += 1
        self.now += 0.001
        one = Request(model, priority, key, self.now, 1e9)
        one.falls_back = falls_back and model in FALLBACK
        one.route = self.route(one)
        free = self.free(one)
        if free:  # else a waiting request could use the server, too, and would have it
            self.running.append((free[0], one))
            return
        queue = self.queue.model_queue(model)
        if queue.waiting >= QUEUE_SIZE:
            last = queue.displaced_by(priority, key)
            self.check_displaced(one, last)
            self.gone += 1
            if last is None:
                return
            self.waiting.remove(last)
            self.queue.leave(last, self.now)
        self.waiting.append(one)
        self.queue.join(one)

    def check_displaced(self, newcomer: Request, last: Request | None) -> None:
        new = [one for one in self.waiting if one.model == newcomer.model and not one.returning]
        worst = max(one.priority for one in new)
        counts = Counter(one.key for one in new if one.priority == worst)
        fair = counts[newcomer.key] + 1 if newcomer.priority == worst else 0
        if newcomer.priority > worst or (
            newcomer.priority == worst and max(counts.values()) <= fair
        ):
            assert last is None
            return
        assert last is not None
        assert last.priority == worst
        assert counts[last.key] == max(counts.values())
        mine = [one for one in new if (one.key, one.priority) == (last.key, worst)]
        assert last is mine[-1]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.gone += 1
        self.admit()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def client_leaves_or_deadline_comes(self, data: st.DataObject) -> None:
        one = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.queue.leave(one, self.now)
        self.gone += 1

    @rule(name=st.sampled_from("abcd"))
    def server_dies(self, name: str) -> None:
        """Its requests return and may not be sent there again."""
        self.up.discard(name)
        lost = [one for server, one in self.running if server == name]
        self.running = [pair for pair in self.running if pair[0] != name]
        for old in lost:
            self.now += 0.001
            one = Request(old.model, old.priority, old.key, self.now, 1e9, returning=True)
            one.falls_back, one.tried = old.falls_back, old.tried | {name}
            one.route = self.route(one)
            self.waiting.append(one)
            self.queue.join(one)
        self.admit()

    @rule(name=st.sampled_from("abcd"))
    def server_comes_back(self, name: str) -> None:
        self.up.add(name)
        self.admit()

    @rule(name=st.sampled_from("abcd"), cap=st.integers(0, 4))
    def cap_changes(self, name: str, cap: int) -> None:
        self.caps[name] = cap
        self.admit()

    @rule(name=st.sampled_from("abcd"), models=st.sampled_from(["", "x", "xy", "z", "yz"]))
    def models_change(self, name: str, models: str) -> None:
        self.models[name] = models
        for one in self.waiting:
            route = self.route(one)
            if route != one.route:
                self.queue.move(one, one.model, route, self.now)
        self.passed.clear()
        self.admit()

    # -- what always holds --------------------------------------------------------------------

    @invariant()
    def no_request_is_lost(self) -> None:
        assert self.come == len(self.running) + len(self.waiting) + self.gone
        numbers = sorted(one.number for one in self.waiting)
        assert (
            sorted(o.number for queue in self.queue.model_queues.values() for o in queue) == numbers
        )
        pools = self.queue.route_queues.values()
        assert sorted(o.number for pool in pools for o in pool) == numbers
        assert len(self.queue) == len(numbers)
        assert all(self.queue.route_queues.values()), "an empty pool is kept"

    @invariant()
    def no_request_waits_beside_a_free_server(self) -> None:
        assert not any(self.free(one) for one in self.waiting)

    @invariant()
    def no_room_is_too_full(self) -> None:
        for queue in self.queue.model_queues.values():
            new = [one for one in self.waiting if one.model == queue.model and not one.returning]
            assert queue.waiting == len(new) <= QUEUE_SIZE
            assert len(queue) == sum(one.model == queue.model for one in self.waiting)


TestOverload = Overload.TestCase
TestOverload.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking would take minutes
)
