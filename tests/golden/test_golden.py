"""Results equal the recorded ones: bit for bit on a machine that has a record, within tolerances on any other."""

import copy

import pytest
import torch

from tests.golden.digests import HOW_TO_RECORD, RECORDS, differences, digest, load, read, shortened, write
from tests.golden.runs import out_of_reach, resumed_unlike_plain
from tests.golden.trees import ROOT, record_of

pytestmark = pytest.mark.medium


def said(part, lines):
    return "\n".join([f"{len(lines)} golden entries of {part} differ", *shortened(lines), HOW_TO_RECORD])


@pytest.mark.parametrize("path", ["torch", pytest.param("kernels", marks=pytest.mark.slow)])
def test_losses_metrics_and_gradients_are_the_recorded_ones(path, tmp_path):
    expected, is_exact = load(path)
    lines = differences(expected, record_of(path, ROOT, tmp_path), exact=is_exact)
    assert not lines, said(path, lines)


@pytest.mark.slow
def test_runs_end_with_the_recorded_weights_and_resumed_ones_with_those_of_plain_ones(tmp_path):
    expected, is_exact = load("runs")
    found = record_of("runs", ROOT, tmp_path)
    unlike = resumed_unlike_plain(found)
    assert not unlike, "\n".join(unlike)
    lines = differences(expected, found, exact=True) if is_exact else out_of_reach(expected, found)
    assert not lines, said("runs", lines)


def records_of(part):
    return [read(path) for path in sorted(RECORDS.glob(f"*/{part}.json"))]


def first_tensor(record):
    return next((case, name) for case in record for name, entry in record[case].items() if isinstance(entry, dict))


@pytest.mark.parametrize("part", ["torch", "kernels", "runs"])
def test_a_changed_bit_in_a_record_is_found_and_named(part):
    for record in records_of(part):
        assert differences(record, copy.deepcopy(record), exact=True) == []
        assert differences(record, copy.deepcopy(record), exact=False) == []
        case, name = first_tensor(record)
        changed = copy.deepcopy(record)
        digits = changed[case][name]["sha256"]
        changed[case][name]["sha256"] = ("1" if digits[0] == "0" else "0") + digits[1:]
        (line,) = differences(changed, record, exact=True)
        assert line.startswith(f"{case}: {name}: expected ")
        assert digits in line.split("found")[1]
        assert changed[case][name]["sha256"] in line.split("found")[0]
        assert "python -m tests.golden.record" in said(part, [line])


def test_bits_that_summaries_hide_are_told_apart(tmp_path):
    def record(*values, scalar):
        return {"case": {"tensor": digest(torch.tensor(values)), "number": digest(torch.tensor(scalar))}}

    one_ulp = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    before = record(0.0, 1.0, scalar=1.0)
    for after in (record(-0.0, 1.0, scalar=1.0), record(0.0, one_ulp, scalar=1.0), record(0.0, 1.0, scalar=one_ulp)):
        write(tmp_path / "record.json", after)
        assert read(tmp_path / "record.json") == after, "a file holds every bit"
        assert len(differences(before, after, exact=True)) == 1
        assert differences(before, after, exact=False) == []
    assert len(differences(before, record(0.0, 1.001, scalar=1.001), exact=False)) == 2
    assert len(differences(before, record(1.0, 1.0, scalar=1.0), exact=False)) == 1


def test_missing_and_new_cases_and_tensors_are_named():
    record = {"a": {"loss": ["float32", 1.0]}, "b": {"loss": ["float32", 1.0], "kl": ["float32", 0.0]}}
    fewer = {"b": {"loss": ["float32", 1.0]}}
    assert differences(record, fewer, exact=False) == ["a: no longer made", "b: kl: no longer made"]
    assert differences(fewer, record, exact=True) == ["b: kl: not in the record", "a: not in the record"]


def test_runs_of_another_machine_are_held_to_what_training_can_move():
    for record in records_of("runs"):
        assert resumed_unlike_plain(record) == out_of_reach(record, copy.deepcopy(record)) == []
        case, name = first_tensor(record)
        other = copy.deepcopy(record)
        other[case][name]["l2"] *= 1.5
        (line,) = out_of_reach(record, other)
        assert line.startswith(f"{case}: {name}: ")
        other = copy.deepcopy(record)
        other["two ranks: killed and resumed"]["step 5: loss"][1] += 1e-9
        (line,) = resumed_unlike_plain(other)
        assert line.startswith("two ranks: step 5: loss: ")
