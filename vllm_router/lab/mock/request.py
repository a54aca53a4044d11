"""One request inside a simulated engine, and the words it gets."""

from __future__ import annotations

from typing import Protocol

from vllm_router.lab.mock.text import WORD_BYTES, next_state, seed_of, token_count


class Sink(Protocol):
    """Receives a request's words once per engine step; the last step sets its `finish_reason`."""

    def deliver(self, words: list[bytes]) -> None: ...


class Request:
    """`limit` tokens are generated, then `ending` ("length" or "stop") is the finish reason, unless
    one of `stops` comes first. `ttft` and `delay` (seconds) replace the engine's own times. A
    `silent` one ends with its first token, which has no text: the model has nothing to say.

    The times are those given to the engine; `sink` is not used by it.
    """

    __slots__ = (
        "_answer",
        "_state",
        "aborted",
        "admitted",
        "arrived",
        "cached_tokens",
        "chain",
        "created_tokens",
        "delay",
        "ending",
        "finish_reason",
        "first_token",
        "generated",
        "joins",
        "last_token",
        "limit",
        "model",
        "preempted",
        "prefill_left",
        "private",
        "prompt",
        "prompt_tokens",
        "silent",
        "sink",
        "stop_reason",
        "stops",
        "ticket",
        "ttft",
        "words",
    )

    def __init__(
        self,
        *,
        model: str,
        prompt: bytes,
        limit: int,
        ending: str = "length",
        seed: int | None = None,
        stops: tuple[bytes, ...] = (),
        ttft: float | None = None,
        delay: float | None = None,
        silent: bool = False,
        answer: tuple[bytes, ...] = (),
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.prompt_tokens = max(1, token_count(prompt))
        self.limit = limit
        self.ending = ending
        self.stops = stops
        self.ttft = ttft
        self.delay = delay
        self.silent = silent
        self._answer = answer
        self.sink: Sink | None = None

        self.words: list[bytes] = []
        self.generated = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None
        self.aborted = False

        self.arrived = self.admitted = self.last_token = 0.0
        self.first_token: float | None = None
        self.chain: list[int] = []
        self.private = 0
        self.prefill_left = 0
        self.cached_tokens = 0
        self.created_tokens = 0
        self.preempted = 0
        self.joins = False
        self.ticket = 0
        self._state = seed_of(model, prompt, seed)

    @property
    def text(self) -> str:
        return b"".join(self.words).decode()

    def take(self, count: int) -> list[bytes]:
        """Generate up to `count` more words; sets `finish_reason` at the end."""
        if self.silent:
            self.generated, self.finish_reason = 1, "stop"
            return []
        count = min(count, self.limit - self.generated)
        if self._answer:
            first = self.generated
            words = [self._answer[n % len(self._answer)] for n in range(first, first + count)]
        else:
            words = self._next_words(count)
        self.generated += len(words)
        if self.stops:
            return self._until_stop(words)
        self.words += words
        if self.generated >= self.limit:
            self.finish_reason = self.ending
        return words

    def _next_words(self, count: int) -> list[bytes]:
        state = self._state
        words = []
        for _ in range(count):
            state = next_state(state)
            words.append(WORD_BYTES[state >> 56])
        self._state = state
        return words

    def _until_stop(self, words: list[bytes]) -> list[bytes]:
        """Like vLLM, the stop string itself is not part of the answer; unlike vLLM, a stop string
        that spans words may have been sent in part before it was recognised.
        """
        longest = max(len(stop) for stop in self.stops)
        for index, word in enumerate(words):
            before = b"".join(self.words)[-longest:]
            text = before + word
            for stop in self.stops:
                found = text.find(stop)
                if found >= 0:
                    self.generated -= len(words) - index - 1
                    kept = text[len(before) : max(found, len(before))]
                    self.words.append(kept)
                    self.finish_reason, self.stop_reason = "stop", stop.decode()
                    return [*words[:index], kept]
            self.words.append(word)
        if self.generated >= self.limit:
            self.finish_reason = self.ending
        return words
