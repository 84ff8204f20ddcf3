"""Compare two commits bit by bit: `python -m tests.golden.compare BASE [--head HEAD]`, `make golden-compare BASE=...`.

Each commit is checked out into its own folder, and its packages run with this tree's golden tests on this machine; no
committed record of the machine is needed. In addition, BASE's code begins a run and is killed after a checkpoint;
HEAD's code resumes the run, which must end like BASE's own run. The exit code is 0 if all bits are equal, else 1.
Uncommitted changes are not compared.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.worktrees import checked_out
from tests.golden.digests import PARTS, Record, differences, shortened
from tests.golden.runs import GoldenRun
from tests.golden.trees import record_of

RESUME = "resume"


def resumed_by_head(base: Path, head: Path, folder: Path) -> tuple[Record, Record]:
    """A run of BASE, and one that BASE began and HEAD resumed, each on one rank and on two."""
    alone: Record = {}
    handed_on: Record = {}
    for ranks in (1, 2):
        case = f"ranks: {ranks}"
        alone[case] = GoldenRun(folder / f"alone-{ranks}", ranks).finish(base)
        run = GoldenRun(folder / f"handed-on-{ranks}", ranks)
        run.kill_after_checkpoint(base)
        handed_on[case] = run.finish(head, resume=True)
    return alone, handed_on


def compare(part: str, base: Path, head: Path, folder: Path) -> list[str]:
    """One line for each difference in one part."""
    if part == RESUME:
        return differences(*resumed_by_head(base, head, folder / RESUME), exact=True)
    records = []
    for name, tree in (("base", base), ("head", head)):
        (folder / name).mkdir(exist_ok=True)
        records.append(record_of(part, tree, folder / name))
    return differences(*records, exact=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit whose bits are right")
    parser.add_argument("--head", default="HEAD", help="the commit that must have the same")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, RESUME), default=(*PARTS, RESUME))
    options = parser.parse_args()
    num_unequal = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        commits = {"base": options.base, "head": options.head}
        base, head = (
            stack.enter_context(checked_out(commit, folder / f"tree-{name}", ours=("tests",)))
            for name, commit in commits.items()
        )
        for part in options.parts:
            started = time.monotonic()
            print(f"{part}: ", end="", flush=True)
            lines = compare(part, base, head, folder)
            num_unequal += len(lines)
            said = f"{len(lines)} unequal entries" if lines else "equal"
            print(f"{said}, {time.monotonic() - started:.0f} s", *shortened(lines), sep="\n  ", flush=True)
    print(f"{options.head} has the bits of {options.base}" if num_unequal == 0 else f"{num_unequal} unequal entries")
    return int(num_unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
