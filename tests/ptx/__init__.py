"""The compiled kernels, run as PTX on a CPU, with a memory check and a race check.

| Module | Content |
| --- | --- |
| `program.py` | parses the PTX of one kernel into basic blocks |
| `operands.py`, `instructions.py`, `translator.py` | translate each block into a Python function over numpy arrays |
| `arithmetic.py` | arithmetic of PTX that numpy lacks |
| `memory.py`, `races.py` | memory of the tensors and of a thread block, its checks; data races |
| `lanes.py`, `launch.py` | lanes that execute together; thread blocks and the order in which they run |
| `report.py`, `emulator.py` | what was found; the hook that makes Triton's launches run here |
| `batches.py`, `edited_kernels.py` | inputs with their float64 results; copies of the kernels with planted faults |
| `kernels_as_ptx.py` | a pytest plugin that runs the checks of `tests/kernels/interpreter` as PTX |
"""
