from vllm_router.embed import Config as Config
from vllm_router.embed import ConfigError as ConfigError
from vllm_router.embed import RunningRouter as RunningRouter
from vllm_router.embed import load_config as load_config
from vllm_router.embed import parse_config as parse_config
from vllm_router.embed import run_app as run_app
from vllm_router.embed import serve as serve

__version__: str
