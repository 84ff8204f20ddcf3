"""Every Python block of the pages runs, and the pages build without a warning and without a network."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from trl import GRPOConfig

from docs.escape_bounds import escaped
from expo.config import RunConfig
from expo.run.metrics import STEP_METRICS
from tests import ROOT
from tests.ranks.running import END_OF_RANK

PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SOURCES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
# a block that starts with its file's name and a command of torchrun runs on several ranks
ON_RANKS = re.compile(r"# (\w+\.py): torchrun ")
PAGES = {
    page: [block for block in PYTHON.findall(page.read_text(encoding="utf-8")) if not ON_RANKS.match(block)]
    for page in SOURCES
}
# test_tutorial.py runs the tutorial's blocks and commands in turn
WITH_PYTHON = sorted(page for page, blocks in PAGES.items() if blocks and page.name != "tutorial.md")
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
    loop, *_ = PAGES[ROOT / "docs" / "loop.md"]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 45


@pytest.mark.slow
def test_the_script_for_several_ranks_gives_the_gradients_of_one_process(tmp_path):
    (script,) = filter(ON_RANKS.match, PYTHON.findall((ROOT / "docs" / "loop.md").read_text(encoding="utf-8")))
    (tmp_path / "ranks.py").write_text(script + END_OF_RANK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "ranks.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.medium
def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    # a proxy without a server: every request fails
    blocked = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **blocked, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert 'id="expo_kernels.linear_expo_loss"' in api
    assert "<blockquote" not in api
    assert "&gt; 0, the denominator over all micro-batches" in re.sub(r"<[^>]*>", "", api)
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'name="__palette"' in index
    tabs = [title.strip() for title in re.findall(r'class="md-ellipsis">\s*([^<]+)', index)]
    assert tabs.index("Start") < tabs.index("Evaluate") < tabs.index("FAQ") < tabs.index("API")


def test_every_page_has_a_place_in_the_navigation():
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("    k: > 0, a number", r"    k: \> 0, a number"),
        ("a: int\n    > 1, on a line of its own", "a: int\n    \\> 1, on a line of its own"),
        (">= 0, at the start", r"\>= 0, at the start"),
        ("    k (int): > 0", r"    k (int): \> 0"),
        (">>> 1 + 1", ">>> 1 + 1"),
        ("a ratio > 1: less", "a ratio > 1: less"),
    ],
)
def test_bounds_are_escaped_and_examples_are_not(docstring, expected):
    assert escaped(docstring) == expected


def test_every_setting_of_the_table_of_flags_exists():
    rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs" / "flags.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[2:]
    columns = list(zip(*([re.findall(r"`([\w.]+)", cell) for cell in row.split("|")[:3]] for row in rows), strict=True))
    trl, verl, ours = ([name for cell in column for name in cell] for column in columns)
    assert set(trl) <= {field.name for field in dataclasses.fields(GRPOConfig)}
    sections = {name: field.annotation.model_fields for name, field in RunConfig.model_fields.items()}
    assert [name for name in ours if name.split(".")[1] not in sections[name.split(".")[0]]] == []
    assert len(trl) > 30
    assert len(ours) > 40
    assert all(len(names) == len(set(names)) for names in (trl, verl, ours))


@pytest.mark.parametrize("page", ["tuning.md", "faq.md", "recipes.md"])
def test_settings_recipes_and_metrics_that_a_page_names_exist(page):
    names = re.findall(r"`([\w.-]+)", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    sections = {name: field.annotation.model_fields for name, field in RunConfig.model_fields.items()}
    settings = [name.split(".") for name in names if name.split(".")[0] in sections and "." in name]
    assert [name for name in settings if name[1] not in sections[name[0]]] == []
    recipes = {name for name in names if name.endswith(".yaml")}
    assert recipes <= {path.name for path in (ROOT / "expo" / "recipes").glob("*.yaml")}
    if page == "tuning.md":
        table = (ROOT / "docs" / page).read_text(encoding="utf-8").split("## What the metrics say")[1].split("\n## ")[0]
        metrics = {
            name
            for row in re.findall(r"^\| (`.*?)\|", table, flags=re.MULTILINE)
            for name in re.findall(r"`(\w+)`", row)
        }
        assert metrics
        assert metrics <= set(STEP_METRICS)
    if page == "recipes.md":
        assert recipes == {path.name for path in (ROOT / "expo" / "recipes").glob("*.yaml")}
