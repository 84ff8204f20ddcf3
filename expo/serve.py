"""A vLLM server for rollout.engine = vllm-server: `python -m expo.serve CONFIG.yaml [--host=H] [--port=N] ...`.

Takes the configuration of the run that it will serve, with the same `--section.field=value` overrides, and starts
vLLM's HTTP server with the settings that the run needs. Every call needs the server's key, which is in the file that
vllm.key_file names, or in the environment variable VLLM_API_KEY.
"""

import argparse
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from expo.config import RunConfig, load_config
from expo.config.run import MOST_PORT
from expo.errors import ConfigError
from expo.learner.lora import linear_layers, write_zero_adapter
from expo.learner.model import architecture
from expo.learner.model_files import check_model_path, hub_options
from expo.rollout.exact import check_exact, set_batch_invariant
from expo.rollout.vllm._compat import ADAPTER_NAME, share_port
from expo.rollout.vllm.common import MADE_FOR_TEXT, check_vllm, engine_settings, lora_settings, version
from expo.rollout.vllm.key import VARIABLE, read_key
from expo.rollout.vllm.supervisor import fork_guarded
from expo.rollout.vllm.transfer.group import BACKEND
from expo.runtime.cli import add_field, field_names, flag_parser, read_flags, sections_of
from expo.runtime.endings import errors_on_one_line
from expo.runtime.flag_help import most_used

PROGRAM = "python -m expo.serve"
WORKER = "expo.rollout.vllm.worker.WeightReader"
GUARD = "expo.rollout.vllm.guard.RequireKey"
MODULE = "vllm.entrypoints.openai.api_server"  # runs vLLM's HTTP server
HOST, PORT = "127.0.0.1", "8000"
HOST_AND_PORT = f"""\
  --host HOST   address to listen at ({HOST}: this machine only)
  --port PORT   ({PORT})"""
COMMON = {
    "model.path": "transformers folder or hub id",
    "policy.dtype": "",
    "data.max_prompt_tokens": "longest prompt",
    "rollout.max_new_tokens": "longest reply",
    "vllm.key_file": "file with the key, else VLLM_API_KEY",
    "vllm.tensor_parallel": "GPUs of an engine",
    "vllm.gpu_memory_utilization": "share of a GPU's memory",
    "vllm.transfer": "",
    "vllm.lora": "",
    "run.device": "",
}
"""The settings that --help shows."""


def server_arguments(
    config: RunConfig, host: str, port: int, *, is_cpu: bool, lora: Mapping[str, Any] | None = None
) -> list[str]:
    """The command line of vLLM's HTTP server for a run; `lora`: its further arguments, from `adapter_arguments`."""
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
        **(lora or {}),
    }
    return [flag for name, value in settings.items() for flag in _flags(name, value)]


def _flags(name: str, value: Any) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]


@contextmanager
def adapter_arguments(config: RunConfig, parent: Path | None) -> Iterator[dict[str, Any]]:
    """Inside, the server's arguments for vllm.lora; for merged weights there are none.

    vLLM knows adapters by name from its start on, and only from files. Those of an adapter that changes nothing are in
    a new folder in `parent`; the first weight sync puts the policy's in its place.

    Raises: ConfigError if the model's configuration does not load.
    """
    if config.vllm.lora == "merged":
        yield {}
        return
    rank, model = config.policy.lora_rank, architecture(config.model)
    with tempfile.TemporaryDirectory(prefix="expo-adapter-", dir=parent) as folder:
        write_zero_adapter(Path(folder), model, rank)
        module = {"name": ADAPTER_NAME, "path": folder}
        yield {**lora_settings(rank, linear_layers(model)), "lora_modules": [json.dumps(module)]}


def _parser(prog: str) -> argparse.ArgumentParser:
    names = field_names(RunConfig)
    parser = flag_parser(
        prog,
        usage="%(prog)s [CONFIG.yaml] [--host=HOST] [--port=PORT]\n       [--section.field=value ...]",
        description="Serve a run's rollouts by vLLM; takes the configuration of the run.",
        short=f"{HOST_AND_PORT}\n\n{most_used(sections_of(RunConfig), COMMON)}",
        num_settings=len(names),
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="the configuration of the run")
    parser.add_argument("--host", default=HOST, help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", default=PORT, help="(default: %(default)s)")
    parser.add_argument("--guarded", action="store_true", help=argparse.SUPPRESS)  # ends the server when stdin closes
    parser.add_argument("--cleanup-dir", type=Path, help=argparse.SUPPRESS)  # removed when stdin closes
    for name in names:
        add_field(parser, RunConfig, name)
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) <= MOST_PORT):
        raise ConfigError(f"--port = {text[:80]!r}; expected a number from 1 to {MOST_PORT}")
    return int(text)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`. Serves until it is stopped; exits with code 2 and one line if it cannot start."""
    with errors_on_one_line(prog):
        known = ["--host", "--port", *(f"--{name}" for name in field_names(RunConfig))]
        options, overrides = read_flags(_parser(prog), sys.argv[1:] if argv is None else argv, known)
    if options["guarded"]:
        fork_guarded(options["cleanup_dir"])
    with errors_on_one_line(prog):
        config = load_config(options["config"], overrides)
        port = _port(options["port"])
        os.environ[VARIABLE] = read_key(config.vllm.key_file)  # for the guard, and for vLLM's worker processes
        check_vllm()
        if find_spec(MODULE) is None:
            raise ConfigError(f"vLLM {version()} has no {MODULE}; install version {MADE_FOR_TEXT}")
        is_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
        if config.rollout.exact:
            check_exact(config, on_gpu=not is_cpu)
            set_batch_invariant()
    os.umask(0o077)  # vLLM's processes talk over sockets in the folder for temporary files
    if is_cpu and config.vllm.tensor_parallel > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by default each worker needs a NUMA node
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # adds the routes that change weights
    os.environ.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)  # would add a route that loads adapters from any path
    # the processes of a server are on one machine; by default gloo listens where the machine's name leads to
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options["guarded"]:
        share_port()
    with ExitStack() as stack:
        with errors_on_one_line(prog):
            lora = stack.enter_context(adapter_arguments(config, options["cleanup_dir"]))
        sys.argv = [MODULE, *server_arguments(config, options["host"], port, is_cpu=is_cpu, lora=lora)]
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
