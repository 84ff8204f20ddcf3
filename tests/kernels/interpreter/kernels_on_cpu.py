"""A pytest plugin (`-p tests.kernels.interpreter.kernels_on_cpu`): kernels on CPU tensors, in Triton's interpreter.

The public functions then use the kernels.
"""

import os

import numpy
import torch
from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is now

import triton.language as tl
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
_patch_lang = interpreter._patch_lang
_patched: set[int] = set()  # the language modules that are patched while a kernel runs


def _patch_lang_once(fn):
    """Patch the language once per kernel; the interpreter does so in every device function, for 2/5 of its time."""
    langs = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if langs and langs <= _patched:
        return interpreter._LangPatchScope()
    is_kernel, scope = not _patched, _patch_lang(fn)
    _patched.update(langs)
    if is_kernel:
        restore = scope.restore
        scope.restore = lambda: (_patched.clear(), restore())
    return scope


interpreter._patch_lang = _patch_lang_once


def pytest_collection_modifyitems():
    settings.register_profile("few", deadline=None, database=None, max_examples=6)
    settings.load_profile("few")
