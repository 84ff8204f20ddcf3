"""The products around the kernels, with CPU tensors: the same operands, multiplied as float32 copies."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from expo_kernels import _launch, _precision, _products_gpu
from tests.numerics import relative_error

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N, H, V = 48, 256, 1003
# hidden states, weight: products of 16-bit operands for logits, dHidden and dWeight, in units of 2NHV
COSTS = {
    (BF16, BF16): (1, 1, 1),
    (F16, F16): (1, 3, 3),
    (F32, F32): (3, 3, 3),
    (BF16, F32): (2, 3, 2),
    (F16, F32): (2, 3, 3),
    (F32, BF16): (2, 2, 3),
    (F32, F16): (2, 3, 3),
    (BF16, F16): (1, 3, 2),
    (F16, BF16): (1, 2, 3),
}
names = {F32: "float32", BF16: "bfloat16", F16: "float16"}
every_pair = pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"), COSTS, ids=[f"{names[left]}-{names[right]}" for left, right in COSTS]
)


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    monkeypatch.setattr(_launch, "SPLIT_BYTES", 320 * H * 4)


def make(hidden_dtype, weight_dtype, hidden_scale=1.0, weight_scale=1.0):
    """Hidden states with one large feature and a weight with one large value, as language models have them; logits of
    standard deviation 2, if the scales are opposite."""
    hidden = torch.randn(N, H)
    hidden[:, 7] *= 30
    weight = torch.randn(V, H)
    weight[:, 7] *= 0.1
    weight[3, 11] = 40
    hidden *= 2 / (hidden @ weight.T).std()
    return (hidden * hidden_scale).to(hidden_dtype), (weight * weight_scale).to(weight_dtype)


class CalledOps(TorchDispatchMode):
    """The names of the operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def logits_of(hidden, weight, bias=None):
    products = _products_gpu.make_products(hidden, weight)
    out = products.empty_logits(len(hidden), len(weight), CPU)
    products.write_logits(out, products.operand(hidden), weight, bias, 1.0)
    return out


def logp_error(logits, hidden, weight):
    truth = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    return (torch.log_softmax(logits.double(), dim=-1) - truth).abs().max()


@every_pair
def test_log_probs_stay_within_2e_5_nats(hidden_dtype, weight_dtype):
    hidden, weight = make(hidden_dtype, weight_dtype)
    assert logp_error(logits_of(hidden, weight), hidden, weight) <= 2e-5
    bias = torch.randn(V)
    torch.testing.assert_close(logits_of(hidden, weight, bias), logits_of(hidden, weight) + bias)


@pytest.mark.parametrize(
    ("hidden_scale", "weight_scale"),
    [(1e-4, 1e4), (1e4, 1e-4), (1e6, 1e-6), (1e-12, 1e12), (1e20, 1e-20), (2e3, 1.0), (1e-3, 1e-6)],
)
def test_scales_of_hidden_states_and_weight_do_not_matter(hidden_scale, weight_scale):
    # at (2e3, 1.0) logits reach 1e4 and some terms of them exceed the range of float16
    hidden, weight = make(F32, F32, hidden_scale, weight_scale)
    largest = float((hidden.double() @ weight.double().T).abs().max())
    error = logp_error(logits_of(hidden, weight), hidden, weight)
    assert error <= max(2e-5, 2 * logp_error(hidden @ weight.T, hidden, weight), 1e-7 * largest)


def test_a_weight_of_zeros_and_hidden_states_of_zeros_give_zeros():
    hidden, weight = make(F32, F32)
    assert logits_of(hidden, torch.zeros_like(weight)).eq(0).all()
    assert logits_of(torch.zeros_like(hidden), weight).eq(0).all()


@every_pair
def test_gradients_stay_within_their_bounds(hidden_dtype, weight_dtype):
    hidden, weight = make(hidden_dtype, weight_dtype)
    products = _products_gpu.make_products(hidden, weight)
    logits = products.empty_logits(N, V, CPU)
    products.write_logits(logits, products.operand(hidden), weight, None, 1.0)
    probs = torch.softmax(logits, dim=-1)
    probs[torch.arange(N), torch.multinomial(probs, 1)[:, 0]] -= 1
    exact = probs * torch.randn(N, 1) / N
    grad_logits, residual = products.grad_memory(logits)
    grad_logits.copy_(exact)
    # bfloat16 dL/dlogits: the head adds the rounding residual of one column, here of all of them
    exact = exact.double() if residual is None else grad_logits.double()
    operand = products.grad_operand(grad_logits)
    grad_hidden = products.grad_hidden(operand, weight)
    grad_weight = torch.full((V, H), float("nan"))  # a part of dWeight starts at any column
    for columns in (slice(0, 512), slice(512, V)):
        for is_first in (True, False):
            products.add_grad_weight(
                grad_weight[columns], operand[..., columns], products.operand(hidden), is_first=is_first
            )
    assert grad_hidden.dtype == grad_weight.dtype == F32
    assert relative_error(grad_hidden, exact @ weight.double()) <= 1e-5
    assert relative_error(grad_weight, 2 * exact.T @ hidden.double()) <= 1e-5


