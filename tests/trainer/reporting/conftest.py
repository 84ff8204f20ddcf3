"""Figures of low resolution, since drawing takes most of a report's time, and the report of a finished run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from expo.report import write_report
from expo.reporting.figures import drawing
from tests.trainer.reporting.run_folders import fake_run


@pytest.fixture(scope="package", autouse=True)
def low_resolution() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 30)
        yield


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fake_run(tmp_path_factory.mktemp("runs") / "ledger-3")
    write_report(run)
    return run
