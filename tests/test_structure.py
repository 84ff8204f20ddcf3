"""The structure: few modules at the top, files and functions of a readable size, and the field's own names."""

import ast
import re
import statistics
import subprocess

import pytest

from tests import ROOT

MOST_TOP_MODULES = 12
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 120
MOST_PARAMETERS = 12
PUBLIC_LOSS_CALLS = {
    "linear_expo_loss", "expo_loss", "expo_loss_from_logps", "linear_token_logps", "token_logps",
}  # fmt: skip
# signatures that another library dictates: Liger's class
DICTATED = {"expo_kernels/integrations/liger.py": {"__init__", "forward"}}
# names that this code once had for what the field calls otherwise
FORMER_NAMES = {
    "expo_kernels": (
        r"absorb\w*", r"logp_slopes?", r"entropy_slopes?", r"write_slopes", r"\w*row_slopes\w*", r"residuals(_ptr)?",
        r"tops(_ptr)?", r"SUMS", r"Request", r"in_places",
    ),
    "expo": (
        r"Graded[(\]]", r"Shaping", r"SharedEngine", r"SharedVerifier", r"on_first", r"from_first", r"Crowd", r"Away",
        r"insist", r"Patience", r"Keeper", r"last_words", r"holds_weights", r"is_whole", r"Parts", r"take_up",
        r"leave_if_asked", r"Prompted", r"assemble", r"--ward",
    ),
}  # fmt: skip
FORMER_WORDS = (r"beyond noise", r"least milliseconds", r"taken up", r"takes? up (again|the run)", r"last words")


def tracked(*suffixes):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if name.endswith(suffixes) and (ROOT / name).is_file()]


PYTHON = tracked(".py")
FUNCTIONS = [
    (name, node)
    for name in PYTHON
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def test_few_modules_stand_at_the_top():
    top = [name for name in PYTHON if re.fullmatch(r"expo/\w+\.py", name)]
    assert 0 < len(top) <= MOST_TOP_MODULES, top


def test_files_have_a_readable_size():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in PYTHON}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}
    assert 100 <= statistics.median(count for name, count in lines.items() if not name.endswith("__init__.py")) <= 250


def test_no_function_or_kernel_is_long():
    lengths = {f"{name}:{node.name}": node.end_lineno - node.lineno + 1 for name, node in FUNCTIONS}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES_OF_A_FUNCTION} == {}


def test_no_function_takes_many_parameters():
    def is_exempt(name, node):
        is_kernel = any("jit" in ast.unparse(mark) or "kernel" in ast.unparse(mark) for mark in node.decorator_list)
        return is_kernel or node.name in PUBLIC_LOSS_CALLS or node.name in DICTATED.get(name, ())

    counts = {
        f"{name}:{node.name}": len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        for name, node in FUNCTIONS
        if not is_exempt(name, node)
    }
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("package", FORMER_NAMES)
def test_former_names_are_gone(package):
    former = re.compile(rf"(?<![\w.-])({'|'.join(FORMER_NAMES[package])})(?![\w-])")
    found = [
        f"{name}:{number}: {match[0]}"
        for name in tracked(".py")
        if name.startswith(f"{package}/")
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1)
        for match in [former.search(line)]
        if match
    ]
    assert found == []


def test_former_wording_is_gone():
    former = re.compile("|".join(FORMER_WORDS), flags=re.IGNORECASE)
    found = [
        f"{name}: {match[0]}"
        for name in tracked(".py", ".md", ".yaml", ".j2")
        if name != "tests/test_structure.py"
        for match in [former.search((ROOT / name).read_text(encoding="utf-8"))]
        if match
    ]
    assert found == []
