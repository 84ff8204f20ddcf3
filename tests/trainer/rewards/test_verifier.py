"""The verifier: correct verdicts, limits on time and memory, and no process left running."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

import expo.rewards.methods as methods_module
from expo.errors import GoldError
from expo.rewards.answers import normalise
from expo.rewards.verifier import Verifier, check_answers, ungradable_answers
from expo.types import Verdict

pytestmark = pytest.mark.medium

TIMEOUT_S = 1.5
# Each keeps math-verify busy for a minute or more.
HANGING = (r"9^{9^{9}}", r"\binom{1000000}{500000}", "10000000!", r"\sum_{k=1}^{10000000}\frac1k")
# Equal in pairs, which takes computer algebra to see.
FORMULA, SAME = r"\sin x+1", r"1+\sin x"
ANOTHER, SAME_AS_ANOTHER = r"\sin x+2", r"2+\sin x"
MEMORY_BOMB = r"10^{10^{10}}"  # 4 GiB as an integer
GOLDEN = [json.loads(line) for line in Path(__file__).with_name("golden_answers.jsonl").read_text().splitlines()]


def boxed(answer: str) -> str:
    return rf"Adding these up, the answer is $\boxed{{{answer}}}$."


def descendants() -> set[int]:
    """Running descendants of this process: the template and its workers."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found: set[int] = set()
    generation = {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found |= generation
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def kinds(verdicts: list[Verdict]) -> list[str]:
    return [verdict.kind for verdict in verdicts]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    """A verifier shared by the tests that do not depend on the number of workers."""
    with Verifier(workers=2, timeout_s=60.0) as verifier:
        yield verifier


# ---- verdicts


@pytest.fixture(scope="module")
def golden_verdicts(verifier: Verifier) -> list[Verdict]:
    return verifier.grade([case["reply"] for case in GOLDEN], [case["answer"] for case in GOLDEN])


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_golden_table(index: int, golden_verdicts: list[Verdict]) -> None:
    case = GOLDEN[index]
    assert golden_verdicts[index].kind == case["kind"], case


def test_every_golden_answer_passes_the_check_at_load() -> None:
    check_answers(case["answer"] for case in GOLDEN)


def test_only_correct_replies_are_rewarded(golden_verdicts: list[Verdict]) -> None:
    for verdict in golden_verdicts:
        assert verdict.reward == (1.0 if verdict.kind == "correct" else 0.0)
        assert (verdict.answer is None) == (verdict.kind == "unparsed")


# ---- gold answers


def test_check_answers_names_those_that_cannot_be_parsed() -> None:
    with pytest.raises(ValueError, match=r"2 gold answers.*'\\\\frac\{1\}\{', ''|2 gold answers.*'', '\\\\frac"):
        check_answers(["16", "(1,2)", "142.0", r"$\frac12$", "['9.6\n']", "Monday", "", r"\frac{1}{"])


def test_every_form_of_an_answer_that_cannot_be_parsed_is_named() -> None:
    assert ungradable_answers(["???", "16", "$???$", "??? "]) == ["???", "$???$", "??? "]


@pytest.mark.parametrize("answer", ["x-", "never -", "N -"])
def test_words_that_no_formula_can_be_graded_against_are_found(answer: str) -> None:
    assert ungradable_answers([answer, "Monday", "north-east", "B"]) == [answer]


def test_an_answer_with_a_wrong_normal_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_module, "normalise_gold", lambda answer: normalise(answer.strip("[]")))
    assert ungradable_answers(["[2,100]", "7"]) == ["[2,100]"]


def test_check_answers_requires_strings() -> None:
    with pytest.raises(TypeError, match="16"):
        check_answers([16])  # type: ignore[list-item]


def test_unparsable_gold_answer_is_an_error_and_the_next_batch_works(verifier: Verifier) -> None:
    with pytest.raises(GoldError, match=r"'\\\\frac\{1\}\{' cannot be parsed; correct or drop its row"):
        verifier.grade([boxed("x+1"), boxed("y")], [r"\frac{1}{", "y"])
    assert kinds(verifier.grade([boxed("x+1")], ["1+x"])) == ["correct"]


def test_lengths_must_agree(verifier: Verifier) -> None:
    with pytest.raises(ValueError, match="2 replies but 1 answers"):
        verifier.grade(["a", "b"], ["1"])


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_bytes": 1024}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Verifier(**wrong)


