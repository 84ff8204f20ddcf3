"""A tiny model folder, shared by all TRL runs."""

import gc
import os

import pytest


@pytest.fixture(autouse=True)
def _own_environment():
    """Restore the environment: TRL sets rank variables, which processes started later would read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tests.integrations.trl_runs import save_model

    gc.freeze()  # each run collects garbage, which is slow if the collector traverses all of transformers
    yield save_model(tmp_path_factory.mktemp("tiny_model"))
    gc.unfreeze()
