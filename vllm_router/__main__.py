"""`python -m vllm_router` is the command `vllm-router`."""

from vllm_router.cli.main import main

if __name__ == "__main__":
    main()
