"""Imports point one way, every public name has a docstring, and importing the kernels is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

MODULES = sorted([*ROOT.glob("expo/**/*.py"), *ROOT.glob("expo_kernels/**/*.py")])

# what each module may import beside the standard library; a name covers its submodules
KERNEL_MODULES = {
    "reference": {"torch", "expo_kernels.objective"},
    "objective": set(),
    "_validate": {"torch"},
    "_compat": {"torch"},
    "_launch": {"torch", "triton", "expo_kernels._compat"},
}
HOST_LIBRARIES = {"transformers", "deepspeed", "vllm", "datasets", "math_verify"}
ONLY_IN = {
    "vllm": {f"expo/rollout/vllm/{name}.py" for name in ("_compat", "in_process", "worker")},
    "aiohttp": {"expo/rollout/vllm/client.py"},
    "datasets": {"expo/data/hub.py", "expo_kernels/integrations/trl.py"},
    "deepspeed": {"expo/learner/_compat_deepspeed.py", "expo/evaluation/saved_weights.py"},
    "jinja2": {"expo/config/templates.py", "expo/reporting/templates.py"},
    "math_verify": {"expo/rewards/maths/algebra.py"},
    "matplotlib": {
        f"expo/reporting/figures/{name}.py" for name in ("curriculum", "drawing", "evaluations", "run", "steps")
    },
    "pyarrow": {"expo/data/files.py"},
    "reasoning_gym": {"expo/data/reasoning.py", "expo/rewards/families.py"},
    "sympy": {"expo/rewards/maths/algebra.py"},
    "trackio": {"expo/run/trackers.py"},
    "wandb": {"expo/run/trackers.py"},
}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which module is imported"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_modules_are_found():
    assert {"expo/train.py", "expo_kernels/reference.py"} <= {relative(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_one_way(path):
    names = imported_modules(path)
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"tests", "benchmarks"}
    if relative(path).startswith("expo_kernels/"):
        assert "expo" not in roots
        assert not roots & HOST_LIBRARIES or "/integrations/" in relative(path)
    if relative(path) not in {"expo/train.py", "expo/__main__.py", "expo/experiments/frontier/run.py"}:  # programs
        assert not any(name.startswith("expo.train") for name in names)
    for library, modules in ONLY_IN.items():
        assert library not in roots or relative(path) in modules


@pytest.mark.parametrize("module", KERNEL_MODULES)
def test_basic_kernel_modules_import_little(module):
    names = imported_modules(ROOT / "expo_kernels" / f"{module}.py")
    outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert [
        name for name in outside if not any(f"{name}.".startswith(f"{may}.") for may in KERNEL_MODULES[module])
    ] == []


def test_no_import_circles():
    def module_name(path):
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    graph = {module_name(path): imported_modules(path) for path in MODULES}
    # an `__init__` only re-exports names: importing it means importing the modules it names
    edges = {name: {target for target in targets if target in graph} for name, targets in graph.items()}
    packages = {module_name(path) for path in MODULES if path.name == "__init__.py"}

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        for target in edges[name] - packages:
            visit(target, [*trail, name])

    for name in edges:
        visit(name, [])


def public_definitions(tree):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    missing = [node.name for node in public_definitions(tree) if not ast.get_docstring(node)]
    assert not missing


def test_the_algorithm_can_be_read_in_one_sitting():
    tree = ast.parse((ROOT / "expo" / "train.py").read_text(encoding="utf-8"))
    (train,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno - train.lineno < 100


def test_importing_the_kernels_needs_torch_alone_and_under_a_second():
    script = (
        "import sys, time, torch; started = time.process_time(); import expo_kernels; "
        "took = time.process_time() - started; "
        "loaded = {name.split('.')[0] for name in sys.modules} & {'triton', 'transformers', 'expo', 'vllm'}; "
        "assert not loaded, loaded; assert took < 1.0, took"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
