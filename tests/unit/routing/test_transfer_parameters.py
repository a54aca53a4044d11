"""Parameters that make an engine connect elsewhere or choose a rank are refused unless allowed.

Source: the request models of vLLM 0.32 (`vllm/entrypoints/*/protocol.py`).
"""

from __future__ import annotations

import json

import pytest

from support.proxy_harness import lab
from support.scripted_server import GOOD, answering
from vllm_router.routing.prompt.body_reader import read_routing_info

SOMEWHERE = {"do_remote_prefill": True, "remote_host": "192.0.2.66", "remote_port": 5600}

REFUSED = {
    "kv_transfer_params": {"kv_transfer_params": SOMEWHERE},
    "ec_transfer_params": {"ec_transfer_params": {"peer": "192.0.2.66"}},
    "vllm_xargs.kv_transfer_params": {"vllm_xargs": {"kv_transfer_params": "x"}},
    "vllm_xargs.ec_transfer_params": {"vllm_xargs": {"a": 1, "ec_transfer_params": [1]}},
    "sampling_params.extra_args.kv_transfer_params": {
        "sampling_params": {"extra_args": {"kv_transfer_params": SOMEWHERE}}
    },
    "sampling_params.extra_args.ec_transfer_params": {
        "sampling_params": {"extra_args": {"ec_transfer_params": {}}}
    },
}

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/new",
    "/inference/v1/generate",
    "/invocations",
)


@pytest.mark.parametrize("parameter", REFUSED)
async def test_transfer_parameter_is_refused_before_any_server(parameter, autojump_clock):
    async with lab(answering(GOOD)) as rig:
        got = await rig.post({"model": "m", **REFUSED[parameter]})
        assert got.status == 400
        assert got.code == "unsupported_parameter"
        assert got.json["error"]["param"] == parameter
        assert "allow_kv_transfer_params = true" in got.json["error"]["message"]
        assert rig.requests()["a"] == 0


@pytest.mark.parametrize("path", PATHS)
async def test_transfer_parameter_is_refused_on_every_path(path, autojump_clock):
    async with lab(answering(GOOD)) as rig:
        got = await rig.post({"model": "m", "kv_transfer_params": SOMEWHERE}, path=path)
        assert got.status == 400
        assert rig.requests()["a"] == 0


async def test_transfer_parameter_in_long_body_is_refused(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(
            {"model": "m", "prompt": "x" * 300_000, "kv_transfer_params": SOMEWHERE}
        )
        assert got.status == 400
        assert "allow_kv_transfer_params = true" in got.json["error"]["message"]
        assert rig.requests().total() == 0


@pytest.mark.parametrize("parameter", REFUSED)
async def test_transfer_parameter_if_allowed_passes(parameter, autojump_clock):
    async with lab(answering(GOOD), allow_kv_transfer_params=True) as rig:
        body = {"model": "m", **REFUSED[parameter]}
        assert (await rig.post(body)).status == 200
        assert json.loads(rig.scripted["a"].requests[0].body) == body


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": None, "ec_transfer_params": None, "vllm_xargs": None},
        {"messages": [{"role": "user", "content": '"kv_transfer_params": {"remote_host": "x"}'}]},
        {"metadata": {"kv_transfer_params": SOMEWHERE}},
        {"tools": [{"function": {"parameters": {"kv_transfer_params": {}}}}]},
        {"vllm_xargs": {"other": 1}, "sampling_params": {"extra_args": {"other": 1}}},
        {"vllm_xargs": 3, "sampling_params": {"extra_args": "kv_transfer_params"}},
        {"sampling_params": [], "vllm_xargs": "kv_transfer_params"},
        {"sampling_params": {"extra_args": {"kv_transfer_params": None}}},
    ],
)
async def test_transfer_parameter_words_elsewhere_in_body_pass(body, autojump_clock):
    async with lab(answering(GOOD)) as rig:
        assert (await rig.post({"model": "m", **body})).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "kv\\u005ftransfer_params": {"remote_host": "x"}}',
        b'{"model": "m", "kv_transfer_params": null, "kv_transfer_params": {"a": 1}}',
        b'{"model": 3, "kv_transfer_params": {"a": 1}}',
        b'{"model": "m", "kv_transfer_params": "text"}',
        b'{"model": "m", "kv_transfer_params": []}',
        b'{"model": "m", "messages": [' + b"{}," * 9000 + b'{}], "kv_transfer_params": {"a": 1}}',
    ],
    ids=["escaped key", "twice", "odd model", "string", "array", "many messages"],
)
@pytest.mark.parametrize("with_prompt", [False, True])
def test_transfer_parameter_is_found_in_any_json_spelling(body, with_prompt):
    facts = read_routing_info(
        b"/v1/completions", b"application/json", body, with_prompt=with_prompt
    )
    assert facts.transfer == "kv_transfer_params"


