"""One tiny model folder for all runs of TRL."""

import gc
import os

import pytest


@pytest.fixture(autouse=True)
def _own_environment():
    """TRL leaves variables of ranks behind, which a process started later would take for its own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tests.integrations.trl_runs import save_model

    gc.freeze()  # each run collects garbage, which is slow with all of transformers to walk through
    yield save_model(tmp_path_factory.mktemp("tiny_model"))
    gc.unfreeze()