@every_pair
def test_every_product_has_16_bit_operands_and_costs_what_the_docs_say(hidden_dtype, weight_dtype, monkeypatch):
    hidden, weight = make(hidden_dtype, weight_dtype)
    costs, original = [], _products_gpu.product

    def counted(out, left, right, *, is_first):
        assert left.dtype == right.dtype
        assert left.dtype in (BF16, F16)
        costs[-1] += left.shape[0] * left.shape[1] * right.shape[1] / (N * H * V)
        return original(out, left, right, is_first=is_first)

    monkeypatch.setattr(_products_gpu, "product", counted)
    products = _products_gpu.make_products(hidden, weight)
    logits = products.empty_logits(N, V, CPU)
    costs.append(0)
    products.write_logits(logits, hidden, weight, None, 1.0)
    grad_logits, _ = products.grad_memory(logits)
    operand = products.grad_operand(grad_logits.zero_())
    costs.append(0)
    products.grad_hidden(operand, weight)
    costs.append(0)
    products.add_grad_weight(torch.empty(V, H), operand, hidden, is_first=True)
    assert costs == pytest.approx(COSTS[hidden_dtype, weight_dtype])


def test_the_first_product_of_a_weight_gradient_overwrites_its_memory():
    # with zero_() and addmm, the first chunk would write and read all of dWeight once more
    hidden, weight = make(BF16, BF16)
    products = _products_gpu.make_products(hidden, weight)
    grad_logits = torch.randn(N, V).bfloat16()
    total = torch.full((V, H), float("nan"))
    with CalledOps() as called:
        products.add_grad_weight(total, grad_logits, hidden, is_first=True)
    assert torch.equal(total, grad_logits.T.float() @ hidden.float())
    assert "aten::mm" in called.names
    assert not {"aten::zero_", "aten::fill_", "aten::addmm_", "aten::addmm"} & called.names


def test_a_sum_of_scaled_bfloat16_rows_does_not_round_the_scale_to_bfloat16():
    rows, scale = torch.randn(N, V).to(BF16), torch.randn(N) * 1e-6
    made = _products_gpu.scaled_row_sum(rows, scale)
    assert relative_error(made, rows.double().T @ scale.double()) <= 1e-5


def test_a_build_without_float32_results_uses_float32_products_and_is_tried_once(monkeypatch):
    tried, original = [], torch.mm

    def refusing(*operands, out_dtype=None, **options):
        if out_dtype is not None:
            tried.append(operands[0].dtype)
            raise RuntimeError("out_dtype is not supported on ROCm")
        return original(*operands, **options)

    monkeypatch.setattr(torch, "mm", refusing)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    _precision.has_float32_results.cache_clear()
    try:
        with FakeTensorMode():
            for dtypes in itertools.product([BF16, F16, F32], repeat=2):
                for _ in range(2):
                    hidden, weight = (
                        torch.empty(*shape, dtype=dtype, device="cuda")
                        for shape, dtype in zip([(N, H), (V, H)], dtypes, strict=True)
                    )
                    assert type(_products_gpu.make_products(hidden, weight)) is _products_gpu.KernelProducts
        assert len(tried) == len(set(tried)) <= 2
    finally:
        _precision.has_float32_results.cache_clear()


def test_a_cuda_build_asks_for_float32_results(monkeypatch):
    made = []
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *_, **options: made.append(options))
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, H, dtype=BF16, device="cuda") for rows in (N, V))
        out = torch.empty(N, V, device="cuda")
        for is_first in (True, False):
            _products_gpu.product(out, hidden, weight.T, is_first=is_first)
    assert [options["out_dtype"] for options in made] == [F32, F32]
    assert all(options["out"] is out for options in made)
