"""Short runs of the embedded task, and what two of them must have in common."""

import json
import zlib

from expo.config import load_config
from tests.ranks.running import outcome_of, write_questions

QUICK = {
    "run.steps": 4,
    "run.checkpoint_every": 1,
    "rollout.questions_per_step": 2,
    "rollout.group_size": 4,
    "optimizer.warmup_steps": 1,
    "evaluation.num_samples": 1,
    "evaluation.every": 2,
}


def quick(folder, name="run", **overrides):
    """The configuration of a run in folder/name."""
    questions = write_questions(folder / "few.jsonl", [4, 5])
    values = {**QUICK, "run.dir": str(folder / name), "evaluation.sets": {"few": str(questions)}}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return load_config(None, list(values.items()))


def weights_of(run):
    """Digest of the exported weights."""
    return outcome_of(run)["weights"]


def records_of(run):
    """The rows of every log without times."""
    return {name: rows for name, rows in outcome_of(run).items() if name != "weights"}


def rewrite_manifest(checkpoint, without=(), **changes):
    """Makes the manifest of a checkpoint fit whatever is in its folder, as somebody who forges one would."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file != path]
    content["files"] = {
        file.relative_to(checkpoint).as_posix(): [file.stat().st_size, zlib.crc32(file.read_bytes())] for file in files
    }
    content.update(changes)
    for name in ("crc", *without):
        del content[name]
    path.write_text(json.dumps({**content, "crc": zlib.crc32(json.dumps(content, sort_keys=True).encode())}))
