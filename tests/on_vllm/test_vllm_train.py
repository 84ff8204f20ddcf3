"""The whole algorithm with vLLM."""

import json
import subprocess
import sys


def test_a_run_with_vllm_is_quiet_and_in_step(tmp_path):
    questions = tmp_path / "few.jsonl"
    questions.write_text('{"question": "2+4=", "answer": 6}\n{"question": "3+5=", "answer": 8}\n')
    settings = {
        "rollout.engine": "vllm", "run.dir": tmp_path / "run", "run.steps": 3, "optimizer.warmup_steps": 1,
        "rollout.questions_per_step": 4, "rollout.group_size": 4, "evaluation.sets": f"{{few: {questions}}}",
        "evaluation.num_samples": 2,
    }  # fmt: skip
    command = [sys.executable, "-m", "expo.train", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    starts = ("ledger:train:", "evaluation after", "step ", "set ", "---", "few ", "run: ", "report: ")
    assert [line for line in done.stdout.splitlines() if not line.startswith(starts)] == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        # the trained model's logits reach 30 nats, where float32 has steps of 2e-6
        assert 0 < row["sync_max_abs_dlogp"] < 5e-5
        assert row["rollout_logp_difference_max"] < 5e-5
