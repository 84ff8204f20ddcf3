"""Every Python block of the pages runs, and the pages build without a warning and without a network."""

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT

PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SOURCES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
PAGES = {page: PYTHON.findall(page.read_text(encoding="utf-8")) for page in SOURCES}
WITH_PYTHON = sorted(page for page, blocks in PAGES.items() if blocks)
PRINTED = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
OUTPUTS = [(page, *pair) for page in WITH_PYTHON for pair in PRINTED.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block in PAGES[page]:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize(("page", "block", "printed"), OUTPUTS, ids=[page.name for page, *_ in OUTPUTS])
def test_the_text_under_a_python_block_is_what_it_prints(page, block, printed, capsys):
    """Such a block needs no block before it."""
    exec(compile(block, page.name, "exec"), {"__name__": page.stem})
    assert capsys.readouterr().out == printed


def test_the_estimated_cost_of_a_run_is_among_the_checked_outputs():
    assert "experiment.md" in [page.name for page, *_ in OUTPUTS]


def test_the_loop_of_forty_lines_has_forty():
    (loop,) = PAGES[ROOT / "docs" / "loop.md"]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 45


def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    # a proxy without a server: every request fails
    blocked = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **blocked, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert 'id="expo_kernels.linear_expo_loss"' in api
