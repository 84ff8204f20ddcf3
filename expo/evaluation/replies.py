"""replies.jsonl: every graded reply of an evaluation, the replies to one question in consecutive lines."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from expo.rewards.groups import GradedRollouts

REPLIES = "replies"  # .jsonl


def reply_rows(set_name: str, graded: GradedRollouts, num_samples: int) -> Iterator[dict[str, Any]]:
    """The lines of replies.jsonl for some questions of a set, each with num_samples replies."""
    return ({"set": set_name, "sample": index % num_samples, **row} for index, row in enumerate(graded.rows()))


def resume_replies(path: Path, num_samples: int) -> dict[str, int]:
    """Truncates a file of replies after the last question whose num_samples replies are all there.

    Returns: the number of such questions in each set.
    """
    num_done: dict[str, int] = {}
    if not path.exists():
        return num_done
    position = end = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["sample"] == num_samples - 1 and line.endswith(b"\n"):
                num_done[row["set"]] = num_done.get(row["set"], 0) + 1
                end = position
    os.truncate(path, end)
    return num_done


def read_replies(path: Path, set_names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The replies of each set without texts, which may not fit in memory."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in set_names}
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            del row["reply"], row["question"]
            rows[row["set"]].append(row)
    return rows