# ---- workers


def test_integer_batches_start_no_worker() -> None:
    before = descendants()
    with Verifier() as verifier:
        replies = [boxed(str(number % 97)) for number in range(15_000)]
        started = time.perf_counter()
        verdicts = verifier.grade(replies, [str(number % 89) for number in range(15_000)])
        print(f"\n15,000 integer replies: {time.perf_counter() - started:.2f} s")
        assert descendants() == before
    expected = ["correct" if number % 97 == number % 89 else "wrong" for number in range(15_000)]
    assert kinds(verdicts) == expected


def grade_with_hanging(verifier: Verifier, variable: str) -> float:
    """Seconds to grade 60 normal replies, four that hang and a memory bomb; checks the verdicts."""
    answers = [rf"\frac{{{number}}}{{7}} + {variable}" for number in range(60)] + [*HANGING, MEMORY_BOMB]
    gold = [rf"{variable} + \frac{{{number}}}{{7}}" for number in range(60)] + [r"\sqrt{2}"] * 5
    order = random.Random(0).sample(range(len(answers)), len(answers))
    started = time.monotonic()
    verdicts = verifier.grade([boxed(answers[index]) for index in order], [gold[index] for index in order])
    took = time.monotonic() - started
    by_index = dict(zip(order, kinds(verdicts), strict=True))
    assert [by_index[index] for index in range(60)] == ["correct"] * 60
    assert [by_index[index] for index in range(60, 64)] == ["timeout"] * 4
    assert by_index[64] in ("timeout", "wrong")
    return took


def test_hanging_replies_end_at_the_deadline_and_the_pool_recovers() -> None:
    before = descendants()
    with Verifier(workers=2, timeout_s=TIMEOUT_S) as verifier:
        # 60 normal replies first, so that the workers have started before the time is measured
        verifier.grade([boxed(rf"x^2+{number}") for number in range(60)], ["2x"] * 60)
        # other programs may use the cores once or twice, but hardly three times
        times = []
        for variable in "xyz":
            times.append(grade_with_hanging(verifier, variable))
            if times[-1] < TIMEOUT_S + 2.0:
                break
        print(f"\n60 normal and 5 hanging replies: {times} s")
        assert min(times) < TIMEOUT_S + 2.0
        assert len(descendants() - before) == 1 + 2
        again = verifier.grade(
            [boxed(f"{number}x+y") for number in range(60)], [f"y+{number}x" for number in range(60)]
        )
        assert kinds(again) == ["correct"] * 60
    assert descendants() == before


def test_number_of_children_stays_constant() -> None:
    before = descendants()
    counts = []
    with Verifier(workers=2, timeout_s=0.3) as verifier:
        for batch in range(50):
            hangs = batch % 10 == 9
            verdicts = verifier.grade(
                [boxed(f"x+{batch}"), boxed(f"y+{batch}"), boxed(f"9^{{9^{{{batch + 9}}}}}" if hangs else "z")],
                [f"{batch}+x", f"{batch}+y", r"\sqrt{2}"],
            )
            assert kinds(verdicts) == ["correct", "correct", "timeout" if hangs else "wrong"]
            counts.append(len(descendants() - before))
    assert counts == [1 + 2] * 50
    assert descendants() == before


def test_normal_latex_throughput(verifier: Verifier) -> None:
    draw = random.Random(0)
    cases = []
    for _ in range(100):
        a, b, c = draw.randint(2, 60), draw.randint(61, 999), draw.randint(2, 97)
        cases += [
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}", "correct"),
            (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}", "correct"),
            (rf"{a}x+{b}", f"{b}+{a}x", "correct"),
            (rf"x={a}", f"{a}", "correct"),
            (rf"\dfrac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}\pi}}{{{b + 1}}}", "wrong"),
            (rf"{a}\text{{ cm}}", f"{a + 1}", "wrong"),
            (rf"({a}, {b})", rf"\left({a},{b}\right)", "correct"),
            (f"{b}", f"{b + 1}", "wrong"),
        ]
    verifier.grade([boxed(answer) for answer, _, _ in cases[:80]], [gold for _, gold, _ in cases[:80]])
    started = time.perf_counter()
    verdicts = verifier.grade([boxed(answer) for answer, _, _ in cases], [gold for _, gold, _ in cases])
    print(f"\n{len(cases) / (time.perf_counter() - started):.0f} LaTeX replies a second, 2 workers")
    assert kinds(verdicts) == [kind for _, _, kind in cases]


