"""The policy loss of RL with verifiable rewards, from hidden states to gradients, for any GRPO-style trainer.

The linear loss never materializes [tokens, vocabulary] logits. Log-probs are float32 whatever the model's dtype. The
KL coefficient, the advantages and the curriculum stay on the device. `expo_loss`, `linear_expo_loss` and
`expo_loss_from_logps` compute the loss from logits, hidden states and log-probs; `Objective` selects the variant;
`python -m expo_kernels` checks this machine.
"""

from expo_kernels._validate import debug_checks
from expo_kernels.advantages import akl_beta, group_advantages
from expo_kernels.curriculum import CurriculumTable
from expo_kernels.linear_loss import LinearExpoLoss, linear_expo_loss
from expo_kernels.logps import linear_token_logps, token_logps
from expo_kernels.objective import Objective
from expo_kernels.policy_loss import ExpoLoss, LossOutput, expo_loss, expo_loss_from_logps

__all__ = [
    "CurriculumTable",
    "ExpoLoss",
    "LinearExpoLoss",
    "LossOutput",
    "Objective",
    "akl_beta",
    "debug_checks",
    "expo_loss",
    "expo_loss_from_logps",
    "group_advantages",
    "linear_expo_loss",
    "linear_token_logps",
    "token_logps",
]
