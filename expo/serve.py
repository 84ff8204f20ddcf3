"""A vLLM server for rollout.engine = vllm-server: `python -m expo.serve CONFIG.yaml [--host=H] [--port=N] ...`.

Takes the configuration of the run that it will serve, with the same `--section.field=value` overrides, and starts
vLLM's HTTP server with the settings that the run needs. Every call needs the server's key, which is in the file that
vllm.key_file names, or in the environment variable VLLM_API_KEY.
"""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from expo.config import RunConfig, parse_command_line
from expo.config.run import MOST_PORT
from expo.errors import ConfigError
from expo.learner.model_files import check_model_path, hub_options
from expo.rollout.vllm._compat import share_port
from expo.rollout.vllm.common import MADE_FOR_TEXT, check_vllm, engine_settings, version
from expo.rollout.vllm.key import VARIABLE, read_key
from expo.rollout.vllm.supervisor import fork_guarded
from expo.rollout.vllm.transfer.group import BACKEND
from expo.runtime.cli import OneLineParser
from expo.runtime.endings import errors_on_one_line

PROGRAM = "python -m expo.serve"
WORKER = "expo.rollout.vllm.worker.WeightReader"
GUARD = "expo.rollout.vllm.guard.RequireKey"
MODULE = "vllm.entrypoints.openai.api_server"  # runs vLLM's HTTP server


def server_arguments(config: RunConfig, host: str, port: int, *, is_cpu: bool) -> list[str]:
    """The command line of vLLM's HTTP server for a run."""
    settings = {
        "model": check_model_path(config.model),
        **hub_options(config.model),
        "host": host,
        "port": port,
        "tokens_only": True,
        "worker_extension_cls": WORKER,
        "middleware": GUARD,
        "disable_uvicorn_access_log": True,
        **({"weight_transfer_config": json.dumps({"backend": BACKEND})} if config.vllm.transfer == "broadcast" else {}),
        **engine_settings(
            config.vllm,
            dtype=getattr(torch, config.policy.dtype),
            is_cpu=is_cpu,
            num_replies=config.rollout.batch_size,
            max_tokens=config.max_tokens,
        ),
    }
    return [_flag(name, value) for name, value in settings.items()]


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) <= MOST_PORT):
        raise ConfigError(f"--port = {text[:80]!r}; expected a number from 1 to {MOST_PORT}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped; exits with code 2 and one line on stderr if it cannot start."""
    parser = OneLineParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--guarded", action="store_true")  # ends the server when stdin closes
    parser.add_argument("--cleanup-dir", type=Path)  # removed when stdin closes
    own, others = parser.parse_known_args(argv)
    if own.guarded:
        fork_guarded(own.cleanup_dir)
    config = parse_command_line(others, PROGRAM).config
    with errors_on_one_line(PROGRAM):
        port = _port(own.port)
        os.environ[VARIABLE] = read_key(config.vllm.key_file)  # for the guard, and for vLLM's worker processes
        check_vllm()
        if find_spec(MODULE) is None:
            raise ConfigError(f"vLLM {version()} has no {MODULE}; install version {MADE_FOR_TEXT}")
    os.umask(0o077)  # vLLM's processes talk over sockets in the folder for temporary files
    is_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    if is_cpu and config.vllm.tensor_parallel > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by default each worker needs a NUMA node
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # adds the routes that change weights
    # the processes of a server are on one machine; by default gloo listens where the machine's name leads to
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if own.guarded:
        share_port()
    sys.argv = [MODULE, *server_arguments(config, own.host, port, is_cpu=is_cpu)]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
