"""`python -m vllm_router.lab.mock`: one simulated vLLM server."""

from vllm_router.lab.mock.cli import mock_command

if __name__ == "__main__":
    mock_command()
