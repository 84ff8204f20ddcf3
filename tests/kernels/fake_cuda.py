"""CUDA tensors without a GPU: shapes, dtypes and devices as on a GPU, and no values.

Inside `fake_cuda()` a tensor on "cuda" is fake (PyTorch's FakeTensorMode), CPU tensors are real, the registered ops of
expo_kernels run their own code instead of their fake implementation, and a Triton launch is recorded and not run.
Inside `device.strict()` what a GPU would make the host wait for is an error: a read of a device value, a copy that is
not asynchronous, a synchronization; so is an operation on tensors of different devices.
"""

import contextlib
import ctypes
import functools
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from expo_kernels import _compat

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# CUDA implementations that read a value; as ops with a fixed output shape they pass under FakeTensorMode
READING = {aten.multinomial.default, aten.equal.default, aten.is_nonzero.default}


class HostWaitError(AssertionError):
    """The host would wait for the device."""


class MixedDevicesError(AssertionError):
    """An operation or a launch has tensors of different devices."""


class Calls:
    """What one `strict` block did."""

    def __init__(self):
        self.aten = Counter()  # ATen calls by name: what the host spends its time on
        self.launches = Counter()  # Triton launches by kernel
        self.launch_arguments = []  # of every launch, by name
        self.waits = []  # calls of Event.synchronize
        self.reads = 0  # of device values, as many as `strict` allows
        self.event_devices = []  # index of the device on whose stream each event was recorded

    @property
    def num_aten(self):
        return self.aten.total()

    @property
    def num_launches(self):
        return self.launches.total()


