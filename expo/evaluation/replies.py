"""replies.jsonl: every graded reply of an evaluation, the replies to one question in consecutive lines."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from expo.rewards.groups import GradedRollouts
from expo.run.logs import parse_object

REPLIES = "replies"  # .jsonl
NEEDED = {
    "set": str, "sample": int, "question_id": str, "question": str, "reply": str, "verdict": str, "num_tokens": int,
    "truncated": bool,
}  # fmt: skip


def reply_rows(set_name: str, graded: GradedRollouts, num_samples: int) -> Iterator[dict[str, Any]]:
    """The lines of replies.jsonl for some questions of a set, each with num_samples replies."""
    return ({"set": set_name, "sample": index % num_samples, **row} for index, row in enumerate(graded.rows()))


def resume_replies(path: Path, num_samples: int, set_names: Collection[str]) -> dict[str, int]:
    """Truncates a file of replies after the last question whose num_samples replies are all there.

    From the first line on that is no reply, all are sampled again.

    Returns: the number of such questions in each set.
    """
    num_done: dict[str, int] = {}
    if not path.exists():
        return num_done
    position = end = 0
    group: list[tuple[str, str]] = []  # set and question of the replies to the present question
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            row = parse_object(line)
            if not line.endswith(b"\n") or not _is_reply(row) or row["set"] not in set_names:
                break
            group.append((row["set"], row["question_id"]))
            if row["sample"] != len(group) - 1 or len(set(group)) > 1:
                break
            if len(group) == num_samples:
                num_done[row["set"]] = num_done.get(row["set"], 0) + 1
                group, end = [], position
    os.truncate(path, end)
    return num_done


def _is_reply(row: dict[str, Any]) -> bool:
    """Whether a line has what the scores are computed from."""
    return all(isinstance(row.get(name), kind) for name, kind in NEEDED.items()) and {"level", "stated"} <= set(row)


def read_replies(path: Path, set_names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The replies of each set without texts, which may not fit in memory."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in set_names}
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            del row["reply"], row["question"]
            rows[row["set"]].append(row)
    return rows


def rows_of_set(path: Path, set_name: str) -> Iterator[dict[str, Any]]:
    """The replies of one set with their texts, in order."""
    with path.open(encoding="utf-8") as file:
        yield from (row for row in map(json.loads, file) if row["set"] == set_name)
