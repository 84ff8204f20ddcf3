"""Every kernel compiled for many GPUs with the installed Triton, none of which need be present.

`python -m benchmarks.compile_grid` compiles the cases of `tests/kernels/test_compile_budgets.py` for all targets down
to machine code and writes registers, spills and shared memory to `benchmarks/results/compile-triton-<version>.json`,
after each target. `python -m benchmarks.compile_grid --table` writes the tables of docs/gpu.md from these files.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stamp import RESULTS, ROOT, commit, write_results
from benchmarks.tables import replace_section

VOCAB_SIZE = 151_936
NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = {"gfx942": 64, "gfx950": 64, "gfx1100": 32}  # threads of a warp
TARGETS = (*NVIDIA, *AMD)
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- compile grid: made by python -m benchmarks.compile_grid --table -->", "<!-- /compile grid -->"
LLD_VERSIONS = (20, 19, 18)  # of LLVM's linker, which Triton 3.4 needs for AMD's GPUs: Debian's package lld-19
MOST_REGISTERS = 128  # the budget of tests/kernels/test_compile_budgets.py

Cell = dict[str, Any]  # resources of a compiled kernel, or {"error": text}


def compiled(launch: Callable[[], object], target: str) -> Cell:
    """The resources of the one kernel that `launch` launches, compiled for `target`; or the compiler's error."""
    from triton.backends.compiler import GPUTarget

    from tests.kernels import compiling

    is_amd = target in AMD
    gpu = GPUTarget("hip", target, AMD[target]) if is_amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    try:
        with compiling.launches(gpu) as launched:
            launch()
        (kernel,) = launched.kernels
        used = compiling.usage(kernel)
    except Exception as error:  # a compiler may raise anything; the other cases go on
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    wide = {kind: sum(bits >= 128 for bits in widths) for kind, widths in used.access_bits.items()}
    narrow = {kind: len(widths) - wide[kind] for kind, widths in used.access_bits.items()}
    return {
        **{"registers": used.registers, "spilled_bytes": used.spilled_bytes, "shared_bytes": used.shared_bytes},
        **{"wide_accesses": wide, "narrow_accesses": narrow},
    }


def measure(targets: Sequence[str], cases: Sequence[str], path: Path) -> int:
    """Compiles all cases for all targets and writes `path` after each target; the number that do not compile."""
    import triton

    from tests.kernels.test_compile_budgets import CASES

    names = [name for name in CASES if any(text in name for text in cases)] if cases else list(CASES)
    results: dict[str, Any] = {"triton": triton.__version__, "commit": commit(), "vocab_size": VOCAB_SIZE, "cases": {}}
    num_failed = 0
    for target in targets:
        started = time.perf_counter()
        for name in names:
            launch = CASES[name][0]
            cell = compiled(lambda launch=launch: launch(VOCAB_SIZE), target)
            results["cases"].setdefault(name, {})[target] = cell
            num_failed += "error" in cell
            if "error" in cell or is_over_budget(cell):
                print(f"  {target:8} {name}: {cell.get('error') or _text(cell)}", flush=True)
        seconds = time.perf_counter() - started
        print(f"Triton {triton.__version__}, {target}: {len(names)} kernels in {seconds:.0f} s", flush=True)
        write_results(path, results)
    return num_failed


def table(results: Mapping[str, Any]) -> str:
    """One Markdown table: a line per kernel, a column per target."""
    cases = results["cases"]
    targets = [target for target in TARGETS if any(target in cells for cells in cases.values())]
    lines = [["Kernel", *targets], ["---"] * (1 + len(targets))]
    lines += [
        [name, *(_text(cells[target]) if target in cells else "" for target in targets)]
        for name, cells in cases.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(grids: Sequence[Mapping[str, Any]]) -> str:
    """A summary of every Triton version, then one table each, newest first."""
    parts = []
    for grid in grids:
        cells = [cell for of_case in grid["cases"].values() for cell in of_case.values()]
        failed = sum("error" in cell for cell in cells)
        over = sum("error" not in cell and is_over_budget(cell) for cell in cells)
        parts.append(
            f"Triton {grid['triton']}: {len(cells) - failed} of {len(cells)} kernels compile; {over} of them exceed "
            f"{MOST_REGISTERS} registers or spill."
        )
        parts.append(table(grid))
    return "\n\n".join(parts)


def write_table(folder: Path, page: Path) -> None:
    """Replaces the text between the markers of `page` by the tables of the files in `folder`."""
    paths = sorted(folder.glob("compile-triton-*.json"), key=_version, reverse=True)
    grids = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    replace_section(page, BEGIN, END, section(grids))


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in path.stem.removeprefix("compile-triton-").split("."))


def is_over_budget(cell: Cell) -> bool:
    """Whether a compiled kernel needs more registers than its budget, or spills."""
    # the machine code of an AMD kernel counts registers of 32 lanes or 64; the budget is the same number
    return bool(cell["registers"] > MOST_REGISTERS or cell["spilled_bytes"])


def _text(cell: Cell) -> str:
    if "error" in cell:
        return "fails"
    text = f"{cell['registers']}" + (f" + {cell['spilled_bytes']} B" if cell["spilled_bytes"] else "")
    return f"**{text}**" if is_over_budget(cell) else text


def main() -> int:
    """The command line: 0, or 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--cases", nargs="+", default=(), help="only kernels with one of these texts in their names")
    parser.add_argument("--out", type=Path, help="the JSON file (default: in benchmarks/results/)")
    parser.add_argument("--table", action="store_true", help="write the tables of docs/gpu.md and compile nothing")
    options = parser.parse_args()
    if options.table:
        write_table(RESULTS, PAGE)
        return 0
    import triton

    linkers = [path for version in LLD_VERSIONS if (path := shutil.which(f"ld.lld-{version}"))]
    if linkers:
        os.environ.setdefault("TRITON_HIP_LLD_PATH", linkers[0])
    path = options.out or RESULTS / f"compile-triton-{triton.__version__}.json"
    num_failed = measure(options.targets, options.cases, path)
    print(f"{num_failed} kernels did not compile; written to {path}")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
