"""The report command: files it writes, exit codes, and failures that leave the old report."""

import base64
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from expo.errors import NotARunError
from expo.report import main, write_report
from expo.reporting.figures import FIGURES, drawing
from expo.runtime import atomic_io
from tests.trainer.reporting.run_folders import CONFIG, fake_run, page_of, report_code, without_figures, write_lines

FIGURE_NAMES = [draw.__name__.removeprefix("draw_") for draw, *_ in FIGURES]


def test_every_figure_is_a_file_and_is_embedded_in_the_page(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = [(finished / "pictures" / f"{name}.png").read_bytes() for name in FIGURE_NAMES]
    assert [base64.b64decode(data) for data in embedded] == files
    assert all(content.startswith(b"\x89PNG") for content in files)


def test_a_narrow_screen_gets_every_wide_figure_redrawn_with_its_panels_below_each_other(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    blocks = re.findall(r'<figure id="(\w+)"(.*?)</figure>', page, flags=re.DOTALL)
    assert [name for name, _ in blocks] == FIGURE_NAMES
    for (name, block), (_, _, is_wide, _) in zip(blocks, FIGURES, strict=True):
        images = [
            png_size(base64.b64decode(data)) for data in re.findall(r'(?:srcset|src)="[^,"]*base64,([^"]+)"', block)
        ]
        assert len(images) == 1 + is_wide, name
        narrow_width, narrow_height = images[0]
        # text of 10.5 points is then 9 pixels high or more on a screen of 390
        assert narrow_width <= 5.6 * drawing.DPI + 1, name
        if name in ("pass_at_k", "curriculum"):
            assert narrow_height > narrow_width, name
    assert page.count('<source media="(max-width: 40rem)"') == sum(is_wide for _, _, is_wide, _ in FIGURES)


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG file."""
    return struct.unpack(">II", content[16:24])  # type: ignore[return-value]


def test_only_the_report_is_added_to_the_folder(finished: Path, tmp_path: Path) -> None:
    before = {path.name for path in fake_run(tmp_path / "run").iterdir()}
    assert {path.name for path in finished.iterdir()} == before | {"report.html", "pictures"}
    assert {path.name for path in (finished / "pictures").iterdir()} == {f"{name}.png" for name in FIGURE_NAMES}


def test_reports_are_deterministic(finished: Path) -> None:
    first = (finished / "report.html").read_bytes()
    assert write_report(finished).read_bytes() == first


def test_a_run_without_steps_has_a_page_without_figures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    page = page_of(run)
    assert "No evaluation recorded yet" in page
    assert "at step 0 of 60" in page
    assert page.count("No data for this figure yet") == len(FIGURE_NAMES)
    assert not list((run / "pictures").iterdir())


def test_one_step_of_grpo_with_one_evaluation_has_every_figure(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=1, is_finished=False)
    grpo = {"curriculum": {"kind": "uniform"}, "kl": {"beta": 0.02, "rho": "constant"}}
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **grpo}))
    assert page_of(run).count("<img") == len(FIGURE_NAMES)


def test_missing_metrics_leave_gaps_in_figures(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=3)
    write_lines(run / "metrics.jsonl", [{"step": 1}, {"step": 2, "accuracy": None}, {"step": 3, "accuracy": 0.5}])
    write_lines(run / "curriculum.jsonl", [{"step": 1, "histogram": [0] * 20}])
    page = page_of(run)
    assert 0 < page.count("<img") < len(FIGURE_NAMES)


@pytest.mark.parametrize("config", [None, "just text", "a: [1", "- 1"])
def test_a_folder_that_is_not_a_run_exits_with_two_and_one_line(
    config: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert report_code(tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_missing_folder_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(NotARunError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    write_report(run)
    (run / "report.html").write_text("old")
    names = {path.name for path in run.iterdir()}

    def fail(*paths: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(atomic_io.os, "replace", fail)
    assert report_code(run) == 1
    assert (run / "report.html").read_text() == "old"
    assert {path.name for path in run.iterdir()} == names


def test_the_command_prints_the_path_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_figures(monkeypatch)
    run = fake_run(tmp_path / "run", num_steps=1)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_the_import_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, expo.report; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
