"""An optimizer step does not depend on ranks, micro-batches, packing or ZeRO stage."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expo.runtime.distributed import join_ranks
from tests.ranks.same_step import AGGREGATIONS, PACKING, STAGES, parameters_after_three_steps
from tests.ranks.tiny_models import save_tiny_model

ONE_MICRO_BATCH = 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small models, with a tied and with an untied head."""
    return {
        kind: str(save_tiny_model(tmp_path_factory.mktemp(kind), tied))
        for kind, tied in (("tied", True), ("untied", False))
    }


@pytest.fixture(scope="module")
def on_two_ranks(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "parameters.pt"
    script = Path(__file__).with_name("same_step.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run([*launch, *models.values(), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.fixture(scope="module")
def whole(models):
    """The step on one rank, without ZeRO, in one micro-batch."""
    ranks = join_ranks("cpu", 60)
    return {
        (path, aggregation): parameters_after_three_steps(path, 0, False, aggregation, ONE_MICRO_BATCH, ranks)
        for path in models.values()
        for aggregation in AGGREGATIONS
    }


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_with_several_micro_batches_take_the_same_step(
    models, whole, on_two_ranks, stage, packing, aggregation, kind
):
    expected, expected_sizes, one = whole[models[kind], aggregation]
    found, sizes, several = on_two_ranks[models[kind], stage, packing, aggregation]
    assert one == 1
    assert several >= 3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # AdamW takes the same step for a gradient of another scale; loss and norm would differ
    torch.testing.assert_close(sizes, expected_sizes, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_takes_the_same_step(models, whole, stage, kind):
    for packing in PACKING:
        found, _, several = parameters_after_three_steps(
            models[kind], stage, packing, "token", 40, join_ranks("cpu", 60)
        )
        assert several >= 3
        torch.testing.assert_close(found, whole[models[kind], "token"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_aggregations_differ(models, whole, kind):
    token, sequence, constant = (whole[models[kind], aggregation] for aggregation in AGGREGATIONS)
    assert (token[0] - sequence[0]).abs().max() > 1e-5
    assert token[1][1] / constant[1][1] > 1.1
