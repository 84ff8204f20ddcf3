"""Committed results to pages and pictures: `python -m benchmarks.report`.

Writes docs/benchmarks.md, the pictures in docs/benchmarks/, and the short table between the README's markers, from
nothing but the JSON in benchmarks/results/. Results of a tree with uncommitted changes are refused.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.charts import draw
from benchmarks.stamp import RESULTS, ROOT
from benchmarks.tables import (
    MEASURES,
    Row,
    better_peers,
    by_case,
    chunks_table,
    curriculum_table,
    growth_table,
    loss_table,
    measured,
    notes,
    rows_table,
    steadiness_table,
    step_table,
    summary_table,
    timed_table,
    verifier_table,
)
from benchmarks.targets import targets_section
from expo.runtime.atomic_io import write_bytes_whole

BEGIN, END = "<!-- benchmarks: made by python -m benchmarks.report -->", "<!-- /benchmarks -->"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
COMMANDS = {"cpu": "make bench", "cuda": "make gpu-bench"}
HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from the JSON in `benchmarks/results/`; nothing here was typed. `make bench` makes
the CPU's, `make gpu-bench` the GPU's. Every contender's loss and gradients were checked against float64 before it was
timed. In every round of a case the floor and then all contenders run once, in an order drawn anew, so that what else
the machine does falls on all; times are compared within rounds alone. `x floor` is the median over rounds of its time
by the floor's, the head's three products alone; `ours/it` that of ours by its, with the 20th and 80th percentiles.
Times are milliseconds; memory is the extra peak, gradients included, on a CPU in a fresh process; errors of gradients
are relative Frobenius norms, those of log-probs the largest in nats.
"""
ABOUT = {
    "loss": "## {device}: the policy loss with its gradients",
    "logps": "## {device}: log-probs without gradients\n\nThe floor is the product that makes the logits.",
    "rows": "## {device}: the loss on logits that are ready\n\nGB/s count two reads and one write of every logit.",
    "chunks": "## {device}: the size of a chunk\n\n`logits_budget_mb` in MiB: what less memory costs in time.",
    "growth": "## {device}: growth\n\nSlopes of logarithms: 1 is proportional, 0 constant. Every round gives a "
    "slope of time: their median, 20th and 80th percentiles.",
    "steadiness": "## {device}: what changes from step to step\n\nCounted while beta changes at every step.",
    "curriculum": "## {device}: the curriculum\n\n256 questions updated or drawn, by the number of all questions. A "
    "draw is timed from pass rates to questions: the peers make weights of all pass rates, ours holds the logarithms "
    "of its weights, which its update moves.",
    "verifier": "## {device}: the verifier\n\nReplies with new answers; ours in two worker processes, TRL's in the "
    "caller's own. Normal LaTeX: fractions, roots, polynomials, an equation, pi, units, a pair, a number.",
    "step": "## {device}: a training step\n\nThe embedded model, GRPO settings, transformers generation, float32; "
    "`benchmarks/trl_step.py` says all.",
}


class ReportError(Exception):
    """Results that cannot be published."""


