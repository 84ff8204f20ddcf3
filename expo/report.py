"""The report of a run: `python -m expo.report RUN` turns its records into `report.html` and `pictures/*.png`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from expo.errors import NotARunError
from expo.reporting.figures import draw_pictures
from expo.reporting.page import render_page
from expo.reporting.reader import read_run
from expo.runtime.atomic_io import write_bytes_whole


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `pictures/*.png` into the run folder; each file appears whole or not at all.

    Returns:
        The path of `report.html`.

    Raises:
        NotARunError: if the folder is not a run; nothing is written then.
    """
    run = read_run(run_dir)
    pictures = draw_pictures(run.records)
    (run_dir / "pictures").mkdir(exist_ok=True)
    for picture in pictures:
        if picture.png is not None:
            write_bytes_whole(run_dir / "pictures" / f"{picture.name}.png", picture.png)
    report = run_dir / "report.html"
    write_bytes_whole(report, render_page(run, pictures).encode("utf-8", errors="replace"))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of the run named on the command line; the exit code, 2 if it is not a run."""
    parser = argparse.ArgumentParser(prog="python -m expo.report", description="Write RUN/report.html again.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, finished or not")
    run_dir = parser.parse_args(arguments).run
    try:
        print(write_report(run_dir))
    except (NotARunError, OSError) as error:
        print(f"expo.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
