"""One tiny model folder for all runs of TRL, and nothing left in the working tree or fetched."""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tests.integrations.trl_runs import save_model

    gc.freeze()  # each run collects garbage, which is slow with all of transformers to walk through
    yield save_model(tmp_path_factory.mktemp("tiny_model"))
    gc.unfreeze()
