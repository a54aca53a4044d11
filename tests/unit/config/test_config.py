"""Valid contents of servers.toml, and the errors for all others."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import msgspec
import pytest

from vllm_router.config.changes import changes
from vllm_router.config.log import LogSettings
from vllm_router.config.model_aliases import ModelRule
from vllm_router.config.parser import parse
from vllm_router.config.run_options import RunOptions
from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.config.server_url import normalise_url, server_name
from vllm_router.config.slo import Objective
from vllm_router.config.toml_reader import MAX_FILE_BYTES, MAX_PROBLEMS
from vllm_router.config.types import Secret
from vllm_router.errors import ConfigError
from vllm_router.observability import formatting as logs
from vllm_router.routing.policies import POLICY_NAMES

EXAMPLE = Path(__file__).parents[3] / "servers.example.toml"

ONE_SERVER = '[servers]\nservers = [{ url = "http://h:8000" }]\n'

# servers.example.toml of the predecessor, as distributed there.
ANCESTOR = """\
[servers]
servers = [
    { url = "http://localhost:8801", max_concurrent_requests = 10 },
    { url = "http://localhost:8802", max_concurrent_requests = 3 },
    { url = "http://localhost:8803", max_concurrent_requests = 4 },
]

[config]
health_check_interval = 10
config_reload_interval = 30
request_timeout = 30
health_check_timeout = 5
max_retries = 3
failure_threshold = 2
auto_recovery_threshold = 60

