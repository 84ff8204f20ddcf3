"""Make the shipped ledger model: a small Qwen3 taught by a solver that knows the rule but slips.

    python -m expo.ledger.warm_start --out DIR [--seed 0]

The solver is careful at first; later it slips often where a step crosses a ten and seldom elsewhere. So the
model learns the rule (its most likely reply is mostly right) yet samples like its teacher, and that gap is
what reinforcement learning closes. One seed gives the same weights each time on one machine.

The folder DIR, which must not exist yet, appears whole or not at all: weights, config, tokenizer, and
`provenance.json` with the hash of these scripts, the settings and the final scores.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from expo.ledger import questions
from expo.ledger.questions import LedgerQuestion
from expo.ledger.tokenizer import BOXED, build_tokenizer
from expo.runtime.endings import errors_on_one_line

SCRIPTS = ("questions.py", "tokenizer.py", "warm_start.py")
IGNORED = -100  # transformers' label for a token that carries no loss
MAX_REPLY_TOKENS = 32  # a right reply of level 8 has 26 at most


@dataclass(frozen=True)
class WarmStart:
    """Settings of the warm start; the defaults are what the shipped weights were made with."""

    seed: int = 0
    # optimiser steps, and demonstrations in each: many small steps learn more than few large ones
    steps: int = 6000
    batch: int = 32
    # peak of AdamW's learning rate, the steps that lead up to it, and the share of it left at the end:
    # weights settled at a rate of 0 gained less from reinforcement learning at 2e-4
    lr: float = 2e-3
    lr_warmup_steps: int = 50
    final_lr_share: float = 0.15
    # steps over which the levels widen from 1 to 6, and steps before the solver starts to slip
    widening_steps: int = 600
    careful_steps: int = 3000
    # chance that the solver's next total is wrong, for operations that cross a ten and for the others
    slip_crossing: float = 0.45
    slip_other: float = 0.08
    # samples per question behind the scores, at temperature 1
    score_samples: int = 64
    spread_samples: int = 16
    threads: int = 1


def build_model(vocab_size: int, pad_id: int, eos_id: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of about 0.9 million float32 parameters, from torch's global generator."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
    )
    model = Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=MAX_REPLY_TOKENS,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
    )
    return model


def sloppy_reply(question: str, rng: random.Random, slip_crossing: float, slip_other: float) -> str:
    """The solver's reply: each total follows from the one it wrote before, and may be off by 1 or by 10."""
    first, *steps = re.findall(r"[+-]?\d", question)
    total, totals = int(first), list[int]()
    for step in steps:
        # only a slip can lead outside the range; the solver then stays at its edge
        right = min(max(total + int(step), 0), questions.MAX_TOTAL)
        slip = slip_crossing if right // 10 != total // 10 else slip_other
        total = _near_miss(right, rng) if rng.random() < slip else right
        totals.append(total)
    return "".join(f"{t}," for t in totals[:-1]) + f"{BOXED}{totals[-1]}}}"


def _near_miss(right: int, rng: random.Random) -> int:
    misses = [m for m in (right - 10, right - 1, right + 1, right + 10) if 0 <= m <= questions.MAX_TOTAL]
    return misses[int(rng.random() * len(misses))]


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, step: int, settings: WarmStart
) -> tuple[Tensor, Tensor]:
    """Token ids and labels [batch, T] int64 of one step's fresh demonstrations, padded on the right."""
    longest = max(questions.TRAIN_STEPS)
    hardest = min(longest, 1 + longest * step // settings.widening_steps)
    is_sloppy = step >= settings.careful_steps
    slips = (settings.slip_crossing, settings.slip_other) if is_sloppy else (0.0, 0.0)
    ids, labels = [], []
    for _ in range(settings.batch):
        drawn = questions.draw_training_question(rng, 1 + int(rng.random() * hardest))
        prompt = tokenizer.encode(drawn.question)
        reply = [*tokenizer.encode(sloppy_reply(drawn.question, rng, *slips)), tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + reply))
        labels.append(torch.tensor([IGNORED] * len(prompt) + reply))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, IGNORED)


