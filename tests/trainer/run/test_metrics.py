"""What a run writes: whole lines, rewinding, phase times, and a line for people without a terminal."""

import time

from expo.run.environment import ENVIRONMENT, describe_environment
from expo.run.folder import RunFolder
from expo.runtime.console import Display
from expo.runtime.timer import PhaseTimer


def test_a_line_cut_short_is_left_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.append("metrics", {"step": 1}, {"step": 2})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert folder.read_rows("metrics") == [{"step": 1}, {"step": 2}]
    assert folder.read_rows("nothing") == []


def test_rewinding_drops_later_steps_of_every_file(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(5):
        folder.append("metrics", {"step": step})
        folder.append("completions", {"step": step, "reply": "à"}, {"step": step, "reply": "b"})
    folder.rewind(2)
    assert [row["step"] for row in folder.read_rows("metrics")] == [0, 1, 2]
    assert [row["step"] for row in folder.read_rows("completions")] == [0, 0, 1, 1, 2, 2]


def test_phases_add_up_to_the_step():
    timer = PhaseTimer()
    for name in ("rollout", "update", "rollout"):
        with timer.phase(name):
            time.sleep(0.02)
    metrics = timer.metrics()
    assert 0.04 <= metrics["seconds/rollout"] < metrics["seconds"]
    phases = metrics["seconds/rollout"] + metrics["seconds/update"]
    assert phases <= metrics["seconds"] < phases + 0.02


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Display().bar("replies", total=100) as bar:
        for _ in range(100):
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("replies 100/100")


def test_starts_of_a_run_are_kept_those_in_older_files_too(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json(ENVIRONMENT, {"commit": "older", "versions": {"torch": "2"}})
    for step in (3, 5):
        folder.record_start(step, num_ranks=2)
    older, *starts = folder.read_json(ENVIRONMENT)["starts"]
    assert older == {"commit": "older", "versions": {"torch": "2"}}
    assert [(start["first_step"], start["ranks"]) for start in starts] == [(3, 2), (5, 2)]
    assert starts[0]["versions"]["torch"]


def test_environment_names_versions_and_machine():
    environment = describe_environment()
    assert environment["versions"]["torch"]
    assert environment["machine"]["cpus"] >= 1
