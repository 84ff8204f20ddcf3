"""The design of the frontier plan, fixed before its first result: arms, seeds, settings, measures and their order.

Runs of the same seed are paired: they share the warm start, the questions, the random numbers and the budget of sampled
tokens, and differ only in arm and KL coefficient.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from expo.experiments.frontier.pool import frontier_harder, frontier_held_out, frontier_questions
from expo.ledger import LedgerQuestion

PRIMARY_ARM, BASELINE = "expo", "grpo"
MATCHED, MATCHED_PAIR = "grpo-matched", "akl"
HELD_OUT, HARDER = "held_out", "harder"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: ("--curriculum.kind=uniform", "--kl.rho=constant"),
    PRIMARY_ARM: ("--curriculum.kind=gcs", "--kl.rho=tanh"),
    MATCHED_PAIR: ("--curriculum.kind=uniform", "--kl.rho=tanh"),
    "gcs": ("--curriculum.kind=gcs", "--kl.rho=constant"),
    MATCHED: ("--curriculum.kind=uniform", "--kl.rho=constant"),  # its beta is the mean of its pair's
    "expo-counted": ("--curriculum.kind=gcs", "--kl.rho=tanh", "--curriculum.estimate=counted"),
    "expo-posterior": ("--curriculum.kind=gcs", "--kl.rho=tanh", "--curriculum.estimate=posterior"),
    "grpo-dynamic": ("--curriculum.kind=uniform", "--kl.rho=constant", "--rollout.max_resamples=3"),
    "expo-dynamic": ("--curriculum.kind=gcs", "--kl.rho=tanh", "--rollout.max_resamples=3"),
}
"""Flags of `python -m expo.train` by arm, in the order in which they run; the first two are the primary comparison."""

# the settings of the embedded task's recipe that matter, written out: a changed default is not a changed plan
_SHARED = (
    "--run.steps=1000",  # the token budget ends every run earlier
    "--run.checkpoint_every=50",
    "--run.keep_checkpoints=1",
    "--run.keep_best=false",
    "--run.completions_per_step=0",
    "--run.threads=1",
    "--data.prompt=plain",
    "--data.chat_template=false",
    "--data.max_prompt_tokens=20",
    "--rollout.max_new_tokens=30",
    "--reward.verifier=expo.experiments.frontier.chain:has_right_chain",
    "--rollout.questions_per_step=32",
    "--rollout.group_size=8",
    "--rollout.batch_size=512",
    "--rollout.temperature=1.0",
    "--objective.clip_low=0.2",
    "--objective.clip_high=0.2",
    "--policy.dtype=float32",
    "--policy.micro_batch_tokens=4096",
    "--policy.updates_per_step=1",
    "--optimizer.lr=2.0e-4",
    "--optimizer.warmup_steps=10",
    "--optimizer.schedule=constant",  # one that decays with steps would favour arms with short replies
    "--evaluation.num_samples=16",
    "--evaluation.every=20",
)


@dataclass(frozen=True)
class Plan:
    """What is run and compared.

    seeds, extension: of the primary comparison, and those that its width may add. secondary_seeds: of the other arms.
    warm_starts: seeds of the initial models; a run of seed s starts from warm_starts[s % len(warm_starts)].
    num_replies: n, replies to each held-out question at the end. train, sets: the questions, by seed and by set.
    """

    name: str
    reply_tokens: int
    num_replies: int
    betas: tuple[float, ...] = (0.02, 0.2)
    seeds: int = 12
    extension: int = 12
    secondary_seeds: int = 6
    warm_starts: tuple[int, ...] = (0, 2, 3)
    arms: Mapping[str, Sequence[str]] = field(default_factory=lambda: ARMS)
    flags: tuple[str, ...] = _SHARED
    train: Callable[[int], list[LedgerQuestion]] = frontier_questions
    sets: Mapping[str, Callable[[], list[LedgerQuestion]]] = field(
        default_factory=lambda: {HELD_OUT: frontier_held_out, HARDER: frontier_harder}
    )

    def warm_start(self, seed: int) -> int:
        """The seed of the initial model of a run."""
        return self.warm_starts[seed % len(self.warm_starts)]

    def keys(self, *, extended: bool = False) -> list["RunKey"]:
        """All runs in the order in which they start: the primary comparison first, seed by seed, so that pairs finish
        together and a part of the plan is a smaller plan."""
        primary = self.seeds + (self.extension if extended else 0)
        keys = [
            RunKey(arm, beta, seed) for seed in range(primary) for beta in self.betas for arm in (BASELINE, PRIMARY_ARM)
        ]
        others = [arm for arm in self.arms if arm not in (BASELINE, PRIMARY_ARM)]
        keys += [
            RunKey(arm, beta, seed) for seed in range(self.secondary_seeds) for beta in self.betas for arm in others
        ]
        return keys

    def run_flags(self, key: "RunKey", beta: float) -> tuple[str, ...]:
        """Flags of a run without paths; `beta` differs from the key's for grpo-matched alone."""
        budget = f"--run.reply_tokens={self.reply_tokens}"
        return (*self.flags, budget, *self.arms[key.arm], f"--kl.beta={beta!r}", f"--run.seed={key.seed}")


@dataclass(frozen=True, order=True)
class RunKey:
    """One run of a plan: its arm, KL coefficient and seed."""

    arm: str
    beta: float
    seed: int

    @property
    def name(self) -> str:
        """As text, for messages."""
        return f"{self.arm}, beta {self.beta:g}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """As the name of a file or folder."""
        return f"{self.arm}-beta-{self.beta:g}-seed-{self.seed}"

    @property
    def pair(self) -> "RunKey | None":
        """The run that must finish first: that of the matched beta."""
        return RunKey(MATCHED_PAIR, self.beta, self.seed) if self.arm == MATCHED else None


def settings_digest(plan: Plan, key: RunKey, beta: float, weights_sha256: str) -> str:
    """SHA-256 of all that determines a run's result: flags, initial weights, questions and n. Paths are not in it."""
    content = {
        "flags": plan.run_flags(key, beta),
        "weights": weights_sha256,
        "train": _questions_digest(plan.train, key.seed),
        "sets": {name: _questions_digest(draw) for name, draw in plan.sets.items()},
        "num_replies": plan.num_replies,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def _questions_digest(draw: Callable[..., list[LedgerQuestion]], *seed: int) -> str:
    return hashlib.sha256(as_json_lines(draw(*seed)).encode()).hexdigest()


def as_json_lines(questions: Sequence[LedgerQuestion]) -> str:
    """The content of a question file."""
    return "".join(json.dumps(question._asdict()) + "\n" for question in questions)


FRONTIER = Plan("frontier", reply_tokens=800_000, num_replies=256)
SMOKE = Plan(
    "frontier-smoke",
    reply_tokens=600,
    num_replies=40,
    betas=(0.02,),
    seeds=2,
    extension=1,
    secondary_seeds=1,
    warm_starts=(0,),
    arms={arm: ARMS[arm] for arm in (BASELINE, PRIMARY_ARM, MATCHED_PAIR, MATCHED)},
    flags=(*_SHARED, "--rollout.questions_per_step=4", "--evaluation.num_samples=2", "--evaluation.every=1"),
    train=lambda seed: frontier_questions(seed)[:8],
    sets={HELD_OUT: lambda: frontier_held_out()[:3], HARDER: lambda: frontier_harder()[:2]},
)
"""The same machinery in a minute: its numbers mean nothing."""
PLANS = {plan.name: plan for plan in (FRONTIER, SMOKE)}
