"""Generation by vLLM servers in processes of their own, over HTTP, on copies of the policy's weights.

The ranks of a run share the servers: each rank sends its requests to some of them, rank 0 sends the weights to all.
Every reply names the weights it was sampled with. Replies sampled with stale weights are regenerated, and so are those
whose server died.
"""

import functools
import math
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from expo.config import EngineConfig, VllmSection
from expo.errors import ConfigError, EngineError
from expo.rollout.engine import GenerationRequest, Sampling
from expo.rollout.exact import VARIABLE
from expo.rollout.vllm._compat import ADAPTER_NAME
from expo.rollout.vllm.client import RequestPool, Server, ServerUnavailable, retry
from expo.rollout.vllm.common import engine_settings, make_reply, max_lora_rank, reply_jobs, score_jobs
from expo.rollout.vllm.key import new_key, read_key
from expo.rollout.vllm.supervisor import ServerProcess, Supervisor
from expo.rollout.vllm.transfer.broadcast import WeightBroadcast
from expo.rollout.vllm.transfer.files import WeightFiles
from expo.rollout.vllm.transfer.group import BACKEND
from expo.rollout.vllm.transfer.interface import weight_version
from expo.rollout.weight_samples import WeightDescription
from expo.runtime.distributed import Ranks
from expo.types import Reply

GENERATE = "/inference/v1/generate"  # tokens in, tokens out; served with --tokens-only
SETTINGS = "/server_info?config_format=json"
T = TypeVar("T")
MOST_IDS = 2**31  # no vocabulary has more
STALE_WEIGHTS = "it does not have the current weights"