def learning_rate(step: int, settings: WarmStart) -> float:
    """Learning rate of a step counted from 0: a linear rise, then a cosine down to its final share."""
    if step < settings.lr_warmup_steps:
        return settings.lr * (step + 1) / settings.lr_warmup_steps
    progress = (step - settings.lr_warmup_steps) / (settings.steps - settings.lr_warmup_steps)
    share = settings.final_lr_share + (1 - settings.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * share


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: WarmStart) -> None:
    """Supervised training on the solver's replies, in place."""
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    model.train()
    for step in range(settings.steps):
        ids, labels = demonstrations(tokenizer, rng, step, settings)
        # padding is on the right, where causal attention already keeps it from every real token
        loss = model(input_ids=ids, labels=labels).loss
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{settings.steps}  loss {loss.item():.4f}", flush=True)
    model.train(False)


@torch.no_grad()
def count_correct(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[LedgerQuestion],
    samples: int,
    *,
    greedy: bool = False,
    rows: int = 1024,
) -> list[int]:
    """Right replies among `samples` per question, at temperature 1 unless greedy; `rows` sampled at a time."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].question))
    per_chunk = max(1, rows // samples)
    counts = [0] * len(asked)
    for start in range(0, len(order), per_chunk):
        chunk = [i for i in order[start : start + per_chunk] for _ in range(samples)]
        prompts = tokenizer([asked[i].question for i in chunk], padding=True, return_tensors="pt")
        made = model.generate(  # type: ignore[misc]
            input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=not greedy
        )
        replies = tokenizer.batch_decode(made[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        for i, reply in zip(chunk, replies, strict=True):
            counts[i] += reply.endswith(f"{BOXED}{asked[i].answer}}}")
    return counts


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that k of the samples hold a right one (Chen et al., arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over questions and the half-width of its 95 % normal interval."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": round(mean, 4), "ci95": round(1.96 * math.sqrt(variance / len(values)), 4)}


def scores(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[LedgerQuestion],
    samples: int,
) -> dict[str, dict[str, float]]:
    """Greedy accuracy and sampled pass@1, 8, 32, each a mean over questions with its 95 % interval."""
    greedy = count_correct(model, tokenizer, asked, 1, greedy=True)
    sampled = count_correct(model, tokenizer, asked, samples)
    table = {"greedy": mean_with_interval(greedy)}
    for k in (1, 8, 32):
        table[f"pass@{k}"] = mean_with_interval([pass_at_k(samples, c, k) for c in sampled])
    return table


def pass_rate_histogram(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: WarmStart
) -> dict[str, Any]:
    """How many training questions of seed 0 fall in each tenth of pass rate; rate 1 is in the last."""
    asked = questions.train_questions(0)
    counts = count_correct(model, tokenizer, asked, settings.spread_samples)
    tenths = [0] * 10
    for count in counts:
        tenths[min(9, 10 * count // settings.spread_samples)] += 1
    never, always = counts.count(0), counts.count(settings.spread_samples)
    return {"samples": settings.spread_samples, "questions_per_tenth": tenths, "never": never, "always": always}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def script_hashes() -> dict[str, str]:
    """SHA-256 of each script that the weights depend on."""
    return {name: sha256(Path(__file__).parent / name) for name in SCRIPTS}


def make(settings: WarmStart, out: Path) -> None:
    """Train, score, and write the model folder `out`."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hashes = script_hashes()
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    started = time.monotonic()
    train(model, tokenizer, settings)
    seconds = time.monotonic() - started
    provenance = {
        "script_sha256": hashes,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": model.num_parameters(),
        "training_seconds": round(seconds, 1),
        "held_out": scores(model, tokenizer, questions.held_out_questions(), settings.score_samples),
        "beyond": scores(model, tokenizer, questions.beyond_questions(), settings.score_samples),
        "training_pass_rates": pass_rate_histogram(model, tokenizer, settings),
    }
    print(json.dumps(provenance, indent=2))
    save(model, tokenizer, provenance, out)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, provenance: dict[str, Any], out: Path) -> None:
    """Write everything to a temporary folder beside `out`, then rename it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as parent:
        folder = Path(parent) / out.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.chmod(0o644)  # it was written for its owner alone
        provenance = {**provenance, "weights_sha256": sha256(weights)}
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        folder.rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 where DIR already exists."""
    parser = argparse.ArgumentParser(prog="python -m expo.ledger.warm_start", description="Make the ledger model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--seed", type=int, default=WarmStart.seed, help="of the weights and demonstrations")
    parser.add_argument("--steps", type=int, default=WarmStart.steps, help="optimiser steps")
    given = parser.parse_args(arguments)
    if given.out.exists():
        parser.error(f"--out {given.out} exists already; name a new folder or remove it")
    with errors_on_one_line(parser.prog):
        make(WarmStart(seed=given.seed, steps=given.steps), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
