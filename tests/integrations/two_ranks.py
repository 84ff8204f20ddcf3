"""One rank of three runs, under torchrun: python two_ranks.py MODEL OUT STAGE, the ZeRO stage, "ddp" or "fsdp2"."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from trl import GRPOTrainer

from expo_kernels.integrations._trl_head import _whole
from expo_kernels.integrations.trl import ExpoGRPOTrainer
from tests.integrations.trl_runs import make_trainer


def shard_on_cpu() -> None:
    """Let accelerate use FSDP on a CPU, where it would replicate the model without a word."""
    prepared = AcceleratorState.__init__

    def prepare(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        prepared(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = prepare


def check_gathered_head() -> None:
    """A head that FSDP2 has left sharded is gathered, and has the mean gradient of the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    head = nn.Parameter(distribute_tensor(torch.arange(6.0).view(3, 2), mesh))
    whole = _whole(head)
    assert torch.equal(whole, torch.arange(6.0).view(3, 2))
    whole.backward(torch.full((3, 2), float(mesh.get_rank())))
    assert torch.equal(head.grad.full_tensor(), torch.full((3, 2), 0.5))


def main() -> None:
    """Run TRL's trainer, ours as plain GRPO, and ours as EXPO; write their results to OUT."""
    model, out, stage = sys.argv[1:]
    zero = {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True} if stage.isdigit() else None
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    if stage == "fsdp2":
        shard_on_cpu()
    sharded = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
    settings = {
        "deepspeed": {**sizes, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False} if zero else None,
        "fsdp": stage == "fsdp2",
        "fsdp_config": sharded if stage == "fsdp2" else None,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "beta": 0.02,
    }
    plain = {"rho": "constant", "curriculum": "uniform"}
    runs = {"trl": (GRPOTrainer, {}), "plain": (ExpoGRPOTrainer, plain), "expo": (ExpoGRPOTrainer, {})}
    if stage == "fsdp2":
        runs |= {f"{name} with LoRA": runs[name] for name in ("trl", "plain")}
    found = {}
    for name, (trainer_class, extra) in runs.items():
        trainer = make_trainer(trainer_class, Path(model), lora="LoRA" in name, extra=extra, **settings)
        trainer.train()
        if stage == "fsdp2":
            assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        found[name] = {"history": history, "state": trainer.accelerator.get_state_dict(trainer.model_wrapped)}
        if name == "expo":
            found["table"], found["beta"] = trainer.curriculum.state_dict(), trainer._beta_eff
    if stage == "fsdp2":
        check_gathered_head()
    torch.save(found, Path(out) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
    os._exit(0)  # a Gloo thread may abort an interpreter that is finalized