class ServerEngine:
    """Samples from the servers' copies of the policy's weights, which `load_weights` updates; one on every rank.

    Args:
        config: of the run.
        tokenizer: the policy's tokenizer.
        end_ids: tokens that end a reply.
        ranks: the processes of the run; all methods but `generate` and `score` are called by all of them together.
        folder: of the run, with its config.yaml; the servers' logs are written there.

    Raises: ConfigError if a server does not start, does not answer, or has other settings.
    """

    def __init__(
        self, config: EngineConfig, tokenizer: Any, end_ids: frozenset[int], ranks: Ranks, folder: Path
    ) -> None:
        self._config, self._section, self._ranks = config, config.vllm, ranks
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._supervisors: list[Supervisor] = []
        self._weights: WeightFiles | WeightBroadcast | None = None
        self._version: str | None = None
        if not config.vllm.servers:
            _require_startable(config.vllm, ranks)
        urls, key, self.version = ranks.run_on_rank0(lambda: self._open(folder))
        own = [url for number, url in enumerate(urls) if number % ranks.size == ranks.rank]
        chosen = own or [urls[ranks.rank % len(urls)]]  # with fewer servers than ranks, some ranks share one
        self._servers = [Server(url, config.vllm.patience_s, key) for url in chosen]

    def _open(self, folder: Path) -> tuple[list[str], str, str]:
        """Starts the run's own servers; returns all URLs, once ready, their key, and the last one's vLLM version."""
        section = self._section
        key = read_key(section.key_file) if section.servers else new_key()
        files = WeightFiles(section.weights_folder) if section.transfer == "files" else None
        processes: list[ServerProcess | None] = [None] * len(section.servers)
        urls = list(section.servers)
        if not urls:
            started = [self._process(folder, number, files, key) for number in range(section.num_servers)]
            urls, processes = [process.url for process in started], [*started]
        servers = [Server(url, section.patience_s, key) for url in urls]
        weights: WeightFiles | WeightBroadcast = files or WeightBroadcast(
            servers, section.tensor_parallel, self._ranks.device, section.patience_s
        )
        self._weights = weights
        for server, process in zip(servers, processes, strict=True):
            self._supervisors.append(Supervisor(server, process, weights, section.patience_s))
        try:
            for supervisor in self._supervisors:
                supervisor.start()
            for supervisor in self._supervisors:
                self._wait_until_ready(supervisor)
                _require_guard(supervisor.server, section.patience_s)
                version = require_settings(self._config, supervisor.server, on_gpu=self._ranks.device.type == "cuda")
        except BaseException:
            self.close()
            raise
        return urls, key, version

    def _wait_until_ready(self, supervisor: Supervisor) -> None:
        try:
            supervisor.wait_until_ready()
        except ConfigError as error:
            if not self.takes_adapters:
                raise
            raise ConfigError(f"{error}; if vLLM's LoRA does not support the model, take vllm.lora = merged") from error

    def _process(self, folder: Path, number: int, files: WeightFiles | None, key: str) -> ServerProcess:
        width = self._section.tensor_parallel
        gpus = self._section.gpus[number * width : (number + 1) * width]
        log = folder / f"vllm-server-{number}.log"
        weights = None if files is None else files.folder
        return ServerProcess(folder / "config.yaml", log, weights, gpus, self._config.run.threads, key)

    @property
    def needs_weight_sync(self) -> bool:
        """True: the weights are copies of the policy's."""
        return True

    @property
    def takes_adapters(self) -> bool:
        """Whether `load_weights` and `stage_weights` take LoRA adapters alone."""
        return self._section.lora == "adapter"

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """For each request one reply per seed, in order; `on_progress` is called at least twice a second.

        Raises: EngineError if a server is unavailable for too long, or dies too often.
        """
        jobs = reply_jobs(requests, sampling, self._end_ids)
        read = functools.partial(_sampled, most_tokens=sampling.max_new_tokens)
        done = iter(self._run(jobs, read, on_progress))
        return [
            [make_reply(self._tokenizer, self._end_ids, *next(done)) for _ in request.seeds] for request in requests
        ]

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probability in nats of every token of given replies. Raises: as `generate`."""
        found = iter(self._run(score_jobs(prompts, replies, temperature), _scored, None))
        return [[next(found)[token] for token in reply] for reply in replies]

    def load_base_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Stores the weights to which adapters are applied; each server loads them before its first adapter. All ranks
        iterate together.

        Raises: EngineError, on every rank, if they cannot be stored.
        """
        weights = iter(weights)
        self._on_rank0(lambda transfer: transfer.keep_base(weights), weights)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends the policy's weights from rank 0 to every server; all ranks iterate over them together.

        Raises: EngineError, on every rank, if they cannot be stored or a server does not load them.
        """
        weights = iter(weights)

        def send(transfer: WeightFiles | WeightBroadcast) -> str | None:
            transfer.publish(weights)
            self._require_current_weights()
            return transfer.version

        self._version = self._on_rank0(send, weights)

    def stage_weights(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Stores the policy's weights for a later `use_weights`, while the servers sample with those that they have.

        All ranks iterate together. Returns: the name of the weights.

        Raises: EngineError, on every rank, if they cannot be stored.
        """
        weights = iter(weights)
        version = self._on_rank0(lambda transfer: transfer.stage(weights), weights)
        assert version is not None
        return version

    def use_weights(self, version: str) -> None:
        """Sends staged weights to every server; no reply may be requested meanwhile.

        Raises: EngineError, on every rank, if a server does not load them.
        """

        def send(transfer: WeightFiles | WeightBroadcast) -> str:
            transfer.use(version)
            self._require_current_weights()
            return version

        self._version = self._on_rank0(send, iter(()))

    def _require_current_weights(self) -> None:
        for supervisor in self._supervisors:
            supervisor.sync()

    def _on_rank0(
        self, act: Callable[[WeightFiles | WeightBroadcast], str | None], weights: Iterator[tuple[str, Tensor]]
    ) -> str | None:
        """What `act` returns on rank 0, on every rank. Raises: EngineError, on every rank."""
        version, problem = None, None
        try:
            if self._weights is not None:
                version = act(self._weights)
        except EngineError as error:
            problem = str(error)
        for _ in weights:  # gathering them is collective: the other ranks iterate too, and rank 0 if it failed
            pass
        version, problem = self._ranks.broadcast_from_rank0((version, problem))
        if problem is not None:
            raise EngineError(problem)
        return version

    def describe_weights(self) -> list[dict[str, WeightDescription]]:
        """The weights that this rank's servers hold, for each worker. Raises: as `generate`."""
        found = []
        for server in self._servers:
            ask = functools.partial(self._describe, server)
            found += retry(server, self._section.patience_s, self._check, ask)
        return found

    def _describe(self, server: Server) -> list[dict[str, WeightDescription]]:
        if weight_version(server) != self._version:
            raise ServerUnavailable(STALE_WEIGHTS)
        answer = server.post("/collective_rpc", {"method": "describe_weights"})
        with server.understand("/collective_rpc"):
            return [
                {
                    str(name): WeightDescription(
                        shape=[int(size) for size in found["shape"]],
                        dtype=str(found["dtype"]),
                        digest=str(found["digest"]),
                    )
                    for name, found in worker.items()
                }
                for worker in answer["results"]
            ]

    def sleep(self) -> None:
        """Does nothing: the servers have GPUs of their own."""

    def close(self) -> None:
        """Ends the servers that the run has started, and removes what the weight transfer has created."""
        for supervisor in self._supervisors:
            supervisor.close()
        if self._weights is not None:
            self._weights.close()

    def _run(
        self,
        jobs: Sequence[tuple[Sequence[int], dict[str, Any]]],
        read: Callable[[Any], T],
        on_progress: Callable[[int], None] | None,
    ) -> list[T]:
        """What `read` makes of the servers' choices, in order."""
        pool = RequestPool(self._servers, self._config.rollout.batch_size, self._section.patience_s, self._check)
        model = {"model": ADAPTER_NAME} if self.takes_adapters else {}
        bodies = [
            {"request_id": uuid.uuid4().hex, "token_ids": list(prompt), "sampling_params": options, **model}
            for prompt, options in jobs
        ]
        return pool.run(GENERATE, bodies, lambda body, answer: read(self._choice(body, answer)), on_progress or _ignore)

    def _check(self) -> None:
        for supervisor in self._supervisors:
            supervisor.check()

    def _choice(self, body: Any, answer: Any) -> Any:
        """The only choice in the answer to a request.

        Raises: ServerUnavailable if it is incomplete or sampled with stale weights; EngineError if it is the answer to
            another request.
        """
        (choice,) = answer["choices"]
        if not str(answer["request_id"]).endswith(body["request_id"]):  # vLLM adds a prefix
            raise EngineError(
                f"a vLLM server answers request {body['request_id']} with the reply to {answer['request_id']!r:.80}; "
                f"name the servers themselves in vllm.servers, not a proxy that swaps answers or sets X-Request-Id"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerUnavailable(f"it ended a reply early: {choice['finish_reason']}")
        versions = {span["version"] for span in choice["weight_versions"]}
        if self._version is not None and versions != {self._version}:
            raise ServerUnavailable(STALE_WEIGHTS)
        return choice


def _sampled(choice: Any, most_tokens: int) -> tuple[list[int], list[float]]:
    """Token ids and log-probs of a sampled reply. Raises: ValueError, LookupError, TypeError if it has another form."""
    token_ids, logps = choice["token_ids"], [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    if not 0 < len(token_ids) == len(logps) <= most_tokens:
        raise ValueError(f"{len(token_ids)} tokens with {len(logps)} log-probs; at most {most_tokens} were wanted")
    if not all(type(token) is int and 0 <= token < MOST_IDS for token in token_ids):
        raise ValueError("token ids that are none")
    if not all(math.isfinite(logp) for logp in logps):
        raise ValueError("log-probs that are not finite")
    return token_ids, logps


def _scored(choice: Any) -> dict[int, float]:
    """The log-probs of the only position of a reply, by token. Raises: as `_sampled`."""
    (position,) = choice["logprobs"]["content"]
    return {int(at["token_id"]): float(at["logprob"]) for at in position["top_logprobs"]}


def _ignore(_count: int) -> None:
    """Does nothing."""


def _ask(server: Server, patience_s: float, path: str) -> Any:
    return retry(server, patience_s, lambda: None, lambda: server.get(path))


def _require_guard(server: Server, patience_s: float) -> None:
    """Raises: ConfigError if a server also takes calls without its key."""
    stranger = Server(server.url, patience_s)
    try:
        _ask(stranger, patience_s, SETTINGS)
    except EngineError:
        return
    raise ConfigError(
        f"the vLLM server {server.url} takes calls without a key, so anyone who reaches it can change its weights; "
        f"start it with python -m expo.serve"
    )


def _require_startable(section: VllmSection, ranks: Ranks) -> None:
    """Raises: ConfigError if the run cannot start servers for these ranks."""
    if section.key_file is not None:
        raise ConfigError(
            "vllm.key_file is for servers that others start, but vllm.servers is empty: the run gives a new key to the "
            "servers that it starts; remove vllm.key_file, or set vllm.servers"
        )
    if ranks.device.type == "cuda" and not section.gpus:
        raise ConfigError(
            "rollout.engine = vllm-server needs GPUs of its own: name GPUs in vllm.gpus that no rank uses, or take "
            "rollout.engine = vllm, which shares them"
        )
    hosts = sorted(set(ranks.gather(socket.gethostname())))
    if len(hosts) > 1:
        raise ConfigError(
            f"rollout.engine = vllm-server starts servers on the machine of rank 0 only, where ranks on other machines "
            f"({', '.join(hosts)}) cannot reach them; start servers by python -m expo.serve, name them in vllm.servers"
        )


def require_settings(config: EngineConfig, server: Server, *, on_gpu: bool) -> str:
    """A server's vLLM version. Raises: ConfigError if the server's settings differ from those that the run needs."""
    try:
        info, version = (_ask(server, config.vllm.patience_s, path) for path in (SETTINGS, "/version"))
    except EngineError as error:
        raise ConfigError(f"{error}; start it with python -m expo.serve, which sets what the run needs") from error
    try:
        with server.understand("/server_info"):
            _require_settings(config, server, info["vllm_config"], on_gpu=on_gpu)
            _require_exact(config, server, info["vllm_env"])
            return str(version["version"])
    except EngineError as error:
        raise ConfigError(str(error)) from error


def _require_settings(config: EngineConfig, server: Server, settings: dict[str, Any], *, on_gpu: bool) -> None:
    parts = [part for part in settings.values() if isinstance(part, dict)]
    found = {name: value for part in parts for name, value in part.items()}
    dtype, max_tokens = getattr(torch, config.policy.dtype), config.max_tokens
    needed = engine_settings(config.vllm, dtype=dtype, is_cpu=False, num_replies=1, max_tokens=max_tokens)
    for name in ("dtype", "generation_config", "logprobs_mode", "skip_tokenizer_init", "tensor_parallel_size"):
        if str(found.get(name)).removeprefix("torch.") != str(needed[name]):
            raise ConfigError(
                f"the vLLM server {server.url} has {name} = {found.get(name)}, but the run needs {needed[name]}; start "
                f"it with python -m expo.serve and the run's configuration"
            )
    if found["max_model_len"] < max_tokens:
        raise ConfigError(
            f"the vLLM server {server.url} takes {found['max_model_len']} tokens, but prompts and replies may have "
            f"{max_tokens}; start it with python -m expo.serve and the run's configuration"
        )
    if config.vllm.transfer == "broadcast":
        _require_broadcast(server, settings, on_gpu=on_gpu)
    if config.vllm.lora == "adapter":
        _require_lora(server, settings, max_lora_rank(config.policy.lora_rank))


def _require_lora(server: Server, settings: dict[str, Any], rank: int) -> None:
    """Raises: ConfigError if a server cannot apply an adapter."""
    found = (settings.get("lora_config") or {}).get("max_lora_rank")
    if str(found) != str(rank):
        raise ConfigError(
            f"the vLLM server {server.url} has max_lora_rank = {found}, but vllm.lora = adapter needs {rank}; start it "
            f"with python -m expo.serve and the run's configuration"
        )


def _require_exact(config: EngineConfig, server: Server, variables: dict[str, Any]) -> None:
    """Raises: ConfigError if a server does not sample as rollout.exact says."""
    found = variables.get(VARIABLE, False)
    if config.rollout.exact and str(found) not in ("True", "1"):
        raise ConfigError(
            f"the vLLM server {server.url} has {VARIABLE} = {found}, but rollout.exact = true needs its "
            f"batch-invariant mode; start it with python -m expo.serve and the run's configuration"
        )


def _require_broadcast(server: Server, settings: dict[str, Any], *, on_gpu: bool) -> None:
    """Raises: ConfigError if rank 0 cannot broadcast weights to a server."""
    found = (settings.get("weight_transfer_config") or {}).get("backend")
    if found != BACKEND:
        raise ConfigError(
            f"the vLLM server {server.url} has the weight transfer {found}, but vllm.transfer = broadcast needs "
            f"{BACKEND}; start it with python -m expo.serve and the run's configuration"
        )
    kind = (settings.get("device_config") or {}).get("device_type")
    if on_gpu and kind == "cpu":
        raise ConfigError(
            f"the vLLM server {server.url} runs on a CPU and rank 0 on a GPU, and vllm.transfer = broadcast needs the "
            f"same kind of device on both; take vllm.transfer = files"
        )
