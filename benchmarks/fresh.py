"""Runs functions in fresh processes, forked from a server process that has only imported the libraries."""

import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

PRELOADED = ("benchmarks.peak", "benchmarks.trl_step", "liger_kernel.chunked_loss", "trl.kernels", "trl.trainer.utils")


def in_fresh_process(run: Callable[..., Any], *arguments: object) -> Any:
    """The result of `run(*arguments)` in a new process with the same number of threads as this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOADED if importlib.util.find_spec(name.split(".")[0])])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), run, arguments).result()


def _with_threads(num_threads: int, run: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
    torch.set_num_threads(num_threads)
    return run(*arguments)
