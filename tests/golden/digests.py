"""Golden records: the entry of a tensor, the choice of this machine's record, and the comparison of two records.

A record is {case: {name: entry}}. The entry of a tensor is its shape, dtype, SHA-256 of its bytes and three float64
summaries; the entry of a number is [dtype, value], which determines all its bits.
"""

import hashlib
import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, dict[str, Any]]

RECORDS = Path(__file__).parent / "records"
PARTS = ("torch", "kernels", "runs")
HOW_TO_RECORD = "if the change is meant, record anew: python -m tests.golden.record"
MOST_LINES = 20  # lines of a failure that are shown
# tolerance of summaries computed with other instructions or versions: about one rounding of an element
TOLERANCES = {"bfloat16": 1e-2, "float16": 1e-3, "float64": 1e-5, "float32": 1e-5}
PACKAGES = ("torch", "triton", "numpy", "transformers", "deepspeed")


def digest(tensor: torch.Tensor) -> Any:
    """The entry of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dim() == 0:
        return [dtype, tensor.item()]
    wide = tensor.double()
    return {
        "shape": list(tensor.shape),
        "dtype": dtype,
        "sha256": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        "sum": math.fsum(wide.reshape(-1).tolist()),
        "l1": math.fsum(wide.abs().reshape(-1).tolist()),
        "l2": math.sqrt(math.fsum(wide.square().reshape(-1).tolist())),
    }


def fingerprint() -> dict[str, Any]:
    """All that determines bits on a CPU: its model, the instructions that PyTorch uses, and the libraries' versions."""
    return {
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    """Vendor, family and model, by which libraries select their matrix product code."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return "-".join(facts.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))


def _version(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def folder_of_this_machine() -> Path:
    """The folder of this machine's records, which may not exist."""
    text = json.dumps(fingerprint(), sort_keys=True)
    return RECORDS / hashlib.sha256(text.encode()).hexdigest()[:12]


def load(part: str, records: Path = RECORDS) -> tuple[Record, bool]:
    """The record to compare with, and whether a machine like this one wrote it, so that bits must be equal."""
    mine = records / folder_of_this_machine().name / f"{part}.json"
    if mine.exists():
        return read(mine), True
    others = sorted(records.glob(f"*/{part}.json"))
    assert others, f"{records} holds no record of {part}; {HOW_TO_RECORD}"
    return read(others[0]), False


def read(path: Path) -> Record:
    """Read a record from its file."""
    made: Record = json.loads(path.read_text())
    return made


def write(path: Path, record: Record) -> None:
    """Write a record to its file, one entry per line, so that a diff is readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = []
    for case, entries in record.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        cases.append(f" {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(cases) + "\n}\n")


def differences(expected: Record, found: Record, *, exact: bool) -> list[str]:
    """One line for each entry that is missing, new, or different: unequal bits, or summaries out of tolerance."""
    lines = []
    for case in [*expected, *(case for case in found if case not in expected)]:
        before, after = expected.get(case), found.get(case)
        if before is None or after is None:
            lines.append(f"{case}: {'not in the record' if before is None else 'no longer made'}")
            continue
        for name in [*before, *(name for name in after if name not in before)]:
            if name not in before or name not in after:
                lines.append(f"{case}: {name}: {'not in the record' if name not in before else 'no longer made'}")
            elif not (_equal(before[name], after[name]) if exact else _close(before[name], after[name])):
                lines.append(f"{case}: {name}: expected {json.dumps(before[name])}, found {json.dumps(after[name])}")
    return lines


def shortened(lines: list[str]) -> list[str]:
    """The first of many lines."""
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], f"and {more} more"] if more > 0 else lines


def _equal(expected: Any, found: Any) -> bool:
    # the text of a float determines its bits: 0.0 differs from -0.0
    return json.dumps(expected) == json.dumps(found)


def _close(expected: Any, found: Any) -> bool:
    if isinstance(expected, dict) != isinstance(found, dict):
        return False
    if isinstance(expected, list):
        (dtype, before), (found_dtype, after) = expected, found
        tolerance = TOLERANCES.get(dtype, 0.0)
        return dtype == found_dtype and math.isclose(before, after, rel_tol=tolerance, abs_tol=tolerance * 0.1)
    if (expected["shape"], expected["dtype"]) != (found["shape"], found["dtype"]):
        return False
    tolerance = TOLERANCES.get(expected["dtype"], 0.0)
    # summands may cancel, so the tolerance of a sum is relative to the sum of magnitudes
    return (
        abs(expected["sum"] - found["sum"]) <= tolerance * expected["l1"]
        and abs(expected["l1"] - found["l1"]) <= tolerance * expected["l1"]
        and abs(expected["l2"] - found["l2"]) <= tolerance * expected["l2"]
    )
