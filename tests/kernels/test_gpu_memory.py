"""Chunk sizes on a GPU, and the memory of a call, counted from its allocations with tensors that have no values."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expo_kernels import _engine, _launch, _narrowing, _products_gpu
from expo_kernels._head import HeadCall, HeadTensors, LinearHead, Span, Spans
from expo_kernels._products_gpu import make_products

GPU = torch.device("cuda")
MIB = 2**20
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def most_rows(V, H, **options):
    return _launch.most_rows(V, itemsize=4, buffers=1, device=GPU, hidden_size=H, **({"budget_mb": None} | options))


def test_a_chunk_is_as_many_whole_tiles_as_fit():
    assert most_rows(151_936, 4096) == 1024
    for V in (32_000, 49_152, 128_256, 151_936, 262_144):
        for H in (576, 896, 4096, 8192):
            for is_split in (False, True):
                rows = most_rows(V, H, is_split=is_split)
                assert rows % 256 == 0
                assert rows * V * 4 <= 640 * MIB


def test_an_explicit_budget_is_obeyed_on_a_gpu():
    for budget_mb in (1, 64, 300, 512, 2048):
        rows = most_rows(151_936, 4096, budget_mb=budget_mb)
        assert rows == 1 or rows * 151_936 * 4 <= budget_mb * MIB
        assert rows < 256 or rows % 256 == 0


@pytest.mark.parametrize("num_tokens", [1, 255, 1000, 1024, 1100, 8192, 8200, 20_000])
def test_every_chunk_but_the_last_fills_its_tiles(num_tokens):
    step = _launch.chunk_rows(num_tokens, 1024, _launch.row_multiple(GPU))
    assert step % 256 == 0 or step == num_tokens < 1024
    assert step <= 1024
    # no more tiles of 128 rows than one chunk of all rows would have
    sizes = [min(step, num_tokens - start) for start in range(0, num_tokens, step)]
    assert sum(-(-size // 128) for size in sizes) == -(-num_tokens // 128)


def test_chunks_on_a_cpu_have_equal_sizes():
    assert _launch.row_multiple(torch.device("cpu")) == 1
    assert _launch.chunk_rows(8200, 1024) == 912


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, until it is freed."""

    def __init__(self, *inputs):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._known.discard(key)
        self.now -= size


def peak_bytes(N, H, V, hidden_dtype, weight_dtype, monkeypatch):
    """Of a call and its backward pass, without the row kernels, which allocate a few numbers per row."""
    monkeypatch.setattr(_launch._switch, "kernels_on_cpu", True)
    monkeypatch.setattr(_products_gpu, "product", lambda out, *_, **__: out)  # allocates nothing on a GPU
    with FakeTensorMode():
        hidden, weight = torch.empty(1, N, H, dtype=hidden_dtype), torch.empty(V, H, dtype=weight_dtype)
        ids, mask = torch.empty(1, N, dtype=torch.int64), torch.empty(1, N, dtype=torch.bool)
        order, scale = torch.empty(N, dtype=torch.int64), torch.empty(())
        with AllocatedBytes(hidden, weight, ids, mask, order, scale) as counted:
            call = HeadCall(HeadTensors(hidden, weight), ids, mask, 1.0, None, None, (True, True, False))
            most = most_rows(V, H, is_split=_products_gpu.splits(hidden_dtype, weight_dtype))
            step = _launch.chunk_rows(N, most, _launch.row_multiple(GPU))
            rows = [slice(start, min(start + step, N)) for start in range(0, N, step)]
            head = LinearHead(
                call.tensors, ids.view(-1), call.wants_grad, make_products(hidden, weight), mask=mask.view(-1)
            )
            for chunk in head.chunks(Spans(step, [Span(part, order) for part in rows])):
                head.accumulate_grads(chunk)
            gradients = _engine._made(head.gradients(), call)
            del head, chunk
            groups = _narrowing.grouped(gradients, [1, V])
            # a gradient that is as wide as its input is scaled in place
            returned = [
                parts[0] if tensor.dtype == F32 else _narrowing.narrowed(parts, tensor.dtype, scale)
                for parts, tensor in zip(groups, call.tensors, strict=False)
            ]
            assert [tensor.dtype for tensor in returned] == [hidden_dtype, weight_dtype]
            del gradients
            # what is left is what the caller keeps, but for padding of a few rows
            assert counted.now <= 2 * H * (64 * 4) + sum(t.numel() * t.itemsize for t in returned)
    return counted.peak


CASES = [
    (8192, 4096, 151_936, BF16, BF16),
    (16_384, 2048, 128_256, BF16, BF16),
    (8192, 896, 151_936, BF16, BF16),
    (2000, 4096, 151_936, F32, F32),
    (2000, 4096, 151_936, BF16, F32),
    (2000, 2048, 128_256, F32, BF16),
    (2000, 2048, 128_256, F16, F16),
    (1000, 576, 49_152, F32, F32),
]


@pytest.mark.parametrize(("N", "H", "V", "hidden_dtype", "weight_dtype"), CASES)
def test_a_call_needs_no_more_than_its_gradients_in_float32_and_640_mib(
    N, H, V, hidden_dtype, weight_dtype, monkeypatch
):
    peak = peak_bytes(N, H, V, hidden_dtype, weight_dtype, monkeypatch)
    gradients = 4 * N * H + 4 * V * H
    assert peak <= gradients + 640 * MIB
    assert peak >= gradients + min(N, 512) * V * 4  # the count sees the chunk


@pytest.mark.parametrize("num_rows", [64, 65, 127, 128, 129, 1000, 1003])
@pytest.mark.parametrize("factor", [None, 0.3])
def test_a_gradient_is_narrowed_in_the_memory_of_its_sum(num_rows, factor, monkeypatch):
    monkeypatch.setattr(_launch._switch, "kernels_on_cpu", True)
    monkeypatch.setattr(_narrowing, "COPIED_AT_ONCE", 48)  # several slices in the first part
    H = 24
    weight = torch.empty(num_rows, H, dtype=BF16)
    parts = [torch.randn(*shape) for shape in _narrowing.part_shapes(weight)]
    exact = torch.cat(parts) if factor is None else torch.cat(parts) * factor
    made = _narrowing.narrowed(parts, BF16, None if factor is None else torch.tensor(factor))
    assert torch.equal(made, exact.bfloat16())
    assert made.is_contiguous()
    assert len(parts) == (1 if num_rows <= 64 else 2)
    if len(parts) == 2:
        assert made.data_ptr() == parts[0].data_ptr()
        # the parts hold whole groups of 64 rows, so the result leaves less than that unused
        assert made.untyped_storage().nbytes() - made.nbytes < 64 * H * 4


def test_a_sum_is_one_tensor_where_its_gradient_is_as_wide(monkeypatch):
    assert len(_narrowing.part_shapes(torch.empty(1000, 8, dtype=BF16))) == 1
    monkeypatch.setattr(_launch._switch, "kernels_on_cpu", True)
    assert len(_narrowing.part_shapes(torch.empty(1000, 8, dtype=BF16))) == 2
    assert len(_narrowing.part_shapes(torch.empty(1000, 8))) == 1