# 主动健康检查配置
enable_active_health_check = true
health_check_max_response_time = 10.0
health_check_min_success_rate = 0.8
health_check_window_size = 10
health_check_consecutive_failures = 3"""


def read(text: str | bytes, **environ: str) -> Config:
    data = text.encode() if isinstance(text, str) else text
    return parse(data, "servers.toml", environ, policies=POLICY_NAMES)


POSITION = re.compile(r"^servers\.toml(:\d+:\d+)?: ")


def settings(text: str) -> Settings:
    return read(f"{ONE_SERVER}[config]\n{text}").settings


def server(text: str, **environ: str) -> ServerConfig:
    (only,) = read(f"[[servers.servers]]\n{text}", **environ).servers
    return only


def problems(text: str | bytes, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(text, **environ)
    for problem in caught.value.problems:
        assert POSITION.match(problem)
        assert problem.isprintable(), "one line, nothing that moves a terminal's cursor"
    return tuple(POSITION.sub("", p) for p in caught.value.problems)


def problem(text: str | bytes, **environ: str) -> str:
    (only,) = problems(text, **environ)
    return only


def setting_problem(text: str) -> str:
    return problem(f"{ONE_SERVER}[config]\n{text}").removeprefix("config.")


def server_problem(text: str, **environ: str) -> str:
    return problem(f"[[servers.servers]]\n{text}", **environ).removeprefix("servers.servers[0].")


# -- files that load --------------------------------------------------------------------------


def test_config_example_of_predecessor_loads_with_all_values():
    config = read(ANCESTOR)
    assert [(s.url, s.name, s.max_concurrent_requests) for s in config.servers] == [
        ("http://localhost:8801", "localhost:8801", 10),
        ("http://localhost:8802", "localhost:8802", 3),
        ("http://localhost:8803", "localhost:8803", 4),
    ]
    assert config.settings == Settings(
        health_check_interval=10.0,
        config_reload_interval=30.0,
        request_timeout=30.0,
        first_byte_timeout=30.0,
        idle_timeout=30.0,
        health_check_timeout=5.0,
        max_retries=3,
        failure_threshold=2,
        auto_recovery_threshold=60.0,
        enable_active_health_check=True,
        health_check_max_response_time=10.0,
        health_check_min_success_rate=0.8,
        health_check_window_size=10,
        health_check_consecutive_failures=3,
    )


@pytest.mark.parametrize(
    "line",
    [
        "health_check_interval = 1",
        "config_reload_interval = 1",
        "request_timeout = 1",
        "health_check_timeout = 1",
        "max_retries = 0",
        "failure_threshold = 1",
        "auto_recovery_threshold = 1",
        "enable_active_health_check = false",
        "health_check_max_response_time = 0.1",
        "health_check_min_success_rate = 0",
        "health_check_min_success_rate = 1.0",
        "health_check_window_size = 1",
        "health_check_consecutive_failures = 1",
        "max_retries = 1000000",
        "request_timeout = 1000000000000000",
    ],
)
def test_config_limits_of_predecessor_are_accepted(line: str):
    key, _, value = line.partition(" = ")
    assert getattr(settings(line), key) == msgspec.json.decode(value)


def test_config_whole_float_counts_as_int_like_in_predecessor():
    assert settings("max_retries = 2.0").max_retries == 2


def test_config_durations_are_floats_in_any_notation():
    assert type(settings("request_timeout = 120").request_timeout) is float


def test_config_byte_order_mark_of_utf_8_is_skipped():
    assert read("\ufeff" + ONE_SERVER) == read(ONE_SERVER)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [("adaptative", "adaptive"), ("round-robin", "round_robin"), ("Least_Load", "least_load")],
)
def test_config_policy_with_typing_error_gets_suggestion(value: str, nearest: str):
    text = problem(f'{ONE_SERVER}\n[config]\npolicy = "{value}"')
    assert text.endswith(f'got "{value}", did you mean "{nearest}"?')


@pytest.mark.parametrize("key", ["host", "port", "workers", "front"])
def test_config_setting_of_process_names_its_table(key: str):
    text = problem(f"{ONE_SERVER}\n[config]\n{key} = 1")
    assert text.endswith(f'unknown key "{key}", which belongs in run')


def test_config_run_table_is_read():
    text = '[run]\nhost = "::"\nport = 80\nworkers = 4'
    assert read(ONE_SERVER + text).run == RunOptions(host="::", port=80, workers=4)
    assert read(ONE_SERVER).run == RunOptions()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = 65536", "run.port: expected int from 0 to 65535, got 65536"),
        ('port = "80"', 'run.port: expected int from 0 to 65535, got "80"'),
        ('host = "a b"', 'run.host: expected an address like "0.0.0.0" (string), got "a b"'),
        ('front = "lanes"', ', got "lanes", did you mean "lane"?'),
        ('front = "hypercorn"\nworkers = 2', "which serves in one process only"),
    ],
)
def test_config_run_table_with_bad_value_is_refused(text: str, expected: str):
    assert expected in problem(f"{ONE_SERVER}[run]\n{text}")


def test_config_variables_are_expanded_in_every_text():
    text = 'url = "http://${HOST}:${PORT_1}"\nmodels = ["${MODEL}", "$MODEL"]\napi_key = "${KEY}"'
    only = server(text, HOST="gpu", PORT_1="8000", MODEL="a", KEY="sk-1")
    assert (only.url, only.models, only.api_key) == ("http://gpu:8000", ("a", "$MODEL"), "sk-1")
    assert server('url = "http://h"\nmodels = ["$${A}"]').models == ("${A}",)


def test_config_variable_that_is_not_set_is_named_with_its_key():
    assert problem('[[servers.servers]]\nurl = "http://${HOST}:${PORT}"', PORT="1") == (
        "servers.servers[0].url: expected the environment variable HOST to be set, and it is not"
    )


@pytest.mark.parametrize("written", ["${}", "${", "${A", "${A-B}", "${A:-b}", "${ A }", "${1}"])
def test_config_malformed_reference_to_variable_is_refused(written: str):
    text = problem(f'[[servers.servers]]\nurl = "http://h"\nname = "{written}"', A="x")
    assert text.startswith("servers.servers[0].name: expected the name of an environment variable")


def test_config_empty_file_gets_defaults():
    assert read(ONE_SERVER) == Config(
        servers=(ServerConfig(url="http://h:8000", name="h:8000"),), settings=Settings()
    )


def test_config_example_loads():
    assert len(read(EXAMPLE.read_bytes()).servers) == 3


def test_config_example_shows_every_setting_with_default():
    shown = re.sub(r"^#(?=[a-z_]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    for key in (*Settings.__struct_fields__, *LogSettings.__struct_fields__):
        assert re.search(rf"^{key} = ", shown, flags=re.MULTILINE), f"{key} is not in the example"
    # The keys without a value to show by default.
    shown = re.sub(r"^(total_timeout|admin_listen)", r"#\1", shown, flags=re.MULTILINE)
    assert read(shown).settings == Settings()
    assert read(shown).log == LogSettings()


def test_config_example_shows_every_key_of_a_server():
    text = EXAMPLE.read_text()
    block = text[text.index("# [[servers.servers]]") : text.index("[config]")]
    uncommented = re.sub(r"^# ", "", block, flags=re.MULTILINE)
    (big,) = read(uncommented, GPU4_API_KEY="k").servers
    assert big == ServerConfig(
        url="https://gpu-server-4/llama",
        name="big-one",
        max_concurrent_requests=16,
        api_key=Secret("k"),
        models=("llama-3.1-8b",),
    )
    assert "api_key = " in block


def test_config_array_of_tables_equals_inline_list():
    assert read('[[servers.servers]]\nurl = "http://h:8000"\n') == read(ONE_SERVER)


# -- timeouts that follow others --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first_byte", "idle"),
    [
        ("", 600.0, 300.0),
        ("request_timeout = 120", 120.0, 120.0),
        ("request_timeout = 1000", 1000.0, 300.0),
        ("request_timeout = 120\nidle_timeout = 500", 120.0, 500.0),
        ("request_timeout = 120\nfirst_byte_timeout = 7", 7.0, 120.0),
    ],
)
def test_config_first_byte_and_idle_timeout_default_to_request_timeout(
    text: str, first_byte: float, idle: float
):
    found = settings(text)
    assert (found.first_byte_timeout, found.idle_timeout) == (first_byte, idle)


# -- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('max_retries = "three"', 'max_retries: expected int ≥ 0, got "three"'),
        ("max_retries = -1", "max_retries: expected int ≥ 0, got -1"),
        ("max_retries = true", "max_retries: expected int ≥ 0, got true"),
        ("max_retries = 1.5", "max_retries: expected int ≥ 0, got 1.5"),
        ("max_retries = []", "max_retries: expected int ≥ 0, got an empty array"),
        ("max_retries = {}", "max_retries: expected int ≥ 0, got a table"),
        ("max_retries = 2024-01-01", "max_retries: expected int ≥ 0, got a date"),
        ("failure_threshold = 0", "failure_threshold: expected int ≥ 1, got 0"),
        (
            "failure_threshold = 9223372036854775808",
            "failure_threshold: expected int ≥ 1, got 9223372036854775808",
        ),
        (
            f"failure_threshold = 0x{'f' * 5000}",
            "failure_threshold: expected int ≥ 1, got an integer of 20000 bits",
        ),
        (
            f"request_timeout = 0x{'f' * 5000}",
            "request_timeout: expected number of seconds > 0, got an integer of 20000 bits",
        ),
        ("request_timeout = 0", "request_timeout: expected number of seconds > 0, got 0"),
        ("request_timeout = nan", "request_timeout: expected number of seconds > 0, got nan"),
        ("request_timeout = inf", "request_timeout: expected number of seconds > 0, got inf"),
        ("request_timeout = true", "request_timeout: expected number of seconds > 0, got true"),
        ('request_timeout = "9"', 'request_timeout: expected number of seconds > 0, got "9"'),
        ("total_timeout = -1", "total_timeout: expected number of seconds > 0, got -1"),
        ("drain_grace = -0.1", "drain_grace: expected number of seconds ≥ 0, got -0.1"),
        ("feed_interval = 0.001", "feed_interval: expected number of seconds ≥ 0.01, got 0.001"),
        (
            "health_check_min_success_rate = 80",
            "health_check_min_success_rate: expected number from 0 to 1, got 80",
        ),
        ("replay = 1", "replay: expected true or false, got 1"),
        ('replay = "yes"', 'replay: expected true or false, got "yes"'),
        ("max_body_mb = 1e300", "max_body_mb: expected number of megabytes > 0 and ≤ 1000000"),
        ('policy = "best"', 'policy: expected one of "adaptive", "least_load", '),
        ("policy = 1", "policy: expected the name of a policy (string), got 1"),
        (
            'trusted_proxies = ["10.0.0.0/8", "proxy", 5]',
            'trusted_proxies[1]: expected an IP address or a network like 10.0.0.0/8, got "proxy"',
        ),
        (
            'trusted_proxies = "10.0.0.1"',
            "trusted_proxies: expected array of IP addresses and networks (strings), got ",
        ),
    ],
)
def test_config_wrong_setting_error_says_what_is_expected(line: str, expected: str):
    found = problems(f"{ONE_SERVER}[config]\n{line}")
    assert found[0].startswith(f"config.{expected}")


def test_config_wrong_element_error_has_its_index():
    found = problems(f'{ONE_SERVER}[config]\ntrusted_proxies = ["x", "10.0.0.1", 5]')
    assert [p.split(":")[0] for p in found] == [
        "config.trusted_proxies[0]",
        "config.trusted_proxies[2]",
    ]


def test_config_trusted_proxies_are_networks():
    found = settings('trusted_proxies = ["10.0.0.1/8", "::1", "192.0.2.7", "10.0.0.0/8"]')
    assert found.trusted_proxies == ("10.0.0.0/8", "::1/128", "192.0.2.7/32")


def test_config_error_shortens_long_value():
    text = setting_problem(f'max_retries = "{"x" * 5000}"')
    assert text == f'max_retries: expected int ≥ 0, got "{"x" * 80}…"'


def test_config_error_value_cannot_break_the_line():
    text = setting_problem(r'policy = "a\nb\u001b[2J\u2028\"c\\"')
    assert text.endswith(r'got "a\nb\x1b[2J\u2028\"c\\"')


def test_config_all_problems_are_reported_at_once():
    found = problems(
        """
        [servers]
        servers = [
            { url = "http://a:1" },
            { url = "http://b:1", max_concurrent_requests = "three", model = "m" },
            { url = "ftp://c", name = "" },
            {},
            "http://d:1",
        ]
        [config]
        max_retries = -1
        request_timeout = "soon"
        """
    )
    assert [p.split(": ")[0] for p in found] == [
        "servers.servers[1].max_concurrent_requests",
        "servers.servers[1].model",
        "servers.servers[2].url",
        "servers.servers[2].name",
        "servers.servers[3].url",
        "servers.servers[4]",
        "config.max_retries",
        "config.request_timeout",
    ]
    assert found[0].endswith('expected int ≥ 1, got "three"')


def test_config_flood_of_problems_is_counted_not_listed():
    found = problems(ONE_SERVER + "[config]\n" + "".join(f"k{n} = 1\n" for n in range(4000)))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1] == f"and {4000 - MAX_PROBLEMS} more problems"


# -- unknown keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"{ONE_SERVER}[config]\nmax_retrys = 3",
            'config.max_retrys: unknown key "max_retrys", did you mean "max_retries"?',
        ),
        (
            f"{ONE_SERVER}[config]\nMax-Retries = 3",
            'config.Max-Retries: unknown key "Max-Retries", did you mean "max_retries"?',
        ),
        (
            '[[servers.servers]]\nurl = "http://h"\nmodles = ["m"]',
            'servers.servers[0].modles: unknown key "modles", did you mean "models"?',
        ),
        (
            f"{ONE_SERVER}[confg]\nmax_retries = 3",
            'confg: unknown key "confg", did you mean "config"?',
        ),
        (
            f"max_retries = 3\n{ONE_SERVER}",
            'max_retries: unknown key "max_retries", which belongs in config',
        ),
        (
            f"{ONE_SERVER}[config]\nurl = 3",
            'config.url: unknown key "url", which belongs in servers.servers',
        ),
        (
            f"{ONE_SERVER}\nrequest_timeout = 3",
            'servers.request_timeout: unknown key "request_timeout", which belongs in config',
        ),
        (
            f'{ONE_SERVER}[config]\n"max retries\\n" = 3',
            'config."max retries\\n": unknown key "max retries\\n", did you mean "max_retries"?',
        ),
        (
            f"{ONE_SERVER}[zzz]",
            (
                'zzz: unknown key "zzz", known here: servers, discovery, config, models, auth, '
                "limits, tls, log, run, slo, shared"
            ),
        ),
        (
            f"{ONE_SERVER}[limits]\nmax_in_fligth = 3",
            'limits.max_in_fligth: unknown key "max_in_fligth", did you mean "max_in_flight"?',
        ),
    ],
)
def test_config_unknown_key_error_suggests_a_known_one(text: str, expected: str):
    assert problem(text) == expected


# -- servers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[config]\n", "[servers]\n", "[servers]\nservers = []\n", "# nothing\n"]
)
def test_config_file_without_servers_is_an_error(text: str):
    assert problem(text) == "servers.servers: expected at least one server, got no servers"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[servers]]\nurl = "http://h"', "servers: expected table, got an array"),
        ("servers = 5", "servers: expected table, got 5"),
        ('[servers]\nservers = "http://h"', "servers.servers: expected array of tables, got"),
        ("[servers.servers]\n", "servers.servers: expected array of tables, got a table"),
        (f"config = 1\n{ONE_SERVER}", "config: expected table, got 1"),
        (f"config = [1]\n{ONE_SERVER}", "config: expected table, got an array"),
    ],
)
def test_config_wrong_shape_error_names_key(text: str, expected: str):
    assert problem(text).startswith(expected)


def test_config_same_server_twice_error_names_both():
    text = '[servers]\nservers = [{ url = "http://h:80/v1/" }, { url = "http://H" }]'
    assert problem(text) == (
        'servers.servers[1].url: expected every server once, got "http://H", '
        'the same server as servers.servers[0] ("http://h:80/v1/")'
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('url = "http://a", name = "x"', 'url = "http://b", name = "x"'),
        ('url = "http://x:1"', 'url = "http://b", name = "x:1"'),
        ('url = "https://x"', 'url = "http://x:443"'),
    ],
)
def test_config_server_names_are_unique_given_or_derived(first: str, second: str):
    text = problem(f"[servers]\nservers = [{{ {first} }}, {{ {second} }}]")
    assert re.fullmatch(
        r"servers\.servers\[1\]\.name: expected a name of its own, "
        r'got "x(:1|:443)?", which servers\.servers\[0\] has',
        text,
    )


@pytest.mark.parametrize("name", ["", "two words", "line\\nbreak", "größe", "x" * 101])
def test_config_server_name_must_fit_header_and_command_line(name: str):
    text = server_problem(f'url = "http://h"\nname = "{name}"')
    assert text.startswith("name: expected 1 to 100 visible ASCII characters, no spaces, got ")


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("[]", "models: expected array of at least one model name (strings), got an empty array"),
        ('"m"', 'models: expected array of at least one model name (strings), got "m"'),
        ('["m", ""]', 'models[1]: expected the name of a model (string), got ""'),
        ("[1]", "models[0]: expected the name of a model (string), got 1"),
    ],
)
def test_config_models_are_a_list_of_names(models: str, expected: str):
    assert server_problem(f'url = "http://h"\nmodels = {models}') == expected


def test_config_models_keep_order_without_repetition():
    assert server('url = "http://h"\nmodels = ["b", "a", "b"]').models == ("b", "a")


# -- keys are secret --------------------------------------------------------------------------

KEY = "sk-0123456789"


def test_config_key_comes_from_file_or_environment():
    assert server(f'url = "http://h"\napi_key = "{KEY}"').api_key == KEY
    from_env = server('url = "http://h"\napi_key_env = "GPU_KEY"', GPU_KEY=f"{KEY}\n")
    assert from_env.api_key == KEY


def test_config_key_is_in_no_repr_and_no_diff():
    config = read(f'[[servers.servers]]\nurl = "http://h"\napi_key = "{KEY}"')
    other = read('[[servers.servers]]\nurl = "http://h"\napi_key = "sk-another"')
    none = read('[[servers.servers]]\nurl = "http://h"\n')
    assert KEY not in f"{config!r} {config}"
    assert "api_key='***'" in repr(config)
    assert changes(config, other) == "h api_key changed"
    assert changes(config, none) == changes(none, config) == "h api_key changed"


def test_config_changes_of_many_servers_are_counted():
    def fleet(weight: int, most: int) -> Config:
        rows = [
            f'{{ url = "http://h{n}", weight = {weight}, max_concurrent_requests = {most} }},'
            for n in range(20)
        ]
        return read("\n".join(["[servers]", "servers = [", *rows, "]"]))

    text = changes(fleet(1, 8), fleet(2, 9))
    assert text.startswith("h0 max_concurrent_requests 8 → 9, h0 weight 1 → 2, h1 ")
    assert text.endswith(", and 30 more")


@pytest.mark.parametrize(
    "lines",
    [
        f'api_key = "{KEY} "',
        f'api_key = ["{KEY}"]',
        f'api_key = {{ value = "{KEY}" }}',
        f'api_kye = "{KEY}"',
        f'api_key = "{KEY}"\napi_key_env = "GPU_KEY"',
        f'api_key_env = "{KEY}"',
        'api_key_env = "sk_0123456789"',
        f'api_key_env = ["{KEY}"]',
        'api_key_env = "BAD_KEY"',
    ],
)
def test_config_key_is_in_no_problem(lines: str):
    text = server_problem(
        f'url = "http://h"\n{lines}', GPU_KEY="sk-0123456789", BAD_KEY="sk-0123456789 x"
    )
    assert "0123456789" not in text


@pytest.mark.parametrize(
    "url",
    [
        "http://user:0123456789@h:1",
        "http://0123456789@h",
        "http://us/er:0123456789@h",
        "ftp://user:0123456789@h",
        "user:0123456789@h:1",
        "http://user:a@0123456789@h",
        "http://h/?key=0123456789",
        "http://h/#0123456789",
    ],
)
def test_config_credentials_in_url_are_masked(url: str):
    for text in (
        server_problem(f'url = "{url}"'),
        problem(f'[servers]\nservers = ["{url}"]'),
        problem(f'[servers]\nservers = "{url}"'),
    ):
        assert "0123456789" not in text
        assert "***" in text


def test_config_unset_variable_is_named():
    assert server_problem('url = "http://h"\napi_key_env = "GPU_KEY"') == (
        'api_key_env: expected an environment variable that is set, got "GPU_KEY"'
    )
    assert "GPU_KEY" in server_problem('url = "http://h"\napi_key_env = "GPU_KEY"', GPU_KEY=" ")


# -- URLs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "normal", "name"),
    [
        ("http://gpu-1:8081", "http://gpu-1:8081", "gpu-1:8081"),
        ("http://GPU-1:8081/", "http://gpu-1:8081", "gpu-1:8081"),
        ("HTTP://h:80", "http://h", "h"),
        ("http://h:", "http://h", "h"),
        ("http://h:0080", "http://h", "h"),
        ("https://h:443", "https://h", "h:443"),
        ("https://h:80", "https://h:80", "h:80"),
        ("http://h:443", "http://h:443", "h:443"),
        ("http://h/v1", "http://h", "h"),
        ("http://h/v1/", "http://h", "h"),
        ("http://h/a/b//", "http://h/a/b", "h/a/b"),
        ("https://h/a/v1", "https://h/a", "h:443/a"),
        ("http://h/v1/v1", "http://h", "h"),
        ("http://h/llm-v1", "http://h/llm-v1", "h/llm-v1"),
        ("http://h/v1/a", "http://h/v1/a", "h/v1/a"),
        ("http://h/Team%20A", "http://h/Team%20A", "h/Team%20A"),
        ("http://[::1]:8000", "http://[::1]:8000", "[::1]:8000"),
        ("http://[0:0::0001]", "http://[::1]", "[::1]"),
        ("https://[FE80::A]/v1", "https://[fe80::a]", "[fe80::a]:443"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://vllm_1:8000", "http://vllm_1:8000", "vllm_1:8000"),
        ("http://a.b.example.:1", "http://a.b.example.:1", "a.b.example.:1"),
    ],
)
def test_config_url_is_normalised(url: str, normal: str, name: str):
    assert normalise_url(url) == normal
    assert normalise_url(normal) == normal
    assert server_name(normal) == name
    found = server(f'url = "{url}"')
    assert (found.url, found.name) == (normal, name)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", 'a URL like "http://host:8000"'),
        ("h:8000", 'a URL like "http://host:8000"'),
        ("//h:8000", 'a URL like "http://host:8000"'),
        ("ftp://h", 'a URL like "http://host:8000"'),
        (" http://h", 'a URL like "http://host:8000"'),
        ("http://user@h", "a URL without user name and password"),
        ("http://@h", "a URL without user name and password"),
        ("http://us/er:password@h", "a URL without user name and password"),
        ("http://h?x=1", "a URL without query and fragment"),
        ("http://h/#x", "a URL without query and fragment"),
        ("http://", "a URL with a valid host"),
        ("http://:80", "a URL with a valid host"),
        ("http:///v1", "a URL with a valid host"),
        ("http://a b", "a URL with a valid host"),
        ("http://h\r\nX: y", "a URL with a valid host"),
        ("http://h\t", "a URL with a valid host"),
        ("http://-h", "a URL with a valid host"),
        ("http://a..b", "a URL with a valid host"),
        ("http://a\\b", "a URL with a valid host"),
        ("http://größe", "a URL with a valid host"),
        ("http://\u212aelvin", "a URL with a valid host"),
        ("http://10.0.0.256", "a URL with a valid host"),
        ("http://[::1", "a URL with a valid host"),
        ("http://[::1]8000", "a URL with a valid host"),
        ("http://[10.0.0.1]", "a URL with a valid host"),
        ("http://[fe80::1%25eth0]", "a URL with a valid host"),
        ("http://::1:8000", "a URL with a valid host"),
        (f"http://{'a' * 64}", "a URL with a valid host"),
        (f"http://{'a.' * 130}a", "a URL with a valid host"),
        (f"http://h/{'a' * 2000}", "a URL of at most 2000 characters"),
        ("http://h:0", "a URL with a port from 1 to 65535"),
        ("http://h:65536", "a URL with a port from 1 to 65535"),
        ("http://h:http", "a URL with a port from 1 to 65535"),
        ("http://h:-1", "a URL with a port from 1 to 65535"),
        ("http://h:+80", "a URL with a port from 1 to 65535"),
        ("http://h:\u0668\u0660", "a URL with a port from 1 to 65535"),
        ("http://h:1:2", "a URL with a port from 1 to 65535"),
        ("http://h/a/../b", "a URL whose path prefix is plain"),
        ("http://h/.", "a URL whose path prefix is plain"),
        ("http://h/a//b", "a URL whose path prefix is plain"),
        ("http://h/a b", "a URL whose path prefix is plain"),
        ("http://h/%zz", "a URL whose path prefix is plain"),
        ("http://h/a\r\nb", "a URL whose path prefix is plain"),
        ("http://h/größe", "a URL whose path prefix is plain"),
        ("http://h/v1/chat/completions", "the base URL of a server"),
        ("http://h/v1/models/", "the base URL of a server"),
        ("http://h/health", "the base URL of a server"),
        ("http://h/llm/v1/messages", "the base URL of a server"),
    ],
)
def test_config_other_urls_are_refused(url: str, expected: str):
    with pytest.raises(ValueError, match=f"^expected {re.escape(expected)}"):
        normalise_url(url)


# -- files that are not TOML ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "expected a configuration, got an empty file"),
        (b" \n\t\n", "expected a configuration, got an empty file"),
        ("[servers]".encode("utf-16"), "expected UTF-8, got a file that starts with"),
        (b"[servers]\n\nx = 'a\0b'", "expected text, got a NUL byte"),
        (b"[servers]\nx = '\xff'", "expected UTF-8, got byte 0xff"),
        (b"a = 1\nb = = 2\n", "expected a value: a text in quotes, a number"),
        (b"a = 1\na = 2\n", "expected each key once, got a again: the first is in line 1"),
        (b"[servers]\nservers = [\n  { url =", "expected a value after the =, got none"),
        (b"a = " + b"[" * 100_000, "expected TOML, got tables nested too deeply"),
        (b"a = " + b"9" * 5000, "expected TOML, got tables nested too deeply or a number too"),
        (b"#" * (MAX_FILE_BYTES + 1), f"expected a file of at most {MAX_FILE_BYTES} bytes"),
        (b"# 10 MB\n" * 1_250_000, f"expected a file of at most {MAX_FILE_BYTES} bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
def test_config_unreadable_file_is_one_line(data: bytes, expected: str):
    assert problem(data).startswith(expected)


# -- values -----------------------------------------------------------------------------------


def test_config_is_immutable_and_comparable():
    config = read(ANCESTOR)
    assert config == read(ANCESTOR)
    assert hash(config) == hash(read(ANCESTOR))
    for value in (config, config.settings, config.servers[0]):
        for key in value.__struct_fields__:
            with pytest.raises(AttributeError):
                setattr(value, key, None)


def test_config_every_setting_is_explained():
    for struct in (Settings, LogSettings):
        text = inspect.getdoc(struct)
        assert text is not None
        for key in struct.__struct_fields__:
            assert re.search(rf"^{key}: ", text, flags=re.MULTILINE), key


# -- the log ------------------------------------------------------------------------------------


def log(text: str) -> LogSettings:
    return read(f"{ONE_SERVER}[log]\n{text}").log


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", LogSettings()),
        ("access = false", LogSettings(access=False)),
        ('access = "a.log"\nformat = "json"', LogSettings(access="a.log", format="json")),
        ('level = "debug"\nprompts = true', LogSettings(level="debug", prompts=True)),
    ],
)
def test_config_log_table_is_read(text: str, expected: LogSettings):
    assert log(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('level = "loud"', 'log.level: expected one of "debug", "info", "warning", "error", got'),
        ("level = 3", "log.level: expected one of debug, info, warning, error (string), got 3"),
        ('access = ""', 'log.access: expected true, false or the path of a file, got ""'),
        ('access = "a\\nb"', 'log.access: expected true, false or the path of a file, got "a\\nb"'),
        ("access = 3", "log.access: expected true, false or the path of a file (string), got 3"),
        ("colour = true", 'log.colour: unknown key "colour"'),
    ],
)
def test_config_wrong_log_setting_is_an_error(text: str, expected: str):
    assert problem(f"{ONE_SERVER}[log]\n{text}").startswith(expected)


def test_config_command_line_and_file_share_levels_and_formats():
    for key, names in (("level", logs.LEVELS), ("format", logs.FORMATS)):
        for name in names:
            assert getattr(log(f'{key} = "{name}"'), key) == name


def test_config_every_duration_is_finite():
    for key, value in msgspec.structs.asdict(Settings()).items():
        assert not isinstance(value, float) or math.isfinite(value), key


# -- differences ------------------------------------------------------------------------------


def config_of(*urls: str, server: str = "", settings: str = "") -> Config:
    text = "".join(f'[[servers.servers]]\nurl = "{url}"\n{server}\n' for url in urls)
    return read(f"{text}\n[config]\n{settings}")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            config_of("http://a", "http://b", settings="request_timeout = 120"),
            config_of("http://b", "http://c", settings="request_timeout = 60"),
            "+1 server, -1, request_timeout 120 → 60",
        ),
        (config_of("http://a"), config_of("http://a", "http://b", "http://c"), "+2 servers"),
        (config_of("http://a", "http://b"), config_of("http://a"), "-1 server"),
        (config_of("http://a"), config_of("http://a/v1"), "nothing changed"),
        (
            config_of("http://a"),
            config_of("http://a", settings='[log]\nlevel = "debug"'),
            "log level info → debug",
        ),
        (config_of("http://a", "http://b"), config_of("http://b", "http://a"), "order of servers"),
        (
            config_of("http://a"),
            config_of("http://a", server='max_concurrent_requests = 9\nmodels = ["m", "n"]'),
            "a max_concurrent_requests none → 9, a models none → [m, n]",
        ),
        (
            config_of("http://a"),
            config_of("http://a", server='name = "big"'),
            "a name a → big",
        ),
        (
            config_of("http://a", settings="total_timeout = 0.5"),
            config_of("http://a", settings="replay = false\nidle_timeout = 9"),
            "idle_timeout 300 → 9, total_timeout 0.5 → none, replay true → false",
        ),
        (
            config_of("http://a", settings="request_timeout = 5"),
            config_of("http://a", settings="request_timeout = 9\nfirst_byte_timeout = 5"),
            "request_timeout 5 → 9",
        ),
    ],
)
def test_config_changes_are_one_line(old: Config, new: Config, expected: str):
    assert changes(old, new) == expected


def test_config_changed_default_of_timeout_is_reported():
    old = config_of("http://a", settings="request_timeout = 5")
    new = config_of("http://a", settings="request_timeout = 5\nfirst_byte_timeout = 9")
    assert changes(old, new) == "first_byte_timeout 5 → 9"


def test_config_long_list_of_changes_is_shortened():
    urls = [f"http://s{n}" for n in range(100)]
    old, new = config_of(*urls), config_of(*urls, server="max_concurrent_requests = 4")
    assert changes(old, new).endswith("s9 max_concurrent_requests none → 4, and 90 more")
    assert "\n" not in changes(old, new)


def test_config_list_of_ten_changes_is_complete():
    urls = [f"http://s{n}" for n in range(10)]
    old, new = config_of(*urls), config_of(*urls, server="max_concurrent_requests = 4")
    assert changes(old, new).endswith("s9 max_concurrent_requests none → 4")


def test_config_models_have_their_table():
    config = read(
        f"""{ONE_SERVER}[models]
        "gpt-4" = "llama-70b"
        fast = {{ serves = "llama-8b", fallback = "gpt-4", hidden = true, policy = "session" }}
        """
    )
    assert dict(config.models) == {
        "gpt-4": ModelRule(serves="llama-70b"),
        "fast": ModelRule(serves="llama-8b", fallback="gpt-4", hidden=True, policy="session"),
    }
    assert read(ONE_SERVER).models == ()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("a = 3", "a: expected the servers' name of the model or a table, got 3"),
        ('a = ""', 'a.serves: expected the name of a model (string), got ""'),
        ('"" = "m"', '"": expected the name of a model, got an empty one'),
        ('a = { serve = "m" }', 'a.serve: unknown key "serve", did you mean "serves"?'),
        ('a = { fallback = "a" }', "a.fallback: expected fallbacks without a cycle, got a → a"),
        (
            'a = "b"\nb = "c"',
            "a.serves: expected the servers' name of the model, got another alias (b → c)",
        ),
        ("a = { hidden = 1 }", "a.hidden: expected true or false, got 1"),
    ],
)
def test_config_bad_model_is_named(table: str, expected: str):
    assert problem(f"{ONE_SERVER}[models]\n{table}").removeprefix("models.") == expected


def test_config_unknown_policy_of_model_error_lists_policies():
    text = problem(f'{ONE_SERVER}[models]\na = {{ policy = "best" }}')
    assert text.startswith('models.a.policy: expected one of "adaptive", ')


def test_config_circular_fallback_error_names_cycle_once():
    table = 'a = { fallback = "b" }\n"b\\n" = {}\nb = { fallback = "a" }\nc = { fallback = "a" }'
    assert problems(f"{ONE_SERVER}[models]\n{table}") == (
        "models.a.fallback: expected fallbacks without a cycle, got a → b → a",
    )


def test_config_changes_name_the_models():
    def with_models(table: str) -> Config:
        return read(f"{ONE_SERVER}[models]\n{table}")

    old = with_models('a = "x"\nb = "x"\nc = "x"')
    new = with_models('a = "x"\nb = "y"\n"d\\n" = "x"')
    assert changes(old, new) == r"model +d\n, model -c, model b"


def test_config_model_names_cannot_break_the_line_of_changes():
    new = config_of("http://a", server=r'models = ["x\ny"]')
    assert changes(config_of("http://a"), new) == r"a models none → [x\ny]"


# -- [limits] ---------------------------------------------------------------------------------

TWO_SERVERS = """[servers]
servers = [
    { url = "http://a:1", max_concurrent_requests = 5 },
    { url = "http://b:1", max_in_flight = 9 },
]
"""


def caps(limits: str) -> list[int | None]:
    text = TWO_SERVERS + limits
    return [server.max_in_flight for server in parse(text.encode(), "f", {}).servers]


def test_config_slo_of_model_overrides_common_objective():
    slo = config_of(
        "http://a",
        settings="""