def load(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Stamp and rows of every table, by its name and device.

    Raises: ReportError naming a file of an uncommitted tree.
    """
    found = {}
    for name in ABOUT:
        for device in DEVICES:
            path = folder / f"{name}-{device}.json"
            if path.exists():
                found[name, device] = json.loads(path.read_text(encoding="utf-8"))
                commit = found[name, device]["stamp"]["commit"]
                if commit.endswith("-dirty") or commit == "unknown":
                    command = COMMANDS[device]
                    raise ReportError(f"{path} is of commit {commit}; commit first, then measure again with {command}")
    return found


def page(found: dict[tuple[str, str], dict[str, Any]], pictures: dict[str, list[str]]) -> str:
    """docs/benchmarks.md."""
    parts = [HEAD]
    for device, title in DEVICES.items():
        tables = {name: found[name, device] for name in ABOUT if (name, device) in found}
        if not tables:
            parts.append(f"## {title}\n\nNo results are committed: `{COMMANDS[device]}` makes them.\n")
        else:
            parts.append(f"{targets_part(tables, device)}\n")
        stamp = None
        for name, table in tables.items():
            parts.append(f"{ABOUT[name].format(device=title)}\n")
            if table["stamp"] != stamp:  # tables of one run share it
                stamp = table["stamp"]
                parts.append(f"{provenance(stamp)}\n")
            parts.append(f"{SECTIONS[name](table['rows'])}\n")
            if name in MEASURES:
                better = better_peers(name, table["rows"])
                parts.append(
                    "\n".join(["Better than ours:\n", *better, ""]) if better else "Better than ours: nothing.\n"
                )
        parts += [f"![{picture}](benchmarks/{picture})\n" for picture in pictures.get(device, ())]
    return "\n".join(parts)


def targets_part(tables: dict[str, dict[str, Any]], device: str) -> str:
    """The section of targets of one device."""
    about = (
        "What this project holds itself to, by the numbers below. Times are judged by the median of `ours/it`; the "
        "brackets say how far rounds differ. Eager PyTorch is the leanest of its ways, log_softmax. An error within "
        "1 % of the best peer's is a tie."
    )
    rows = {name: table["rows"] for name, table in tables.items()}
    minutes = sum(table.get("seconds", 0.0) for table in tables.values()) / 60
    took = f"\n\nAll tables together took {minutes:.1f} minutes." if minutes else ""
    return f"## {DEVICES[device]}: targets\n\n{about}\n\n{targets_section(rows, device)}{took}"


def provenance(stamp: dict[str, Any]) -> str:
    """Where a table comes from, in a line or two."""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
    driver = f"driver {stamp['driver']}, CUDA {stamp['cuda']}, " if "driver" in stamp else ""
    return (
        f"*Commit {stamp['commit']}, {stamp['date']}, {stamp['machine']}, {stamp['cores']} cores, {stamp['threads']} "
        f"threads, load {stamp['load_average']} before, {driver}Python {stamp['python']}, {versions}.*"
    )


def loss_section(rows: list[Row]) -> str:
    """A table for every case, what did not run, and what each computes."""
    parts = [f"### {case}\n\n{loss_table(group)}" for case, group in by_case(measured(rows)).items()]
    parts.append(notes(rows))
    computed = {row["contender"]: row["computes"] for row in measured(rows)}
    parts.append("\n".join(f"- {name}: {what}" for name, what in computed.items()))
    return "\n\n".join(part for part in parts if part)


def logps_section(rows: list[Row]) -> str:
    """A table for log-probs, and one for log-probs with entropies."""
    return "\n\n".join(f"### {case}\n\n{timed_table(group)}" for case, group in by_case(rows).items())


def curriculum_section(rows: list[Row]) -> str:
    """The table and what could not be asked of the peers."""
    return f"{curriculum_table(rows)}\n\n{notes(rows)}".rstrip()


SECTIONS: dict[str, Callable[[list[Row]], str]] = {
    "loss": loss_section,
    "logps": logps_section,
    "rows": rows_table,
    "chunks": chunks_table,
    "growth": growth_table,
    "steadiness": steadiness_table,
    "curriculum": curriculum_section,
    "verifier": verifier_table,
    "step": step_table,
}


def short_section(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """What the README shows: the loss in short."""
    parts = []
    for device in DEVICES:
        if ("loss", device) in found:
            table = found["loss", device]
            parts.append(f"{summary_table(table['rows'])}\n\n{provenance(table['stamp'])}")
    return "\n\n".join(parts) or "No results are committed yet: `make bench` makes them."


def with_section(text: str, section: str) -> str:
    """`text` with `section` between its markers."""
    if BEGIN not in text or END not in text:
        raise ReportError(f"README.md has no place for the table: add the lines {BEGIN} and {END}")
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{section}\n\n{END}", text, flags=re.S
    )


def write(results: Path, root: Path) -> None:
    """Page, pictures and README section from the results of a folder."""
    found = load(results)
    pictures: dict[str, list[str]] = {}
    for device in DEVICES:
        tables = {name: table["rows"] for (name, where), table in found.items() if where == device}
        for name, content in draw(tables).items():
            pictures.setdefault(device, []).append(f"{device}-{name}")
            (root / "docs" / "benchmarks").mkdir(exist_ok=True)
            write_bytes_whole(root / "docs" / "benchmarks" / f"{device}-{name}", content)
    write_bytes_whole(root / "docs" / "benchmarks.md", page(found, pictures).encode("utf-8"))
    readme = root / "README.md"
    write_bytes_whole(readme, with_section(readme.read_text(encoding="utf-8"), short_section(found)).encode("utf-8"))


def main() -> int:
    """The command line: 0 when written, 1 with one line on stderr when the results cannot be published."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    options = parser.parse_args()
    try:
        write(options.results, options.root)
    except ReportError as error:
        sys.stderr.write(f"python -m benchmarks.report: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
