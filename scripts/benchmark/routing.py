"""The command `scripts/bench-routing`: where requests go, on real processes.

Simulated servers (`vllm-router mock`) that batch, prefill at a rate and cache prefixes; before
them each contestant in turn, with the same conversations at the same times. Gaps are factors, so
they survive a shared machine; figures are of no use beyond the comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vllm_router.errors import RouterError
from vllm_router.http.client.pool import Pool

from .environment import ROOT, Environment, Skipped, say

GOOD_FIRST_TOKEN = 0.4
GOOD_TOKEN_TIME = 0.05
RUST = "vllm-router==0.1.17"

MOCK = (
    "--model", "m", "--ttft", "0", "--token-delay", "0.012", "--batch-slowdown", "0.05",
    "--prefill-tokens-per-second", "10000", "--max-num-batched-tokens", "1024",
    "--kv-blocks", "4096",
)  # fmt: skip

WORDS = [f"word{n}" for n in range(1000)]


@dataclass(frozen=True)
class Conversation:
    """Starts at `start` seconds; each turn is its pause, its text and the answer's tokens."""

    start: float
    system: str
    turns: tuple[tuple[float, str, int], ...]


@dataclass(frozen=True)
class Workload:
    says: str
    make: Callable[[random.Random, float], list[Conversation]]
    speeds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)