[slo]
first_token = 5
success_share = 0.99
[slo.models."org/m"]
first_token = 0.5
first_token_share = 0.9
""",
    ).slo
    assert slo is not None
    assert slo.of("other") == Objective(first_token=5.0, success_share=0.99)
    assert slo.of("org/m") == Objective(first_token=0.5, first_token_share=0.9, success_share=0.99)
    assert config_of("http://a").slo is None


def test_config_slo_problems_name_key_and_buckets():
    with pytest.raises(ConfigError) as caught:
        config_of(
            "http://a",
            settings="""
[slo]
first_token = 3
success_share = 1.0
[slo.models.m]
fast = true
first_token = 7
""",
        )
    problems = "\n".join(caught.value.problems)
    assert "slo.first_token: expected one of 0.025, 0.05" in problems
    assert "slo.success_share: expected number from 0.5 to below 1" in problems
    assert 'slo.models.m.fast: unknown key "fast"' in problems
    assert "slo.models.m.first_token: expected one of" in problems


def test_config_server_cap_falls_back_to_common_cap_then_capacity():
    assert caps("[limits]") == [None, 9]
    assert caps("[limits]\nmax_in_flight = 4") == [4, 9]
    assert caps("[limits]\nstrict_capacity = true") == [5, 9]
    assert caps("[limits]\nmax_in_flight = 4\nstrict_capacity = true") == [4, 9]


def test_config_server_cap_without_limits_table_is_an_error():
    assert problem(TWO_SERVERS) == (
        "servers.servers[1].max_in_flight: expected a [limits] table beside it, got none"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_in_flight = 0", "limits.max_in_flight: expected int ≥ 1, got 0"),
        ('max_in_flight = "many"', 'limits.max_in_flight: expected int ≥ 1, got "many"'),
        ("queue_size = -1", "limits.queue_size: expected int ≥ 0, got -1"),
        ("queue_timeout = 0", "limits.queue_timeout: expected number of seconds > 0, got 0"),
        ("client_priority = 1", "limits.client_priority: expected true or false, got 1"),
        (
            "key_requests_per_minute = 0",
            "limits.key_requests_per_minute: expected number of requests > 0, got 0",
        ),
    ],
)
def test_config_bad_limit_error_says_what_is_expected(line: str, expected: str):
    assert problem(f"{ONE_SERVER}[limits]\n{line}") == expected


def test_config_keys_without_limits_use_limits_of_the_table():
    text = f"""{ONE_SERVER}
[limits]
key_requests_per_minute = 60
key_max_concurrent_requests = 2
[[auth.keys]]
name = "plain"
key = "k1"
[[auth.keys]]
name = "own"
key = "k2"
requests_per_minute = 6000
"""
    config = parse(text.encode(), "f", {})
    assert config.auth is not None
    plain, own = config.auth.keys
    assert (plain.requests_per_minute, plain.max_concurrent_requests) == (60, 2)
    assert (own.requests_per_minute, own.max_concurrent_requests) == (6000, 2)


def test_config_changed_limits_are_reported():
    without, with_ = ONE_SERVER, f"{ONE_SERVER}[limits]\nqueue_size = 3"
    more = f"{ONE_SERVER}[limits]\nqueue_size = 5"
    one, two, three = (parse(text.encode(), "f", {}) for text in (without, with_, more))
    assert changes(one, two) == "limits on"
    assert changes(two, three) == "limits queue_size 3 → 5"
    assert changes(three, one) == "limits off"
