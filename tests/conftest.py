"""Every test runs with uninitialised memory filled with NaN, from one seed, and leaves no files or processes behind."""

import os

import pytest
import torch
from hypothesis import settings

from tests.leftovers import no_running_processes, repository_files

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers or TRL are imported: no test asks a hub for anything

# no deadline: a shared machine is slow at times; no database: nothing is left behind in the working tree
settings.register_profile("expo", deadline=None, database=None, max_examples=60)
settings.load_profile("expo")


@pytest.fixture(autouse=True)
def _no_new_files():
    """Fails a test that leaves a new file in the repository."""
    before = repository_files()
    yield
    new = repository_files() - before
    assert not new, f"the test left files in the repository: {sorted(new)}"


@pytest.fixture(autouse=True, scope="module")
def _no_running_processes():
    """Fails a test file that leaves processes of ours running; a file, since its fixtures may start some lazily."""
    with no_running_processes():
        yield


@pytest.fixture(autouse=True, scope="session")
def _triton_cache(tmp_path_factory):
    """A run compiles into a folder of its own: a run that is killed leaves no incomplete binaries for later ones."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers of a run share what they compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """An output left unwritten shows itself."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_linear():
    """ZeRO 3 puts its own in place of PyTorch's for the rest of the process."""
    before = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = before


@pytest.fixture(scope="session")
def ledger_model():
    """The embedded model and tokenizer, float32 on the CPU; a test that changes the model copies it first."""
    from expo.config import ModelSection
    from expo.learner.model import load_model

    return load_model(ModelSection(path="ledger"), torch.device("cpu"))
