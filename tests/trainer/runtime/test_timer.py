"""The seconds of phases."""

import time

from expo.runtime.timer import PhaseTimer


def test_phases_add_up_to_the_step():
    timer = PhaseTimer()
    for name in ("rollout", "update", "rollout"):
        with timer.phase(name):
            time.sleep(0.02)
    metrics = timer.metrics()
    assert 0.04 <= metrics["seconds/rollout"] < metrics["seconds"]
    phases = metrics["seconds/rollout"] + metrics["seconds/update"]
    assert phases <= metrics["seconds"] < phases + 0.02
