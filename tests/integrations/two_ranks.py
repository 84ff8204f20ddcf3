"""One rank of three runs, under torchrun: python two_ranks.py MODEL OUT STAGE, the ZeRO stage or "ddp"."""

import os
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

from expo_kernels.integrations.trl import ExpoGRPOTrainer
from tests.integrations.trl_runs import make_trainer


def main() -> None:
    """Run TRL's trainer, ours as plain GRPO, and ours as EXPO; write their results to OUT."""
    model, out, stage = sys.argv[1:]
    zero = {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True} if stage != "ddp" else None
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    settings = {
        "deepspeed": {**sizes, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False} if zero else None,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "beta": 0.02,
    }
    plain = {"rho": "constant", "curriculum": "uniform"}
    runs = {"trl": (GRPOTrainer, {}), "plain": (ExpoGRPOTrainer, plain), "expo": (ExpoGRPOTrainer, {})}
    found = {}
    for name, (trainer_class, extra) in runs.items():
        trainer = make_trainer(trainer_class, Path(model), extra=extra, **settings)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        found[name] = {"history": history, "state": trainer.accelerator.get_state_dict(trainer.model_wrapped)}
    found["table"], found["beta"] = trainer.curriculum.state_dict(), trainer._beta_eff
    torch.save(found, Path(out) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
