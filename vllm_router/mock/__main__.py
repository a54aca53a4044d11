"""`python -m vllm_router.mock`: one simulated vLLM server."""

from .cli import mock_command

if __name__ == "__main__":
    mock_command()