def test_repeated_pairs_are_cached() -> None:
    before = descendants()
    with Verifier(workers=1) as verifier:
        assert kinds(verifier.grade([boxed(FORMULA)] * 3, [SAME] * 3)) == ["correct"] * 3
        verifier.close()
        assert kinds(verifier.grade([boxed(FORMULA)], [SAME])) == ["correct"]
        assert descendants() == before
        assert kinds(verifier.grade([boxed(ANOTHER)], [SAME_AS_ANOTHER])) == ["correct"]


def test_worker_killed_over_an_answer_gives_timeout() -> None:
    before = descendants()
    with Verifier(workers=1, timeout_s=60.0) as verifier:
        verifier.grade([boxed(FORMULA)], [SAME])
        pid = max(descendants() - before)
        killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        killer.start()
        verdicts = verifier.grade([boxed(HANGING[0]), boxed(ANOTHER)], [r"\sqrt{2}", SAME_AS_ANOTHER])
        killer.join()
    assert kinds(verdicts) == ["timeout", "correct"]


def test_worker_killed_while_idle_costs_no_answer() -> None:
    before = descendants()
    with Verifier(workers=1) as verifier:
        verifier.grade([boxed(FORMULA)], [SAME])
        pid = max(descendants() - before)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        assert kinds(verifier.grade([boxed(ANOTHER)], [SAME_AS_ANOTHER])) == ["correct"]


def test_processes_killed_between_batches_are_restarted() -> None:
    before = descendants()
    with Verifier(workers=2) as verifier:
        verifier.grade([boxed(FORMULA)], [SAME])
        for pid in descendants() - before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: descendants() == before)
        assert kinds(verifier.grade([boxed(ANOTHER)], [SAME_AS_ANOTHER])) == ["correct"]


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Verifier() as verifier, pytest.raises(RuntimeError, match="did not start"):
        verifier.grade([boxed(FORMULA)], [SAME])


# ---- callers


def test_works_from_several_threads_at_once(verifier: Verifier) -> None:
    outcomes: dict[int, list[str]] = {}

    def grade(thread: int) -> None:
        replies = [boxed(f"{number}x+{thread}") for number in range(10)]
        outcomes[thread] = kinds(verifier.grade(replies, [f"{thread}+{number}x" for number in range(10)]))

    threads = [threading.Thread(target=grade, args=(thread,)) for thread in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {thread: ["correct"] * 10 for thread in range(1, 5)}


def test_works_under_asyncio_in_the_loop_and_beside_it(verifier: Verifier) -> None:
    async def run() -> list[str]:
        direct = verifier.grade([boxed("y+1")], ["1+y"])
        beside = await asyncio.gather(
            *(asyncio.to_thread(verifier.grade, [boxed(f"z+{number}")], [f"{number}+z"]) for number in range(4))
        )
        return kinds(direct) + [kind for verdicts in beside for kind in kinds(verdicts)]

    assert asyncio.run(run()) == ["correct"] * 5


# A main module without `if __name__`, with one idle and one hanging worker when it is killed.
ABANDONED = r"""
import threading, time
from expo.rewards.verifier import Verifier
verifier = Verifier(workers=2, timeout_s=2.0)
verifier.grade([r"\boxed{1+\sin x}", r"\boxed{2+\sin x}"], [r"\sin x+1", r"\sin x+2"])
threading.Thread(target=verifier.grade, args=([r"\boxed{9^{9^{9}}}"], ["x"])).start()
time.sleep(0.5)
print(*(worker.pid for worker in verifier._pool._workers), verifier._pool._template.process.pid, flush=True)
time.sleep(60)
"""


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "abandoned.py"
    script.write_text(ABANDONED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(is_running(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_importing_the_verifier_loads_no_algebra_and_no_tensors() -> None:
    heavy = "('torch', 'sympy', 'transformers')"
    command = f"import sys, expo.rewards.verifier; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_workers_load_no_tensors() -> None:
    before = descendants()
    with Verifier(workers=1) as verifier:
        verifier.grade([boxed(FORMULA)], [SAME])
        pid = max(descendants() - before)
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
