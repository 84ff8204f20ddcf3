"""Generation by vLLM in the trainer's own process, on a copy of the policy's weights."""

import functools
import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from expo.config import VllmSection
from expo.errors import ConfigError
from expo.rollout.engine import GenerationRequest, Sampling
from expo.rollout.exact import set_batch_invariant
from expo.rollout.vllm._compat import (
    ADAPTER_ID,
    ADAPTER_NAME,
    abort_requests,
    forget_layers,
    keep_process_group,
    load_adapter,
    pack_tied_head,
    require_batch_invariance,
    unshared_memory_names,
)
from expo.rollout.vllm.common import (
    MADE_FOR_TEXT,
    check_ranks,
    check_vllm,
    describe_model,
    engine_settings,
    make_reply,
    refuse_unadaptable,
    reply_jobs,
    score_jobs,
    version,
)
from expo.rollout.weight_samples import WeightDescription
from expo.runtime.logging_filters import errors_only
from expo.types import Reply

NEEDED = {  # the attributes that the adapter uses, by class; checked instead of trusting the version number
    "LLM": ("enqueue", "collective_rpc", "apply_model", "reset_prefix_cache", "sleep", "wake_up"),
    "SamplingParams": ("logprob_token_ids", "seed", "detokenize"),
}


class VllmEngine:
    """Samples from a copy of the policy's weights that `load_weights` updates.

    Args:
        path: transformers folder or hub id; only the architecture is read from it.
        tokenizer: the policy's tokenizer.
        end_ids: tokens that end a reply.
        section: memory and compilation.
        dtype: of the weights and matrix products, as in the policy.
        device: where it runs; vLLM uses GPU number LOCAL_RANK with several ranks, the first one otherwise.
        num_replies: most replies generated at once.
        max_tokens: most tokens of a prompt and its reply together.
        num_ranks: processes of the run; every `section.tensor_parallel` consecutive ranks form one engine and must get
            the same requests.
        is_exact: whether it samples in vLLM's batch-invariant mode.
        engine_args: of vLLM's `EngineArgs`: `hub_options` of the model and, if `load_weights` takes an adapter, its
            `lora_settings`; None: vLLM's defaults.

    Raises: ConfigError if vLLM is not installed, lacks a function or refuses the model, or if tensor_parallel does not
        divide num_ranks.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        end_ids: frozenset[int],
        section: VllmSection,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_replies: int,
        max_tokens: int,
        num_ranks: int = 1,
        is_exact: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        if section.sleep and device.type == "cpu":
            raise ConfigError("vllm.sleep = true needs a GPU: vLLM has no sleep mode on a CPU; turn it off")
        if num_ranks == 1 and device.index:
            raise ConfigError(
                f"run.device = {device}, but vLLM in one process runs on the first GPU; take run.device = cuda and "
                f"CUDA_VISIBLE_DEVICES={device.index}"
            )
        check_ranks(section, num_ranks)
        if is_exact:
            set_batch_invariant()
        self._vllm = _vllm()
        if is_exact:
            require_batch_invariance()
        self._sleeps, self._is_asleep = section.sleep, False
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._is_cpu = device.type == "cpu"
        settings = engine_settings(
            section, dtype=dtype, is_cpu=self._is_cpu, num_replies=num_replies, max_tokens=max_tokens
        )
        settings |= dict(engine_args or {})
        self._adapter = _adapter_request() if settings.get("enable_lora") else None
        if num_ranks > 1:
            settings["distributed_executor_backend"] = "external_launcher"
        has_memory = self._is_cpu and section.tensor_parallel > 1
        set_num_threads = torch.set_num_threads
        try:
            with unshared_memory_names() if has_memory else nullcontext(), _silent(is_deep=self._is_cpu):
                self._llm = self._vllm.LLM(path, **settings)
        except ValueError as error:
            message = " ".join(str(error).split())[:500]
            other = "rollout.engine = transformers" if self._adapter is None else "vllm.lora = merged"
            raise ConfigError(
                f"vLLM {version()} refuses model.path = {path}: {message}; choose another model, or take {other}"
            ) from error
        finally:
            torch.set_num_threads = set_num_threads  # vLLM replaces it by a function that warns
        keep_process_group(self._llm)

    @property
    def needs_weight_sync(self) -> bool:
        """True: the weights are a copy of the policy's."""
        return True

    @property
    def takes_adapters(self) -> bool:
        """Whether `load_weights` takes a LoRA adapter alone."""
        return self._adapter is not None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """For each request one reply per seed, in order; `on_progress` is called after every token of the batch."""
        done = iter(self._run(reply_jobs(requests, sampling, self._end_ids), on_progress))
        return [[self._reply(next(done)) for _ in request.seeds] for request in requests]

    def load_base_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads the weights to which adapters are applied."""
        self._reload(weights)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads the policy's weights, or its adapter, and drops the prefix cache, which was computed with the old ones.

        Raises: EngineError if vLLM cannot apply the adapter.
        """
        if self._adapter is None:
            self._reload(weights)
        else:
            for unknown in self._llm.apply_model(functools.partial(load_adapter, matrices=dict(weights))):
                refuse_unadaptable(unknown)
        self._reset_cache()

    def _reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights in the place of all that the engine has.

        A sleeping engine allocates and loads the weights, and only then the key-value cache, whose memory is free for
        the loading meanwhile.
        """
        with _silent():
            if self._is_asleep:
                self._wake_up("weights")
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            if self._is_asleep:
                self._wake_up("kv_cache")
                self._is_asleep = False
        self._llm.apply_model(pack_tied_head)

    def sleep(self) -> None:
        """Frees weights and key-value cache, if `section.sleep` is set."""
        if self._sleeps and not self._is_asleep:
            with _silent():
                self._llm.sleep(level=2)  # 2: weights are discarded, since the next sync sends all of them
            self._is_asleep = True

    def _wake_up(self, part: str) -> None:
        # vLLM allocates outside of PyTorch's cache, which keeps the memory that the update or the loading has freed
        torch.cuda.empty_cache()
        self._llm.wake_up(tags=[part])

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache of the old weights; expected no running request")

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probability in nats of every token of given replies."""
        outputs = iter(self._run(score_jobs(prompts, replies, temperature), None))
        return [[next(outputs).logprobs[0][token].logprob for token in reply] for reply in replies]

    def describe_weights(self) -> list[dict[str, WeightDescription]]:
        """The weights that this rank's part of the engine holds."""
        found: list[dict[str, WeightDescription]] = self._llm.apply_model(describe_model)
        return found

    def close(self) -> None:
        """Frees the weights and the key-value cache; the engine cannot be used any more."""
        if self._llm is not None:
            self._llm.apply_model(forget_layers)
        self._llm = None
        gc.unfreeze()  # vLLM has frozen what it made, which the garbage collector would never free
        gc.collect()

    def _run(
        self, jobs: Sequence[tuple[Sequence[int], dict[str, Any]]], on_progress: Callable[[int], None] | None
    ) -> list[Any]:
        """The completions, in order; if an exception is raised meanwhile, all requests are aborted."""
        engine, outputs = self._llm.llm_engine, []
        prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in jobs]
        params = [self._vllm.SamplingParams(**options) for _, options in jobs]
        ids = self._llm.enqueue(prompts, params, lora_request=self._adapter, use_tqdm=False)
        try:
            while engine.has_unfinished_requests():
                finished = [output for output in engine.step() if output.finished]
                outputs += finished
                if on_progress is not None:
                    on_progress(len(finished))
        except BaseException:
            abort_requests(self._llm, ids)
            raise
        assert len(outputs) == len(jobs), f"vLLM gave {len(outputs)} replies to {len(jobs)} requests"
        return [output.outputs[0] for output in sorted(outputs, key=lambda output: int(output.request_id))]

    def _reply(self, output: Any) -> Reply:
        ids = list(output.token_ids)
        logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
        return make_reply(self._tokenizer, self._end_ids, ids, logps)


def _vllm() -> Any:
    """The vllm module, imported on first use, set to run in this process and to log errors only."""
    check_vllm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _silent():
        import vllm

        missing = [
            f"{owner}.{name}" for owner, names in NEEDED.items() for name in names if not _has(vllm, owner, name)
        ]
    if missing:
        raise ConfigError(
            f"vLLM {version()} has no {', '.join(missing)}, which rollout.engine = vllm needs; install version "
            f"{MADE_FOR_TEXT}, or take rollout.engine = transformers"
        )
    return vllm


def _adapter_request() -> Any:
    """What a request names to be computed with the adapter, whose matrices `load_adapter` gives to vLLM."""
    from vllm.lora.request import LoRARequest

    # without an adapter of that number vLLM looks for this folder, which does not exist, and raises
    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, "/nonexistent/loaded-by-a-weight-sync")


def _has(vllm: Any, owner: str, name: str) -> bool:
    cls = getattr(vllm, owner)
    return hasattr(cls, name) or name in getattr(cls, "__struct_fields__", ())


@contextmanager
def _silent(*, is_deep: bool = False) -> Iterator[None]:
    """Inside, log lines below ERROR and FutureWarnings are hidden; with `is_deep`, all output of the process is.

    Hidden output is shown if the block fails. `is_deep` is for starting on a CPU, where vLLM's C++ code writes to
    stderr directly.
    """
    with errors_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with _captured_output() if is_deep else nullcontext():
            yield


@contextmanager
def _captured_output() -> Iterator[None]:
    """Inside, what the process writes to stdout and stderr is captured; it is shown if the block fails."""
    streams = (sys.stdout, sys.stderr)
    originals = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as file:
        for stream, number in zip(streams, (1, 2), strict=True):
            stream.flush()
            os.dup2(file.fileno(), number)
        failed = True
        try:
            yield
            failed = False
        finally:
            for stream, number, original in zip(streams, (1, 2), originals, strict=True):
                stream.flush()
                os.dup2(original, number)
                os.close(original)
            if failed:
                file.seek(0)
                sys.stderr.write(file.read().decode(errors="replace"))
