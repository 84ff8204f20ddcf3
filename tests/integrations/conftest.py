"""One tiny model folder for all runs of TRL."""

import gc

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tests.integrations.trl_runs import save_model

    gc.freeze()  # each run collects garbage, which is slow with all of transformers to walk through
    yield save_model(tmp_path_factory.mktemp("tiny_model"))
    gc.unfreeze()