class FakeDevice(TorchDispatchMode):
    """The mode behind `fake_cuda`; also stands in for the parts of `torch.cuda` that expo_kernels uses.

    Args:
        arriving: the integers that an asynchronous copy to the host brings.
    """

    def __init__(self, arriving=0):
        super().__init__()
        self.calls, self.is_strict, self.most_reads = Calls(), False, 0
        self.arriving, self.is_capturing = arriving, False
        self.current, self._pinned = 0, set()

    @contextlib.contextmanager
    def strict(self, most_reads=0):
        """Record the calls of this block in a new `Calls`; waiting and mixed devices are errors.

        Up to `most_reads` times, item() and tolist() of a device's tensor are no error and give zeros.
        """
        before = self.calls, self.is_strict, self.most_reads
        self.calls, self.is_strict, self.most_reads = Calls(), True, most_reads
        try:
            yield self.calls
        finally:
            self.calls, self.is_strict, self.most_reads = before

    def read(self, tensor, name):
        """Zeros in place of the tensor's values."""
        self.calls.reads += 1
        if self.is_strict and self.calls.reads > self.most_reads:
            raise HostWaitError(f"{name} reads a value on {tensor.device}")
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype).tolist()

    # --- ATen calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "expo_kernels":
            with self:
                return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with self:
            made = func.decompose(*args, **kwargs)  # inside an op, PyTorch's composite calls arrive whole
        if made is not NotImplemented:
            return made
        self.calls.aten[str(func)] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if target.type == "cpu" and all(tensor.device.type == "cpu" for tensor in tensors):
            return self._run_on_cpu(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return self.read(tensors[0], "item()")
        if func in COPIES:
            return self._copy(func, target, args, kwargs)
        self._check(func, tensors, args)
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWaitError(f"{func} reads a value on {tensors[0].device}") from error

    def _run_on_cpu(self, func, args, kwargs):
        is_pinned = kwargs.pop("pin_memory", False) or func is aten._pin_memory.default
        if is_pinned and self.is_capturing:
            raise HostWaitError("pinned memory is allocated during a capture")
        with unset_fake_temporarily():
            made = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if is_pinned:
            self._pinned.add(made.untyped_storage()._cdata)
        return made

    def _copy(self, func, target, args, kwargs):
        into = func is aten.copy_.default
        source, target = (args[1], args[0].device) if into else (args[0], target)
        if source.device == target or not self.is_strict:
            return self._copied(func, target, args, kwargs)
        is_async = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        on_host = args[0] if into and target.type == "cpu" else source
        if not is_async:
            raise HostWaitError(
                f"{func} from {source.device} to {target} waits; copy asynchronously from pinned memory"
            )
        if on_host.device.type == "cpu" and on_host.untyped_storage()._cdata not in self._pinned:
            raise HostWaitError(f"{func} from {source.device} to {target} needs pinned memory to be asynchronous")
        return self._copied(func, target, args, kwargs)

    def _copied(self, func, target, args, kwargs):
        if func is aten.copy_.default and target.type == "cpu":
            with unset_fake_temporarily():
                return args[0].fill_(self.arriving)
        return func(*args, **kwargs)

    def _check(self, func, tensors, args):
        if not self.is_strict:
            return
        devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
        if len(devices) > 1:
            raise MixedDevicesError(f"{func} has tensors on {sorted(map(str, devices))}")
        if func in READING:
            raise HostWaitError(f"{func} reads a value on {tensors[0].device}")
        if func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise HostWaitError(f"{func} with a mask counts its elements on the host; use masked_fill or where")

    # --- launches

    def launch(self, kernel, *args, grid, warmup, **kwargs):
        """In place of `JITFunction.run`."""
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        devices = {value.device for value in named.values() if isinstance(value, torch.Tensor)}
        if devices != {torch.device("cuda", self.current)}:
            raise MixedDevicesError(
                f"{kernel.__name__} launches on cuda:{self.current} with tensors on {sorted(map(str, devices))}"
            )
        assert all(isinstance(size, int) for size in grid)
        self.calls.launches[kernel.__name__] += 1
        self.calls.launch_arguments.append(named)

    # --- torch.cuda

    def patches(self):
        """What to replace inside `fake_cuda`: (owner, name, replacement)."""
        fake = self

        class Current:
            def __init__(self, device):
                self.index = torch.device(device).index or 0

            def __enter__(self):
                self.before, fake.current = fake.current, self.index

            def __exit__(self, *_):
                fake.current = self.before

        class Event:
            def record(self, stream=None):
                fake.calls.event_devices.append(fake.current)

            def synchronize(self):
                fake.calls.waits.append("Event.synchronize")

        def synchronize(*_):
            raise HostWaitError("torch.cuda.synchronize waits for the device")

        def set_device(device):
            fake.current = torch.device(device).index

        class Properties:
            multi_processor_count = 132

        return [
            (torch.cuda, "device", Current),
            (torch.cuda, "Event", Event),
            (torch.cuda, "synchronize", synchronize),
            (torch.cuda, "set_device", set_device),
            (torch.cuda, "current_device", lambda: fake.current),
            (torch.cuda, "is_current_stream_capturing", lambda: fake.is_capturing),
            (torch.cuda, "get_device_properties", lambda _: Properties),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (JITFunction, "run", lambda kernel, *args, **kwargs: fake.launch(kernel, *args, **kwargs)),
            (FakeTensor, "data_ptr", _data_ptr),
            (FakeTensor, "tolist", lambda tensor: fake.read(tensor, "tolist()")),
            (_compat, "is_being_traced", lambda _: False),
            (_compat, "graph_is_kept", lambda: False),
        ]


def _data_ptr(tensor):
    """An address whose low bits are those of a CUDA allocation, and which tensors of one storage share."""
    return tensor.untyped_storage()._cdata * 512 + tensor.storage_offset() * tensor.element_size()


@functools.cache
def _guard_cuda():
    """Let autograd record fake CUDA tensors in a build of PyTorch without CUDA: it asks the guard of a tensor's device
    for the current stream. The guard of the CPU, which does nothing, answers for CUDA too."""
    if not torch.backends.cuda.is_built():
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        guards[1] = guards[0]  # by DeviceType: 0 is CPU, 1 is CUDA


@contextlib.contextmanager
def fake_cuda(arriving=0):
    """A `FakeDevice`; `arriving` are the integers that an asynchronous copy to the host brings."""
    _guard_cuda()
    device = FakeDevice(arriving)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for owner, name, replacement in device.patches():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(device)
        yield device


def backward(loss, grad=None):
    """`loss.backward()`: autograd's own engine would start a thread for the device."""
    grads = {loss.grad_fn: [None] * _num_outputs(loss.grad_fn)}
    grads[loss.grad_fn][loss.output_nr] = torch.ones_like(loss) if grad is None else grad
    with torch.no_grad():
        for node in _topological(loss.grad_fn):
            if node not in grads:
                continue
            for (target, slot), value in _gradients(node, grads.pop(node)):
                expected = target._input_metadata[slot]
                value = value.sum_to_size(expected.shape).to(expected.dtype)
                into = grads.setdefault(target, [None] * _num_outputs(target))
                into[slot] = value if into[slot] is None else into[slot] + value


def _gradients(node, given):
    """What a node passes on: pairs of (node, number of its output) and gradient."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # it returns one gradient for each argument, and has an edge for each argument that is a tensor
        made = node.apply(*given)
        made = made if isinstance(made, tuple) else (made,)
        made = [value for value, is_needed in zip(made, node.needs_input_grad, strict=True) if is_needed]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
    else:
        made, edges = node(*given), node.next_functions
        made = made if isinstance(made, tuple) else (made,)
    return [(edge, value) for edge, value in zip(edges, made, strict=True) if edge[0] is not None and value is not None]


def _topological(root):
    """Every node of a graph, each before those it passes gradients to."""
    ordered, seen = [], set()

    def visit(start):
        stack = [(start, iter(start.next_functions))]
        seen.add(start)
        while stack:
            node, targets = stack[-1]
            for target, _ in targets:
                if target is not None and target not in seen:
                    seen.add(target)
                    stack.append((target, iter(target.next_functions)))
                    break
            else:
                ordered.append(node)
                stack.pop()

    visit(root)
    return reversed(ordered)


def _num_outputs(node):
    return max(1, len(node._input_metadata))
