"""A pytest plugin (`-p tests.kernels.interpreter.kernels_on_cpu`): kernels on CPU tensors, in Triton's interpreter.

The public functions then use the kernels.
"""

import os

import numpy
import torch
from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is now

from triton.runtime import interpreter

from expo_kernels import _launch

_launch._switch.kernels_on_cpu = True
_convert_float = interpreter._convert_float


def _convert_float_as_gpus_do(values, from_dtype, to_dtype, rounding_mode):
    """Round float32 to the nearest bfloat16; the interpreter truncates, which doubles the error."""
    if (from_dtype.name, to_dtype.name) != ("fp32", "bf16"):
        return _convert_float(values, from_dtype, to_dtype, rounding_mode)
    rounded = torch.from_numpy(numpy.ascontiguousarray(values)).bfloat16().view(torch.int16)
    return rounded.numpy().view(numpy.uint16)


interpreter._convert_float = _convert_float_as_gpus_do


def pytest_collection_modifyitems():
    settings.register_profile("few", deadline=None, database=None, max_examples=6)
    settings.load_profile("few")
