"""Write the golden record of this machine: `python -m tests.golden.record [torch] [kernels] [runs]`.

Run it only on a commit whose numbers are correct: `test_golden.py` compares all later commits with the record.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.golden.digests import PARTS, differences, fingerprint, folder_of_this_machine, read, write
from tests.golden.trees import ROOT, record_of


def main(parts: list[str]) -> None:
    """Record the given parts, or all."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    target = folder_of_this_machine()
    for part in parts or PARTS:
        started = time.monotonic()
        print(f"{part}: ", end="", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = record_of(part, ROOT, Path(folder))
        path = target / f"{part}.json"
        changed = differences(read(path), found, exact=True) if path.exists() else None
        write(path, found)
        said = "new" if changed is None else f"{len(changed)} entries changed"
        print(f"{len(found)} cases, {said}, {time.monotonic() - started:.0f} s", flush=True)
    (target / "machine.json").write_text(json.dumps(fingerprint(), indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
