"""Comparisons of evaluations: simulated differences are found, and evaluations of other protocols are refused."""

import copy
import json
import random
import re
import shutil

import pytest

from expo.errors import ConfigError
from expo.evaluate import main
from expo.evaluation.compare import Results, compare
from expo.evaluation.intervals import mean_with_interval
from expo.evaluation.scores import pass_at_k, powers_of_two


def results(correct, n, label="a", **protocol):
    """The results of an evaluation of one set; correct: c of each question."""
    questions = [
        {"id": f"q{i}", "level": "", "correct": c, "majority": float(2 * c > n)} for i, c in enumerate(correct)
    ]
    scores = {
        "num_questions": len(correct),
        "pass_at": {str(k): mean_with_interval([pass_at_k(n, c, k) for c in correct]) for k in powers_of_two(n)},
        "maj_at_n": mean_with_interval([question["majority"] for question in questions]),
        "questions": questions,
        **{f"{name}_fraction": 0.0 for name in ("truncated", "unparsed", "timeout")},
    }
    metadata = {"model": {"path": label}, "protocol": {"num_samples": n, "seed": 0, "temperature": 1.0, **protocol}}
    return Results(label, {**metadata, "questions": {"set": {"questions_sha256": "0"}}, "sets": {"set": scores}})


def sampled(rates, n, generator):
    return [sum(generator.random() < rate for _ in range(n)) for rate in rates]


def by_metric(lines):
    return {line.metric: line.change for line in lines}


def test_a_known_difference_is_reported_at_every_k():
    # one more correct reply to each of 40 questions: pass@1 rises by exactly 1 / n
    n, correct = 8, [c % 6 for c in range(40)]
    found = by_metric(compare(results(correct, n), results([c + 1 for c in correct], n)))
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@8", "maj@8"]
    # equal gains have no spread to resample: Wilson's interval
    assert found["pass@1"].mean == pytest.approx(1 / 8)
    assert 0 < found["pass@1"].low < 0.05 < 0.25 < found["pass@1"].high
    for k in powers_of_two(n):
        gains = [pass_at_k(n, c + 1, k) - pass_at_k(n, c, k) for c in correct]
        assert found[f"pass@{k}"].mean == pytest.approx(sum(gains) / 40)
    assert found["maj@8"].mean == pytest.approx(sum(c == 4 for c in correct) / 40)


def test_a_simulated_difference_is_significant_when_paired_and_not_when_unpaired():
    generator = random.Random(0)
    rates = [generator.random() * 0.9 for _ in range(120)]
    a = results(sampled(rates, 32, generator), 32)
    b = results(sampled([rate + 0.05 for rate in rates], 32, generator), 32)
    (line, *_) = compare(a, b)
    assert line.change.low > 0.02
    assert line.change.low < 0.05 < line.change.high
    assert line.after.low < line.before.high, "the intervals of A and B overlap"


def test_without_a_difference_about_one_interval_in_twenty_excludes_zero():
    num_false = {"pass@1": 0, "pass@8": 0, "maj@8": 0}
    for seed in range(200):
        generator = random.Random(seed)
        rates = [generator.random() for _ in range(60)]
        a, b = (results(sampled(rates, 8, generator), 8) for _ in "ab")
        found = by_metric(compare(a, b))
        for metric in num_false:
            num_false[metric] += found[metric].low > 0 or found[metric].high < 0
    # 5 % of 200 are 10, with a standard deviation of 3.1; a percentile bootstrap of 60 questions is a little narrow
    for metric, count in num_false.items():
        assert 1 <= count <= 21, (metric, count)


@pytest.mark.parametrize("correct", [[0] * 16, [4] * 16, [2], [1, 3, 0, 4] * 5])
def test_ties_are_too_few_to_tell(correct, tmp_path, capsys):
    a, b = (write(tmp_path / name, results(correct, 4, name)) for name in "ab")
    for line in compare(results(correct, 4), results(correct, 4)):
        assert line.change.low < line.change.mean == 0 < line.change.high
        assert (line.num_differing, line.remark) == (0, "too few to tell")
    assert main(["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.count("too few to tell") == 4  # pass@1, 2, 4 and maj@4
    assert (b / "compare.html").read_text().count("<small>too few to tell</small>") == 4


def test_five_questions_that_differ_are_too_few_and_six_are_not():
    for num, trend in ((1, ""), (5, ""), (6, "up"), (16, "up")):
        (line, *_) = compare(results([0] * num, 4), results([4] * num, 4))
        assert (line.change.mean, line.trend) == (1.0, trend)
        (line, *_) = compare(results([4] * num, 4), results([0] * num, 4))
        assert line.trend == ("down" if trend else "")


def test_evaluations_of_other_protocols_are_refused_without_anyway():
    a = results([1, 2, 3], 4)
    with pytest.raises(ConfigError, match=r"protocol\.temperature \(1\.0 -> 0\.6\)"):
        compare(a, results([1, 2, 3], 4, temperature=0.6))
    assert compare(a, results([1, 2, 3], 4, temperature=0.6), anyway=True)
    assert compare(a, results([1, 2, 3], 4, seed=1)), "the seed is not part of the protocol"
    other = results([1, 2, 3], 4)
    other.content["questions"]["set"]["questions_sha256"] = "1"
    with pytest.raises(ConfigError, match=r"questions_sha256\.set \(0 -> 1\)"):
        compare(a, other)


def test_with_anyway_the_questions_and_ks_in_both_are_compared():
    a, b = results([1, 2, 3], 4), results([2, 4, 6, 8], 8)
    lines = compare(a, b, anyway=True)
    assert [(line.metric, line.num_questions) for line in lines] == [("pass@1", 3), ("pass@2", 3), ("pass@4", 3)]
    assert lines[0].change.mean == pytest.approx(0)
    apart = copy.deepcopy(b)
    for question in apart.content["sets"]["set"]["questions"]:
        question["id"] += "x"
    with pytest.raises(ConfigError, match="no question in common"):
        compare(a, apart, anyway=True)


def write(folder, found):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(found.content))
    return folder


def test_the_command_prints_the_table_and_writes_a_page_with_curves(tmp_path, capsys):
    correct = [c % 6 for c in range(40)]
    a = write(tmp_path / "a", results(correct, 8))
    b = write(tmp_path / "b", results([c + 1 for c in correct], 8, "<b>"))
    assert main(["compare", str(a), str(b)]) == 0
    assert re.search(r"set +40 +pass@1 .* \+0\.125 \[\+0\.013, \+0\.261\]\*\n", out := capsys.readouterr().out)
    assert "\n* Wilson's interval with n = questions" in out
    page = (b / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<td>maj@8</td>" in page
    assert "<b>" not in page.split("</style>")[1].replace("<td><b>", "")
    assert (b / "pass_at_k-set.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "c" / "d")]) == 0
    assert (tmp_path / "c" / "d" / "compare.html").exists()


def test_a_folder_without_results_is_named(tmp_path, capsys):
    a = write(tmp_path / "a", results([1], 2))
    shutil.copytree(a, tmp_path / "b")
    (tmp_path / "b" / "results.json").write_text("{}")
    for bad in (tmp_path / "b", tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(a), str(bad)])
        assert stop.value.code == 2
        assert "is not the result of an evaluation" in capsys.readouterr().err
