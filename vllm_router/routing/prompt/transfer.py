"""Parameters that name addresses from which the engine fetches cached blocks.

vLLM 0.32 takes `kv_transfer_params` and `ec_transfer_params` at the top level of a JSON body and
copies them into the sampling parameters' `extra_args` (`to_sampling_params` in
vllm/entrypoints/openai/chat_completion/protocol.py). `vllm_xargs`, also as a field of a form, and
`sampling_params.extra_args` on `/inference/v1/generate` have the same effect, so they are inspected
as well. An engine with a connector connects to that address; parameters that were used before, or
have a wrong type, crash the engine.
"""

from __future__ import annotations

import json

import msgspec

_ABSENT = msgspec.Raw(b"")


class _Transfer(msgspec.Struct, gc=False):
    kv_transfer_params: msgspec.Raw = _ABSENT
    ec_transfer_params: msgspec.Raw = _ABSENT


class _SamplingParams(msgspec.Struct, gc=False):
    extra_args: msgspec.Raw = _ABSENT


def transfer_parameter(
    kv: msgspec.Raw, ec: msgspec.Raw, xargs: msgspec.Raw, sampling: msgspec.Raw
) -> str | None:
    """The path of the first transfer parameter that is set, such as `kv_transfer_params`, or None.

    The arguments are the raw values of `kv_transfer_params`, `ec_transfer_params`, `vllm_xargs`
    and `sampling_params`; `null` counts as absent, as in vLLM. Raises DecodeError for JSON that
    msgspec rejects but vLLM may accept, such as a key with a lone surrogate.
    """
    if _is_set(kv):
        return "kv_transfer_params"
    if _is_set(ec):
        return "ec_transfer_params"
    inner = _inside(xargs)
    if inner is not None:
        return f"vllm_xargs.{inner}"
    try:
        extra = msgspec.json.decode(sampling or b"{}", type=_SamplingParams).extra_args
    except msgspec.ValidationError:
        return None  # not an object: vLLM answers 400
    inner = _inside(extra)
    return f"sampling_params.extra_args.{inner}" if inner is not None else None


def transfer_in_form(text: str) -> str | None:
    """The same for the form field `vllm_xargs`, which vLLM reads as JSON."""
    try:
        xargs = json.loads(text)
    except (ValueError, RecursionError):
        return None  # vLLM answers 400
    if isinstance(xargs, dict):
        for name in _Transfer.__struct_fields__:
            if xargs.get(name) is not None:
                return f"vllm_xargs.{name}"
    return None


def _inside(value: msgspec.Raw) -> str | None:
    try:
        found = msgspec.json.decode(value or b"{}", type=_Transfer)
    except msgspec.ValidationError:
        return None  # not an object: vLLM answers 400
    if _is_set(found.kv_transfer_params):
        return "kv_transfer_params"
    return "ec_transfer_params" if _is_set(found.ec_transfer_params) else None


def _is_set(value: msgspec.Raw) -> bool:
    return len(value) > 0 and bytes(value).strip() != b"null"
