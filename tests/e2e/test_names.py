"""Real processes with faulty names and addresses.

The resolver fails, hangs and returns new addresses, and some addresses swallow SYNs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.fake_names import FakeNames, swallowing
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

PATH = "/v1/chat/completions"
MOCK = ("--model", "m", "--ttft", "0.05", "--token-delay", "0.001")
MANY = 12


def burst(router: RouterProcess) -> list[int]:
    """The statuses of many concurrent requests, more than there are idle connections."""
    with router.client() as client, ThreadPoolExecutor(MANY) as pool:
        posts = [pool.submit(client.post, PATH, json=chat(max_tokens=2)) for _ in range(MANY)]
        return [post.result().status_code for post in posts]


def states(router: RouterProcess) -> set[str]:
    return {server["state"] for server in router.servers().values()}


def test_resolver_failure_or_hang_is_survived(tmp_path: Path):
    names = FakeNames(tmp_path)
    with mock_processes(2, *MOCK, "--host", "127.0.0.1") as mocks:
        for number, _ in enumerate(mocks):
            names.set(f"gpu-{number}.test", "127.0.0.1")
        urls = [f"http://gpu-{number}.test:{mock.port}" for number, mock in enumerate(mocks)]
        with router_process(servers_toml(urls, MANY), tmp_path, kind=names.router) as router:
            for break_it in (names.fail, names.forget, names.hang):
                before = names.asked()
                for number, _ in enumerate(mocks):
                    break_it(f"gpu-{number}.test")
                while names.asked() == before:
                    assert burst(router) == [200] * MANY
                assert burst(router) == [200] * MANY
                assert states(router) == {"up"}
                assert router.metric("vllm_router_attempts_total", outcome="connect_failed") == 0
            router.wait_for_text("cannot resolve gpu-")


def test_resolver_name_with_swallowing_old_address_is_followed(tmp_path: Path):
    """Within the request, even if another address of the name swallows SYNs from the start."""
    names = FakeNames(tmp_path)
    with mock_processes(1, *MOCK, "--host", "127.0.0.1") as [old]:
        new = MockProcess(*MOCK, "--host", "127.0.0.2", port=old.port)
        try:
            new.wait()
            with swallowing("127.0.0.3", old.port):
                names.set("gpu.test", "127.0.0.3", "127.0.0.1")
                config = servers_toml([f"http://gpu.test:{old.port}"], MANY)
                with router_process(config, tmp_path, kind=names.router) as router:
                    assert burst(router) == [200] * MANY
                    names.set("gpu.test", "127.0.0.2")
                    old.kill()
                    with swallowing("127.0.0.1", old.port):
                        until(lambda: router.post(PATH, chat()).status_code == 200, "an answer")
                        assert burst(router) == [200] * MANY
                        until(lambda: states(router) == {"up"}, "it to be up")
                    assert new.stats()["done"] > MANY
        finally:
            new.close()


def test_resolver_unknown_name_has_reason_and_is_used_once_found(tmp_path: Path):
    names = FakeNames(tmp_path)
    with mock_processes(1, *MOCK, "--host", "127.0.0.1") as [mock]:
        names.forget("gpu.test")
        config = servers_toml([f"http://gpu.test:{mock.port}"])
        with router_process(config, tmp_path, kind=names.router) as router:
            until(lambda: states(router) == {"down"}, "it to be down")
            assert "cannot resolve gpu.test" in router.servers().popitem()[1]["reason"]
            router.wait_for_text("unknown -> down (cannot resolve gpu.test: ")
            names.set("gpu.test", "127.0.0.1")
            until(lambda: states(router) == {"up"}, "it to be up")
            assert router.post(PATH, chat()).status_code == 200