def text(rng: random.Random, tokens: int) -> str:
    """The mock counts four bytes as a token; a word and its space are about eight."""
    return " ".join(rng.choices(WORDS, k=max(1, tokens * 4 // 8)))


def multi_turn(rng: random.Random, seconds: float) -> list[Conversation]:
    systems = [text(rng, 1500) for _ in range(12)]
    made = []
    for at in starts(rng, 12.0, seconds):
        turns = [
            (rng.uniform(0.1, 0.5), text(rng, 80), rng.randint(8, 24))
            for _ in range(rng.randint(2, 5))
        ]
        made.append(Conversation(at, rng.choice(systems), tuple(turns)))
    return made


def chat(rate: float) -> Callable[[random.Random, float], list[Conversation]]:
    def make(rng: random.Random, seconds: float) -> list[Conversation]:
        return [
            Conversation(at, "", ((0.0, text(rng, rng.randint(50, 500)), rng.randint(8, 40)),))
            for at in starts(rng, rate, seconds)
        ]

    return make


def starts(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        yield now


WORKLOADS = {
    "multi-turn": Workload("conversations over 12 system prompts of 1500 tokens", multi_turn),
    "unequal": Workload("plain chat, one of four servers five times slower", chat(32.0),
                        (1.0, 1.0, 1.0, 0.2)),
    "chat": Workload("plain chat on four equal servers", chat(45.0)),
}  # fmt: skip

OURS = ("adaptive", "least_load")
RIVALS = ("cache_aware", "power_of_two", "round_robin")
CONTESTANTS = (*OURS, *(f"rust-{policy}" for policy in RIVALS))


# -- processes ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def process(arguments: Sequence[str], log: Path, **environ: str) -> Iterator[None]:
    with log.open("wb") as output:
        started = subprocess.Popen(
            list(arguments), stdout=output, stderr=output, start_new_session=True,
            env=os.environ | environ,
        )  # fmt: skip
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def await_port(port: int, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise Skipped(f"nothing listens on port {port}")


@contextlib.contextmanager
def servers(speeds: Sequence[float], folder: Path) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in speeds]
        for port, speed in zip(ports, speeds, strict=True):
            run = [sys.executable, "-m", "vllm_router.lab.mock", "--port", str(port), *MOCK]
            stack.enter_context(process([*run, "--speed", str(speed)], folder / f"mock-{port}.log"))
        for port in ports:
            await_port(port)
        yield [f"http://127.0.0.1:{port}" for port in ports]


@contextlib.contextmanager
def contestant(name: str, urls: Sequence[str], folder: Path, rust: Path | None) -> Iterator[str]:
    """The router's URL, once it answers."""
    port, other = free_port(), free_port()
    log = folder / f"{name}.log"
    if name.startswith("rust-"):
        if rust is None:
            raise Skipped("the Rust router is not installed")
        command = [
            str(rust), "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(other),
            "--worker-startup-check-interval", "1", "--policy", name.removeprefix("rust-"),
            "--worker-urls", *urls,
        ]  # fmt: skip
        environ = {"PYTHONPATH": ""}
    else:
        file = folder / f"{name}.toml"
        listed = [f'{{ url = "{url}", max_concurrent_requests = 16 }},' for url in urls]
        file.write_text(
            "\n".join(["[servers]", "servers = [", *listed, "]", "[config]", f'policy = "{name}"'])
        )
        command = [sys.executable, "-m", "vllm_router", "run", "--console", "--config", str(file)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        environ = {}
    with process(command, log, **environ):
        await_port(port)
        yield f"http://127.0.0.1:{port}"


# -- clients -----------------------------------------------------------------------------------


@dataclass
class Results:
    """Seconds. An answer that failed has no times."""

    firsts: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    good: int = 0
    asked: int = 0
    failed: int = 0


class Clients:
    """Run the conversations, each turn after the response to the previous one."""

    def __init__(self, url: str, warm_up: float) -> None:
        self._pool = Pool(url)
        self._host = url.removeprefix("http://").encode()
        self._warm_up = warm_up
        self._began = 0.0
        self.results = Results()

    async def run(self, conversations: Sequence[Conversation]) -> Results:
        await self._wait_until_served()
        self._began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for conversation in conversations:
                nursery.start_soon(self._converse, conversation)
        self._pool.close()
        return self.results

    async def _wait_until_served(self) -> None:
        body = self._body([{"role": "user", "content": "ready?"}], 1)
        with trio.move_on_after(30) as patience:
            while True:
                with contextlib.suppress(RouterError):
                    if await self._ask(body) is not None:
                        break
                await trio.sleep(0.2)
        if patience.cancelled_caught:
            raise Skipped("it serves nothing")

    async def _converse(self, conversation: Conversation) -> None:
        await trio.sleep_until(self._began + conversation.start)
        messages: list[dict[str, str]] = []
        if conversation.system:
            messages.append({"role": "system", "content": conversation.system})
        for turn, (pause, said, tokens) in enumerate(conversation.turns):
            if turn:
                await trio.sleep(pause)
            messages.append({"role": "user", "content": said})
            asked_at = trio.current_time()
            counted = asked_at - self._began >= self._warm_up
            self.results.asked += counted
            answer = None
            with trio.move_on_after(30):
                with contextlib.suppress(RouterError):
                    answer = await self._ask(self._body(messages, tokens))
            if answer is None:
                self.results.failed += counted
                return
            first, last, content = answer
            messages.append({"role": "assistant", "content": content})
            if counted:
                each = (last - first) / max(1, tokens - 1)
                self.results.firsts.append(first - asked_at)
                self.results.tokens.append(each)
                self.results.good += (
                    first - asked_at <= GOOD_FIRST_TOKEN and each <= GOOD_TOKEN_TIME
                )

    @staticmethod
    def _body(messages: Sequence[dict[str, str]], tokens: int) -> bytes:
        return json.dumps(
            {"model": "m", "messages": messages, "stream": True, "max_tokens": tokens,
             "ignore_eos": True}
        ).encode()  # fmt: skip

    async def _ask(self, body: bytes) -> tuple[float, float, str] | None:
        """The times of the first and the last token, and the response; None if it was refused."""
        pool = self._pool
        connection = pool.take_idle(trio.current_time()) or await pool.open(trio.current_time())
        try:
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: " + self._host
                + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            )  # fmt: skip
            await connection.send(head, body)
            answer = await connection.read_head()
            first = last = 0.0
            parts = []
            while piece := await connection.read_body():
                parts.append(piece)
                if b'"content":"' in piece or b'"content": "' in piece:
                    last = trio.current_time()
                    # The first event of a stream names the role and comes with no token.
                    if not first and _has_words(piece):
                        first = last
            if answer.status != 200 or not first:
                return None
            return first, last, _content(b"".join(parts))
        finally:
            pool.give_back(connection, trio.current_time())


def _has_words(piece: bytes) -> bool:
    return bool(_content(piece))


def _content(stream: bytes) -> str:
    words = []
    for line in stream.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                choices = json.loads(line[6:])["choices"]
            except (ValueError, KeyError):
                continue  # cut by a read: the whole is read again at the end
            words += [choice["delta"].get("content") or "" for choice in choices]
    return "".join(words)


# -- the comparison ----------------------------------------------------------------------------


def measure(
    name: str, workload: Workload, seconds: float, seed: int, folder: Path, rust: Path | None
) -> Results:
    conversations = workload.make(random.Random(seed), seconds)
    with servers(workload.speeds, folder) as urls, contestant(name, urls, folder, rust) as url:
        return trio.run(Clients(url, seconds / 4).run, conversations)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def row(workload: str, name: str, found: Results) -> str:
    cells = [
        workload,
        name,
        f"{1000 * percentile(found.firsts, 0.5):.0f} ms",
        f"{1000 * percentile(found.firsts, 0.99):.0f} ms",
        f"{1000 * percentile(found.tokens, 0.5):.1f} ms",
        f"{found.good / max(1, found.asked):.1%}",
        f"{found.asked}",
        f"{found.failed}",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench-routing", description=__doc__)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), metavar="A,B")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="X,Y")
    parser.add_argument("--seconds", type=float, default=7.0, help="of traffic per run (7)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rust", type=Path, help="the Rust router, if it is installed elsewhere")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    names, workloads = given.contestants.split(","), given.workloads.split(",")
    for name, known in ((names, CONTESTANTS), (workloads, tuple(WORKLOADS))):
        if unknown := set(name) - set(known):
            say(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
            return 2
    rust: Path | None = given.rust
    if rust is None and any(name.startswith("rust-") for name in names):
        try:
            rust = Environment(ROOT / ".bench").venv("rust", RUST).with_name("vllm-router")
        except Skipped as skipped:
            say(f"without the Rust router: {skipped}")
    print("| workload | router | TTFT p50 | p99 | TPOT p50 | goodput | requests | failed |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for workload in workloads:
            for name in names:
                say(f"{workload}: {name}")
                try:
                    found = measure(
                        name, WORKLOADS[workload], given.seconds, given.seed, Path(folder), rust
                    )
                except Skipped as skipped:
                    say(f"{workload}: {name}: left out, {skipped}")
                    continue
                print(row(workload, name, found), flush=True)
    print(
        f"\nGoodput: first token within {1000 * GOOD_FIRST_TOKEN:.0f} ms and "
        f"{1000 * GOOD_TOKEN_TIME:.0f} ms per token. " + "; ".join(
            f"{name}: {WORKLOADS[name].says}" for name in workloads
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
