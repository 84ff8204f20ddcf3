"""Checks and measures the loss of several contenders in shared rounds, and returns rows of results."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.inputs import Inputs
from benchmarks.machine import Machine, RoundRobin, forward_and_backward
from benchmarks.peak import extra_peak_mib
from benchmarks.truth import Truth, check_formula, checked_errors, truth_of

Row = dict[str, Any]
Entry = tuple[str, Contender, Inputs]  # the first is the name of the case; cases may share rounds


@dataclass(frozen=True)
class Measured:
    """Rows with measurements or the reason why there are none, and the failures that the test reports."""

    rows: list[Row]
    failures: list[str]


def measure_losses(
    entries: Iterable[Entry],
    machine: Machine,
    rounds: Callable[[RoundRobin], dict[Any, dict[str, Any]]],
    obstacle_of: Callable[[str], str | None],
    floor: Callable[[], Any] | None = None,
) -> Measured:
    """Checks every entry against float64, times the correct ones in shared rounds, then measures their memory.

    A contender that is wrong or raises an error is added to the failures and does not affect the others.
    """
    torch._dynamo.reset()
    checked, rows, failures = _check_all(entries, machine, obstacle_of)
    before = _num_graphs()
    runs = {
        index: forward_and_backward(machine, entry.run, entry.inputs)
        for index, entry in enumerate(checked)
        if entry is not None
    }
    times = rounds(RoundRobin(machine, runs, floor))
    if _num_graphs() != before:
        failures.append(f"{_num_graphs() - before} graphs were compiled inside the rounds; their times include it")
    for index, entry in enumerate(checked):
        if entry is not None:
            rows[index] |= {**times[index], "extra_peak_mib": _peak(entry, machine), "errors": entry.errors}
    return Measured(rows, failures)


@dataclass(frozen=True)
class _Checked:
    contender: Contender
    inputs: Inputs
    run: Callable[[], Tensor]
    errors: dict[str, float]


def _check_all(
    entries: Iterable[Entry], machine: Machine, obstacle_of: Callable[[str], str | None]
) -> tuple[list[_Checked | None], list[Row], list[str]]:
    """Checked entries (None: not measurable), their rows so far, and failures; makes the first calls, which compile."""
    checked: list[_Checked | None] = []
    rows, failures = [], []
    truths: dict[tuple[int, Any], Truth] = {}
    for case, contender, inputs in entries:
        rows.append(_described(case, contender, inputs))
        note = obstacle_of(contender.name)
        if note is None:
            try:
                checked.append(_check(contender, inputs, truths, machine))
                continue
            except torch.OutOfMemoryError:
                note = f"out of memory on {inputs.case}"
                torch.cuda.empty_cache()
            except Exception as error:  # a peer may raise anything
                note = f"{type(error).__name__}: {error}"
                failures.append(f"{contender.name} on {inputs.case}: {note}")
            inputs.clear()
        checked.append(None)
        rows[-1] = {"case": case, "contender": contender.name, "note": note}
    return checked, rows, failures


def _check(contender: Contender, inputs: Inputs, truths: dict[tuple[int, Any], Truth], machine: Machine) -> _Checked:
    if inputs.case.dtype != "float32":
        check_formula(contender, inputs.case, machine.device)
    key = (id(inputs), contender.loss_of)
    if key not in truths:
        truths.clear()  # keep one at a time: it is twice as large as the gradients
        truths[key] = truth_of(inputs, contender.loss_of)
    errors = checked_errors(contender, inputs, truths[key])
    return _Checked(contender, inputs, contender.prepare(inputs), errors)


def _described(case: str, contender: Contender, inputs: Inputs) -> Row:
    gradients = {name: _mib(tensor) for name, tensor in vars(inputs).items() if _is_learnt(tensor)}
    return {
        "case": case,
        "settings": asdict(inputs.case),
        "contender": contender.name,
        "computes": contender.computes,
        "gradients_mib": gradients,  # every contender returns them
    }


def _peak(entry: _Checked, machine: Machine) -> float | None:
    if not machine.is_gpu:
        return extra_peak_mib(entry.contender.name, entry.inputs.case)
    entry.inputs.clear()
    peak = machine.extra_peak_mib(lambda: entry.run().backward())
    entry.inputs.clear()
    return peak


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _is_learnt(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _mib(tensor: Tensor) -> float:
    return tensor.numel() * tensor.element_size() / 2**20
