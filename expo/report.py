"""The report of a run: `python -m expo.report RUN` writes `report.html` and `pictures/*.png` into the run folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

from expo.errors import FolderError
from expo.reporting.figures import draw_figures
from expo.reporting.page import render_page
from expo.reporting.reader import read_run
from expo.runtime.atomic_io import write_bytes_whole
from expo.runtime.endings import errors_on_one_line
from expo.runtime.parser import OneLineParser
from expo.runtime.stdout import write_stdout

PROGRAM = "python -m expo.report"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `pictures/*.png` into the run folder; each file is written atomically.

    Returns:
        The path of `report.html`.

    Raises:
        NotARunError: if the folder is not a run folder; nothing is written then.
    """
    run = read_run(run_dir)
    figures = draw_figures(run.history)
    (run_dir / "pictures").mkdir(exist_ok=True)
    for figure in figures:
        if figure.png is not None:
            write_bytes_whole(run_dir / "pictures" / f"{figure.name}.png", figure.png)
    report = run_dir / "report.html"
    write_bytes_whole(report, render_page(run, figures).encode("utf-8", errors="replace"))
    return report


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command line of `prog`.

    Exit codes: 0, 1 if the report cannot be written, 2 if the folder is not a run folder, 130 after Ctrl-C.
    """
    parser = OneLineParser(prog=prog, description="Write RUN/report.html and pictures.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder; the run may still be in progress")
    run_dir = parser.parse_args(argv).run
    with errors_on_one_line(prog):
        try:
            report = write_report(run_dir)
        except OSError as error:
            raise FolderError(f"the report cannot be written ({error}); check the folder") from error
        write_stdout(f"{report}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
