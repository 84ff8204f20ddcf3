"""Sections about the algorithm: reward, curriculum, KL penalty and objective."""

from typing import Annotated, Literal

from pydantic import Field

from expo.config.section import Fraction, Index, NonNegative, Positive, Seconds, Section, Weight
from expo_kernels.objective import RolloutCorrection


class RewardSection(Section):
    """The verifier, its worker processes and their timeout, and the other terms of the reward."""

    verifier: Annotated[str, Field(pattern=r"^(math|exact|choice|reasoning-gym|[\w.]+:\w+)$")] = "math"
    """What gives the verdicts: math, exact, choice, reasoning-gym, or your own function as package.module:function;
    docs/verifier.md describes them."""
    unevaluated: Literal["refuse", "accept"] = "refuse"
    """Verdict on an operation that is still to be computed where the gold answer is a value, such as 12 * 12 for 144;
    refuse: wrong, and counted in the metric unevaluated_fraction; accept: correct."""
    think_tags: dict[str, str] = {"<think>": "</think>"}
    """Tags around the model's thinking, as {opening: closing}: only what follows the last closing tag is read."""
    workers: Annotated[int, Field(ge=1, le=512)] = 2
    """Worker processes; they start at the first answer that needs computer algebra."""
    timeout_s: Seconds = 5.0
    """Seconds per answer. After that the worker is killed and the verdict is `timeout` (reward 0, counted apart)."""
    correct_weight: NonNegative = 1.0
    """Weight of the verdict (1 for a correct reply, else 0) in the reward from which advantages are computed."""
    functions: dict[str, Weight] = {}
    """Reward functions and their weights, as {"package.module:function": weight}; expo/rewards/compose.py documents
    their signature. Built in: expo.formats:boxed, expo.formats:think_then_answer."""
    overlong_buffer: Index = 0
    """Length in tokens of the interval before rollout.max_new_tokens in which the overlong penalty grows from 0 to 1
    (DAPO eq. 13; its recipe: 4,096 of 20,480); 0: no penalty."""
    overlong_penalty: Positive = 1.0
    """Weight of the overlong penalty (DAPO recipe: 1)."""


class CurriculumSection(Section):
    """How training questions are drawn (paper eq. 6, 7)."""

    kind: Literal["gcs", "uniform"] = "gcs"
    """gcs: Gaussian curriculum sampling; uniform: all questions have the same weight (GRPO)."""
    mean: Fraction = 0.5
    """mu, the pass rate with the largest weight (paper: 0.5)."""
    std: Annotated[float, Field(ge=0.001, le=1000)] = 0.35
    """sigma, standard deviation of the Gaussian in pass rate (paper: 0.35); 0.15 for many unsolvable questions, then
    with estimate posterior (docs/curriculum.md)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """alpha, weight of the old pass rate in the moving average (paper: 0.9)."""
    initial_pass_rate: Fraction = 0.5
    """Pass rate of a question before its first visit (paper: 0.5)."""
    estimate: Literal["ema", "counted", "posterior"] = "ema"
    """Estimate of a pass rate; ema: the paper's moving average, counted: a running mean until 1/(1 - momentum) visits,
    then the moving average, posterior: as counted, and questions are drawn by pass rates from their Beta posterior
    (MoPPS, arXiv 2507.04632). Below ten visits of a question ema is close to uniform: prefer one of the others
    (docs/curriculum.md)."""


class KLSection(Section):
    """The KL penalty between the policy and the reference policy (paper eq. 3, 4, 8)."""

    beta: NonNegative = 0.02
    """KL coefficient before scaling (paper: 0.02); 0: no KL penalty, and no reference model is loaded. Tune it before
    rho: a coefficient that was too large cost more pass@32 than rho = tanh gave back (docs/experiment.md)."""
    rho: Literal["tanh", "constant"] = "tanh"
    """Scaling of beta; tanh: beta * (tanh(accuracy) + 1) / 2, EXPO's accuracy-conditioned KL; constant: none (GRPO)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator (paper: k3)."""


class ObjectiveSection(Section):
    """The policy loss (paper eq. 2), with the DAPO recipe's constants; docs/losses.md lists the named losses."""

    surrogate: Literal["clip", "cispo", "sapo", "gmpo", "vespo"] = "clip"
    """Surrogate objective (paper: clip)."""
    clip_low: Fraction = 0.2
    """Lower clip range: the importance ratio is clipped at 1 - clip_low (DAPO recipe: 0.2)."""
    clip_high: NonNegative = 0.28
    """Upper clip range: the importance ratio is clipped at 1 + clip_high (DAPO recipe: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1, le=1e6)] | None = 10.0
    """Where the advantage A is negative, the loss is at most dual_clip * |A| (DAPO recipe: 10); null: no limit."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token (GRPO) or per sequence (GSPO)."""
    aggregation: Literal["token", "sequence", "sum", "constant"] = "token"
    """How the token losses of an update are aggregated; token: mean over all tokens (DAPO recipe), sequence: mean over
    sequences of token means, sum: mean over sequences of token sums, constant: as sum, over rollout.max_new_tokens."""
    rollout_correction: RolloutCorrection | None = None
    """Correction of the mismatch between rollout engine and trainer: weights w = exp(old - rollout log-prob) on the
    surrogate, per token or per sequence. token, sequence: w is cut at rollout_cap (truncated importance sampling);
    token_mask (IcePop), sequence_mask: w is 0 outside rollout_floor to rollout_cap; geometric_mask (Geo-RS): w is 1,
    but 0 in sequences whose geometric mean of w is outside these bounds; null: none."""
    rollout_floor: NonNegative = 0.0
    """Lower bound of w (IcePop: 0.5)."""
    rollout_cap: Positive = 2.0
    """Upper bound of w (verl's and TRL's default: 2; IcePop: 5)."""
    entropy_bonus: NonNegative = 0.0
    """Coefficient of the entropy bonus: the loss is lowered by this much per nat of entropy (paper: no bonus)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the population std of their group (paper eq. 1) or of the batch, or not divided."""
    mask_truncated: bool = False
    """Exclude replies cut at rollout.max_new_tokens from the loss and its denominators (DAPO's overlong filtering).
    They are graded, and count in advantages, accuracy and pass rates."""