OTHERWISE_WRITTEN = {
    "byte order mark": b'\xef\xbb\xbf{"model": "m", "kv_transfer_params": {"a": 1}}',
    "UTF-16": '{"model": "m", "kv_transfer_params": {"a": 1}}'.encode("utf-16"),
    "NaN": b'{"model": "m", "temperature": NaN, "kv_transfer_params": {"a": NaN}}',
    "NaN in xargs": b'{"model": "m", "vllm_xargs": {"x": NaN, "kv_transfer_params": "x"}}',
    "lone surrogate": b'{"model": "m", "user": "\\ud800", "kv_transfer_params": {"a": 1}}',
    "long": b'{"model": "m", "prompt": "%b", "kv_transfer_params": {"a": 1}}' % (b"x" * 2_000_000),
    "long, within": b'{"prompt": "%b", "vllm_xargs": {"ec_transfer_params": 1}}'
    % (b"x" * 2_000_000),
}


@pytest.mark.parametrize("written", OTHERWISE_WRITTEN)
async def test_transfer_parameter_in_python_only_json_is_refused(written, autojump_clock):
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(OTHERWISE_WRITTEN[written])
        assert (got.status, got.code) == (400, "unsupported_parameter")
        assert rig.requests()["a"] == 0


@pytest.mark.parametrize(
    ("xargs", "parameter"),
    [
        ('{"kv_transfer_params": "x"}', "vllm_xargs.kv_transfer_params"),
        ('{"a": 1, "ec\\u005ftransfer_params": [1]}', "vllm_xargs.ec_transfer_params"),
        ('{"kv_transfer_params": null}', None),
        ('{"a": "kv_transfer_params"}', None),
        ('["kv_transfer_params"]', None),
        ("kv_transfer_params", None),
        ("[" * 60_000, None),
        ("", None),
    ],
)
async def test_transfer_parameter_in_form_xargs_is_refused(xargs, parameter, autojump_clock):
    head = '--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = (head % ("model", "m") + head % ("vllm_xargs", xargs) + "--b--\r\n").encode()
    headers = ((b"content-type", b"multipart/form-data; boundary=b"),)
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(body, path="/v1/audio/transcriptions", headers=headers)
        assert got.status == (200 if parameter is None else 400)
        if parameter is not None:
            assert got.json["error"]["param"] == parameter


async def test_transfer_parameter_by_head_is_refused_every_time(autojump_clock):
    headers = ((b"x-data-parallel-rank", b"1"),)
    async with lab(answering(GOOD)) as rig:
        for _ in range(3):
            assert (await rig.post(headers=headers)).code == "unsupported_parameter"


@pytest.mark.parametrize("name", [b"x-data-parallel-rank"])
@pytest.mark.parametrize("value", [b"0", b"1", b"", b"x"])
async def test_data_parallel_rank_of_client_is_refused_unless_allowed(name, value, autojump_clock):
    headers = ((b"content-type", b"application/json"), (name, value))
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(headers=headers)
        assert (got.status, got.code) == (400, "unsupported_parameter")
        assert got.json["error"]["param"] == "X-data-parallel-rank"
        assert rig.requests()["a"] == 0
    async with lab(answering(GOOD), allow_data_parallel_rank=True) as rig:
        assert (await rig.post(headers=headers)).status == 200
        assert (name, value) in rig.scripted["a"].requests[0].fields


async def test_sagemaker_model_header_is_refused(autojump_clock):
    """vLLM would prefer it to the body's model, which the router routes by."""
    headers = (
        (b"content-type", b"application/json"),
        (b"x-amzn-sagemaker-adapter-identifier", b"other"),
    )
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(headers=headers, path="/invocations")
        assert (got.status, got.code) == (400, "unsupported_parameter")
        assert rig.requests()["a"] == 0
        assert (await rig.post(headers=headers)).status == 200
