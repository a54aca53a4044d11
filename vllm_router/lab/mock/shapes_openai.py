"""The JSON of chat and text completions, field by field in the order of a real vLLM 0.32."""

from __future__ import annotations

from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.shapes import DONE, BaseShape, chunk, encode, error_event, fingerprint


class OpenAIShape(BaseShape):
    """Common part of chat and text completions: fast frames for words of known length."""

    done = True
    comments = True
    _object = b""
    _before = b""
    _after = b""
    _after_last = b""

    def __init__(
        self,
        request: Request,
        identity: str,
        created: int,
        *,
        details: bool = False,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        super().__init__(request, identity, created, details)
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            encode(identity),
            self._object,
            created,
            encode(request.model),
        )
        tail = b"}\n\n\r\n"
        frame = len(self._head) + len(self._before) + 4 + len(self._after) + len(tail) - 2
        self._word_head = b"%x\r\n%b%b" % (frame, self._head, self._before)
        self._word_tail = self._after + tail

    def _event(self, choices: bytes, more: bytes = b"") -> bytes:
        return chunk(b"%b%b%b}\n\n" % (self._head, choices, more))

    def _usage_so_far(self, generated: int) -> bytes:
        if not self._continuous:
            return b""
        prompt = self.request.prompt_tokens
        return (
            b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,'
            b'"completion_tokens_details":null}' % (prompt, prompt + generated, generated)
        )

    def opening(self) -> list[bytes]:
        return []

    def delta(self, words: list[bytes], *, last: bool) -> list[bytes]:
        """The words' events; at the end of the answer, the last carries the finish reason. An
        output without a token, as of a request that is aborted while it waits, has no event:
        vLLM takes it for a part of the prefill.
        """
        if not self.request.generated:
            return []
        ending = None
        if last:
            ending = words[-1] if words else b""
            words = words[:-1]
        if self._continuous:
            first = self.request.generated - len(words) + (ending is None)
            events = [
                self._event(self._before + word + self._after, self._usage_so_far(first + number))
                for number, word in enumerate(words)
            ]
        else:
            head, tail = self._word_head, self._word_tail
            events = [head + word + tail for word in words]
        if ending is not None:
            events.append(self._last(ending))
        return events

    def failed(self, error: ApiError) -> list[bytes]:
        return [error_event(error), DONE]

    def _last(self, word: bytes) -> bytes:
        request = self.request
        reasons = encode(request.finish_reason), encode(request.stop_reason)
        choice = self._before + word + self._after_last % reasons
        more = self._usage_so_far(request.generated)
        if not self._include_usage:
            more += b',"system_fingerprint":"%b"' % fingerprint(request.model).encode()
        return self._event(choice, more)

    def closing(self) -> list[bytes]:
        if not self._include_usage:
            return []
        more = b',"usage":%b,"system_fingerprint":"%b"' % (
            encode(self.final_usage()),
            fingerprint(self.request.model).encode(),
        )
        return [self._event(b"]", more)]


class ChatShape(OpenAIShape):
    _object = b"chat.completion.chunk"
    _before = b'{"index":0,"delta":{"content":"'
    _after = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]'
    _after_last = b'"},"logprobs":null,"finish_reason":%b,"stop_reason":%b,"token_ids":null}]'

    def opening(self) -> list[bytes]:
        choice = (
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]'
        )
        return [
            self._event(
                choice, self._usage_so_far(0) + b',"prompt_token_ids":null,"prompt_text":null'
            )
        ]

    def whole(self) -> bytes:
        request = self.request
        return encode(
            {
                "id": self.identity,
                "object": "chat.completion",
                "created": self.created,
                "model": request.model,
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "role": "assistant",
                            "content": request.text,
                            "refusal": None,
                            "annotations": None,
                            "audio": None,
                            "function_call": None,
                            "reasoning": None,
                        },
                        "logprobs": None,
                        "finish_reason": request.finish_reason,
                        "stop_reason": request.stop_reason,
                        "token_ids": None,
                        "routed_experts": None,
                    }
                ],
                "service_tier": None,
                "system_fingerprint": fingerprint(request.model),
                "usage": self.whole_usage(),
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "prompt_text": None,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )


class CompletionShape(OpenAIShape):
    _object = b"text_completion"
    _before = b'{"index":0,"text":"'
    _after = (
        b'","logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    )
    _after_last = (
        b'","logprobs":null,"finish_reason":%b,"stop_reason":%b,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    )

    def whole(self) -> bytes:
        request = self.request
        return encode(
            {
                "id": self.identity,
                "object": "text_completion",
                "created": self.created,
                "model": request.model,
                "choices": [
                    {
                        "index": 0,
                        "text": request.text,
                        "logprobs": None,
                        "finish_reason": request.finish_reason,
                        "stop_reason": request.stop_reason,
                        "token_ids": None,
                        "prompt_logprobs": None,
                        "prompt_token_ids": None,
                        "routed_experts": None,
                    }
                ],
                "service_tier": None,
                "system_fingerprint": fingerprint(request.model),
                "usage": self.whole_usage(),
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )
