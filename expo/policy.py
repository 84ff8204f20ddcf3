"""The policy under training, by DeepSpeed: log-probabilities, the loss and the step, on one rank or many.

Policy, old and reference log-probabilities come from one code path (`expo_kernels`), over the same micro-batches and
at one temperature: before the first update every ratio is exactly 1 and the KL exactly 0.

Every rank is given all samples of a step and takes its share, so the denominators of means are known to each without
asking, before the first backward pass; neither the number of ranks nor how micro-batches are cut changes the step.
"""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expo.batch import Batch, collate, pack, share_by_tokens, split_by_tokens
from expo.config import ConfigError, PolicySection, RunConfig
from expo.lora import adapters_off, add_adapters, merged
from expo.mismatch import Mismatch
from expo.model import PolicyModule, load_model, logit_softcap
from expo.quiet import errors_only
from expo.ranks import Ranks

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or DeepSpeed looks for one

GATHER_ELEMENTS = 2**28  # parameters that ZeRO 3 brings together at once when weights leave the policy: 1 GiB
BUCKET_ELEMENTS = 2 * 10**8  # of gradients reduced at once; DeepSpeed holds a buffer of that size, 2 GB by its default


@dataclass(frozen=True)
class Sample:
    """One reply to learn from: prompt_ids, reply_ids, the rollout's logps of those in nats, and its advantage.

    One that is left out takes its place among the mini-batches and no part in the loss, its denominators included.
    """

    prompt_ids: Sequence[int]
    reply_ids: Sequence[int]
    rollout_logps: Sequence[float]
    advantage: float
    is_left_out: bool = False

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward-backward pass reads.

    advantages: [B] float32; rollout_logps: [B, S] (packed: [N]) float32 nats, what the rollout engine said when it
    sampled; old_logps: the same shape, or None where the policy has not moved since it sampled; ref_logps: the same
    shape, or None without a reference policy.
    """

    batch: Batch
    advantages: Tensor
    rollout_logps: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step reads: this rank's micro-batches, and the sizes of the whole step over all ranks."""

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int  # of replies
    lengths: list[int]  # tokens of every sequence, prompt and reply
    num_positions: int  # with padding, over all ranks


class Policy(Protocol):
    """What the training loop needs of a policy."""

    def prepare(self, samples: Sequence[Sample]) -> list[MiniBatch]:
        """The optimizer steps that all ranks' `samples` make, with old and reference logps of this rank's share."""

    def update(self, mini_batch: MiniBatch, beta: Tensor) -> dict[str, float]:
        """One optimizer step; its metrics, as means over all tokens of the step."""

    def mismatch(self) -> dict[str, float]:
        """How far the rollout engine's log-probs were from the policy's, over all updates since `prepare`."""

    def save(self, folder: Path) -> None:
        """Writes all that training needs to go on with equal bits, with the other ranks, into an empty folder."""

    def load(self, folder: Path, other_ranks: bool = False) -> None:
        """Takes up what `save` wrote, on another number of ranks where `other_ranks`."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, under its name in the model; all ranks go through it together."""

    def export(self, folder: Path) -> None:
        """Writes the weights as a transformers folder; all ranks call it."""


class DeepSpeedPolicy:
    """A transformers model trained by AdamW, its states split over the ranks as `policy.zero_stage` says.

    Args:
        config: the run's; its model, policy, optimizer, kl, objective and rollout sections are read.
        ranks: the processes of the run.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        section, self._optimizer_section = config.policy, config.optimizer
        self._section: PolicySection = section
        self._ranks = ranks
        self._num_updates = config.run.steps * section.updates_per_step
        self._updates_done = 0
        self._mismatch = Mismatch()
        self.dtype: torch.dtype = getattr(torch, section.dtype)
        with _loading(section):
            self.model, self.tokenizer = load_model(config.model, ranks.device)
            wants_reference = config.kl.beta > 0 and section.lora_rank == 0
            reference = load_model(config.model, ranks.device)[0] if wants_reference else None
        self._objective = dataclasses.replace(config.loss_objective(), logit_softcap=logit_softcap(self.model))
        self._entropy_bonus = config.objective.entropy_bonus
        if section.lora_rank:
            add_adapters(self.model, section.lora_rank, section.lora_alpha)
        if section.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._pad_id = self.tokenizer.pad_token_id
        if self._pad_id is None:
            self._pad_id = self.tokenizer.eos_token_id
        self._engine = self._initialize(self._module(self.model).train(), self._adamw())
        self._reference = self._frozen(reference, config.kl.beta)

    def _module(self, model: Any) -> PolicyModule:
        return PolicyModule(model, self._objective, self.dtype, self._section.logits_budget_mb)

    def _adamw(self) -> torch.optim.Optimizer:
        section = self._optimizer_section
        return torch.optim.AdamW(
            _parameter_groups(self.model, section.weight_decay),
            lr=section.lr,
            betas=section.betas,
            fused=self._ranks.device.type == "cuda" and not self._section.offload_optimizer,
        )

    def _initialize(self, module: PolicyModule, optimizer: torch.optim.Optimizer | None) -> Any:
        deepspeed = _deepspeed()
        stage = self._section.zero_stage
        # without ZeRO the norm is taken here: DeepSpeed would not tell it, nor skip a step by it
        clip = self._optimizer_section.max_grad_norm if stage and optimizer is not None else 0.0
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        settings = {**_deepspeed_config(self._section, num_parameters), "gradient_clipping": clip}
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]

    def _frozen(self, reference: Any | None, beta: float) -> "Callable[[Batch], Tensor] | None":
        """Log-probs of a batch under the reference policy; None without a KL penalty."""
        if beta == 0:
            return None
        if reference is None:
            return self._logps_without_adapters
        module = self._module(reference).eval().requires_grad_(False)
        if self._section.zero_stage == 3:
            return self._no_grad(self._initialize(module, None).module)
        if not self._section.offload_reference:
            return self._no_grad(module)
        module.to("cpu")

        def brought_in(batch: Batch) -> Tensor:
            module.to(self._ranks.device)
            try:
                return self._no_grad(module)(batch)
            finally:
                module.to("cpu")

        return brought_in

    @staticmethod
    def _no_grad(module: Any) -> Callable[[Batch], Tensor]:
        def logps(batch: Batch) -> Tensor:
            with torch.no_grad():
                found: Tensor = module(batch)
            return found

        return logps

    def _logps_without_adapters(self, batch: Batch) -> Tensor:
        with adapters_off(self.model):
            return self.logps(batch)

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        section, step = self._optimizer_section, self._updates_done
        warmup = section.warmup_steps * self._section.updates_per_step
        if step < warmup:
            return section.lr * (step + 1) / warmup
        if section.schedule == "linear":
            return section.lr * (self._num_updates - step) / (self._num_updates - warmup)
        return section.lr

    def logps(self, batch: Batch) -> Tensor:
        """Log-probabilities [B, S] (packed: [N]) of the reply tokens under the present weights, nats; 0 elsewhere."""
        return self._no_grad(self._engine.module)(batch)

    # --- one batch of rollouts into optimizer steps

    def prepare(self, samples: Sequence[Sample]) -> list[MiniBatch]:
        """Equal mini-batches in the order given, each shared out by tokens and cut into micro-batches."""
        self._mismatch = Mismatch()
        size = len(samples) // self._section.updates_per_step
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]
        return [self._mini_batch([sample for sample in part if not sample.is_left_out]) for part in parts]

    def _mini_batch(self, samples: Sequence[Sample]) -> MiniBatch:
        lengths = [len(sample) for sample in samples]
        plan = self._plan(lengths)
        mine = [self._micro_batch([samples[row] for row in rows]) for rows in plan[self._ranks.rank]]
        return MiniBatch(
            micro_batches=mine,
            num_sequences=len(samples),
            num_tokens=sum(len(sample.reply_ids) for sample in samples),
            lengths=lengths,
            num_positions=sum(_positions([lengths[row] for row in rows], self._section) for p in plan for rows in p),
        )

    def _plan(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Row numbers by rank and micro-batch; all ranks have as many micro-batches, empty ones if need be, since
        each pass may be a collective. There is one at least: a step is taken even where nothing is learnt.
        """
        plan = []
        for rows in share_by_tokens(lengths, self._ranks.size):
            groups = split_by_tokens(
                [lengths[row] for row in rows], self._section.micro_batch_tokens, padded=not self._section.packing
            )
            plan.append([[rows[index] for index in group] for group in groups])
        count = max(1, *(len(groups) for groups in plan))
        return [groups + [[]] * (count - len(groups)) for groups in plan]

    def _micro_batch(self, samples: Sequence[Sample]) -> MicroBatch:
        device = self._ranks.device
        # a rank with nothing to do passes one token that does not count
        prompts, replies = [s.prompt_ids for s in samples] or [[self._pad_id]], [s.reply_ids for s in samples] or [[]]
        if self._section.packing:
            batch = pack(prompts, replies, device)
        else:
            batch = collate(prompts, replies, self._pad_id, device)
        rollout_logps = torch.zeros(batch.completion_mask.shape, device=device)
        said = [logp for sample in samples for logp in sample.rollout_logps]
        rollout_logps[batch.completion_mask] = torch.tensor(said, device=device)
        return MicroBatch(
            batch=batch,
            advantages=torch.tensor([sample.advantage for sample in samples] or [0.0], device=device),
            rollout_logps=rollout_logps,
            old_logps=self._old_logps(batch, rollout_logps),
            ref_logps=self._reference(batch) if self._reference is not None else None,
        )

    def _old_logps(self, batch: Batch, rollout_logps: Tensor) -> Tensor | None:
        if self._section.old_logps == "rollout":
            return rollout_logps
        # one update per batch of rollouts is on-policy: its old log-probs are its own, and cost no pass
        return self.logps(batch) if self._section.updates_per_step > 1 else None

    # --- one optimizer step

    def update(self, mini_batch: MiniBatch, beta: Tensor) -> dict[str, float]:
        """One AdamW step on all ranks' micro-batches; `skipped` is 1 where loss or gradient was not finite."""
        means, ratio_max = _TokenMeans(), 0.0
        is_token_mean = self._objective.aggregation == "token"
        normalizer = float(max(mini_batch.num_tokens if is_token_mean else mini_batch.num_sequences, 1))
        last = len(mini_batch.micro_batches) - 1
        for index, micro in enumerate(mini_batch.micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss, metrics, logps = self._engine(
                micro.batch,
                advantages=micro.advantages,
                old_logps=micro.old_logps,
                ref_logps=micro.ref_logps,
                rollout_logps=micro.rollout_logps if self._objective.rollout_correction else None,
                beta=beta.to(self._ranks.device) if micro.ref_logps is not None else 0.0,
                entropy_bonus=self._entropy_bonus,
                normalizer=normalizer,
            )
            # DeepSpeed averages over ranks, and the normalizer has counted them all; a loss that is not finite makes
            # its gradient so, which every rank then sees
            self._engine.backward(loss * self._ranks.size * (1 + 0 * loss.detach()), scale_wrt_gas=False)
            self._note_mismatch(micro, logps)
            means.add(loss, metrics)
            ratio_max = max(ratio_max, float(metrics["ratio_max"]))
        rate, norm, applied = self._step()
        self._updates_done += 1
        return {
            **means.over(mini_batch.num_tokens, self._ranks),
            "ratio_max": self._ranks.maximum([ratio_max])[0],
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": float(not applied),
        }

    def _note_mismatch(self, micro: MicroBatch, logps: Tensor) -> None:
        if self._section.old_logps == "recompute":
            logps = logps if micro.old_logps is None else micro.old_logps
        elif self._updates_done % self._section.updates_per_step:
            return  # the policy has moved, and what it said before was not asked
        self._mismatch.add(logps, micro.rollout_logps, micro.batch.completion_mask)

    def mismatch(self) -> dict[str, float]:
        """The metrics of `expo.mismatch` since `prepare`; with old_logps = rollout, of the first update alone."""
        return self._mismatch.metrics(self._ranks)

    def _step(self) -> tuple[float, float, bool]:
        """Learning rate, gradient norm before clipping, and whether the weights moved."""
        engine, rate = self._engine, self.learning_rate
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        if self._section.zero_stage == 0:
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._optimizer_section.max_grad_norm))
            if not torch.isfinite(torch.tensor(norm)):
                engine.zero_grad()
                return rate, norm, False
            engine.step()
            return rate, norm, True
        engine.step()
        return rate, float(engine.get_global_grad_norm()), bool(engine.was_step_applied())

    # --- weights and states

    def save(self, folder: Path) -> None:
        """Writes DeepSpeed's states and the number of updates done; every rank writes its part.

        Raises: OSError if this rank could not, after all ranks have come through.
        """
        state = {"updates_done": self._updates_done}
        with errors_only(), _writing_on(self._engine) as failures:
            self._engine.save_checkpoint(str(folder), tag="policy", client_state=state, save_latest=False)
        if failures:
            raise OSError(str(failures[0]).splitlines()[0]) from failures[0]

    def load(self, folder: Path, other_ranks: bool = False) -> None:
        """Takes up a state that `save` wrote, in place: engines that share the model see it.

        Where the number of ranks is another, states that ZeRO has split are put together and split anew.
        """
        converts = other_ranks and self._section.zero_stage > 0
        if converts:
            folder = self._universal(folder)
        self._engine._config.load_universal_checkpoint = converts  # read by load_checkpoint alone
        with errors_only():
            path, state = self._engine.load_checkpoint(str(folder), tag="policy")
        assert path is not None, f"{folder} holds no DeepSpeed checkpoint"
        self._updates_done = state["updates_done"]
        if converts:
            self._ranks.wait()
            if self._ranks.is_first:
                shutil.rmtree(folder)

    def _universal(self, folder: Path) -> Path:
        """A copy of a DeepSpeed checkpoint that any number of ranks can load, beside the one it is made from."""
        converted = folder.parent.with_name(f".{folder.parent.name}.universal")

        def convert() -> None:
            shutil.rmtree(converted, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            paths = ["--input_folder", str(folder / "policy"), "--output_folder", str(converted / "policy")]
            done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
            if done.returncode:
                problem = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                shutil.rmtree(converted, ignore_errors=True)
                raise ConfigError(
                    f"the checkpoint {folder.parent} was made by another number of ranks and could not be converted "
                    f"for {self._ranks.size}: {problem}; resume with as many as made it"
                )

        self._ranks.on_first(convert)
        return converted

    @property
    def is_whole(self) -> bool:
        """Whether `model` holds every weight on every rank, so that an engine can share it."""
        return self._section.zero_stage < 3

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, in `policy.dtype` under its name in the model, adapters merged in; a tied head is
        named once. All ranks go through it together; a tensor may be kept.
        """
        if self._section.lora_rank:
            yield from merged(dict(self._whole_parameters()), self.model).items()
        else:
            yield from self._whole_parameters()

    def _whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        deepspeed = _deepspeed()
        bucket: list[tuple[str, Any]] = []

        def flush() -> list[tuple[str, Tensor]]:
            parameters = [parameter for _, parameter in bucket]
            with deepspeed.zero.GatheredParameters(parameters) if not self.is_whole else nullcontext():
                # copies: what is gathered is gone when the block ends
                found = [(name, value.detach().to(self.dtype, copy=True)) for name, value in bucket]
            bucket.clear()
            return found

        held = 0
        for name, parameter in self.model.named_parameters():
            size = getattr(parameter, "ds_numel", parameter.numel())
            if bucket and held + size > GATHER_ELEMENTS:
                yield from flush()
                held = 0
            bucket.append((name, parameter))
            held += size
        yield from flush()

    def export(self, folder: Path) -> None:
        """Writes safetensors in `policy.dtype`, config and generation config, by rank 0; all ranks call it."""
        state = {name: value.cpu() for name, value in self.named_weights()}
        if not self._ranks.is_first:
            return
        names = set(self.model.state_dict())
        tied = {name: state[kept] for name, kept in getattr(self.model, "all_tied_weights_keys", {}).items()}
        state.update({name: value for name, value in tied.items() if name in names})
        self.model.save_pretrained(folder, state_dict=state)
        config = copy.deepcopy(self.model.config)
        config.dtype = self.dtype  # save_pretrained notes the parameters' own
        config.save_pretrained(folder)


class _TokenMeans:
    """Token means of a step over micro-batches and ranks; the loss is a plain sum."""

    names = ("loss", "kl", "entropy", "ratio_mean", "clip_low_fraction", "clip_high_fraction")

    def __init__(self) -> None:
        self._sums = [0.0] * len(self.names)

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch."""
        sums = [metrics[name].double() * metrics["tokens"] for name in self.names[1:]]
        added = torch.stack([loss.detach().double(), *sums]).tolist()
        self._sums = [held + more for held, more in zip(self._sums, added, strict=True)]

    def over(self, num_tokens: int, ranks: Ranks) -> dict[str, float]:
        """The means, by name, of a step with `num_tokens` tokens over all ranks."""
        loss, *sums = ranks.total(self._sums)
        return dict(zip(self.names, [loss, *(value / max(num_tokens, 1) for value in sums)], strict=True))


def _positions(lengths: Sequence[int], section: PolicySection) -> int:
    """Positions that a micro-batch of these sequences takes up."""
    return sum(lengths) if section.packing else len(lengths) * max(lengths, default=0)


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dims = {id(parameter): len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters}
    return [
        {"params": [p for p in parameters if dims[id(p)] >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if dims[id(p)] < 2], "weight_decay": 0.0},
    ]


def _deepspeed_config(section: PolicySection, num_parameters: int = BUCKET_ELEMENTS) -> dict[str, Any]:
    """DeepSpeed's settings; source: docs/_pages/config-json.md of deepspeed 0.19."""
    bucket = min(num_parameters, BUCKET_ELEMENTS)
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # counts passes; what a pass holds is ours to say
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": section.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": offload} if section.offload_optimizer else {}),
            **({"offload_param": offload} if section.offload_parameters else {}),
        },
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: no compiler needed, fused on a GPU
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


@contextmanager
def _loading(section: PolicySection) -> Iterator[None]:
    """Inside, ZeRO 3 has transformers load each rank's part of a model only."""
    if section.zero_stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _deepspeed()
    held = HfDeepSpeedConfig(_deepspeed_config(section))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del held


def _deepspeed() -> Any:
    """The library, loaded when first used; it takes seconds."""
    with errors_only():
        import deepspeed
    # of its own calls, which its users cannot change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # its shared-memory collectives for CPUs would be compiled on the spot, and spin for ever where a rank has died
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _writing_on(engine: Any) -> Iterator[list[Exception]]:
    """Inside, a file that cannot be written is listed and the engine goes on: its ranks wait for each other after
    writing, and one that an error kept away would leave the others waiting.
    """
    failures: list[Exception] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def attempt(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save gives a RuntimeError for some full disks
            failures.append(error)

    writer.save = attempt
    # two scripts that nothing here reads, copied by rank 0 alone
    engine._copy_recovery_script = lambda _: None
    try:
        yield failures
    finally:
        del writer.save, engine._copy_recovery_script
