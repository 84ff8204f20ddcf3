import pytest
import torch

from expo_kernels import _launch, _products
from tests.numerics import relative_error

CPU = torch.device("cpu")
# n, H, V
SIZES = [(1, 40, 1003), (33, 40, 1003), (200, 24, 4100), (9, 150, 700), (5, 16, 130), (7, 8, 13), (0, 8, 200)]


@pytest.fixture(params=["onednn", "mkl"])
def library(request, monkeypatch):
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setattr(_launch, "onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(_products, "BLOCK_BYTES", 2**16)  # several blocks, and a narrower last one


def make(n, H, V, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((n, H), (V, H), (V,)))
    rows = _products.empty_rows(n, V, dtype, CPU)
    rows.copy_(torch.randn(n, V, generator=generator))
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), rows


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "H", "V"), SIZES)
def test_products_are_exact_whichever_library_makes_them(n, H, V, dtype):
    hidden, weight, bias, rows = make(n, H, V, dtype)
    wide = [tensor.double() for tensor in (hidden, weight, bias, rows)]
    truth = wide[0] @ wide[1].T
    for given, shift in ((None, 0.0), (bias, wide[2])):
        out = _products.empty_rows(n, V, dtype, CPU)
        _products.write_logits(out, hidden, weight, given, 0.7)
        torch.testing.assert_close(out.double(), 0.7 * (truth + shift), rtol=1e-6, atol=1e-5)
    total = torch.ones(n, H, dtype=dtype)
    _products.add_to_hidden(total, rows, weight)
    assert n == 0 or relative_error(total, 1 + wide[3] @ wide[1]) <= 1e-6
    of_weight = torch.full((V, H), float("nan"), dtype=dtype)
    _products.add_to_weight(of_weight, rows, hidden, is_first=True)
    _products.add_to_weight(of_weight, rows, hidden, is_first=False)
    torch.testing.assert_close(of_weight.double(), 2 * wide[3].T @ wide[0], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("library")
def test_a_strided_head_gives_what_a_contiguous_one_gives():
    hidden, weight, _, rows = make(33, 40, 1003)
    for strided in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :40]):
        outs, totals = torch.empty(2, 33, 1003), torch.zeros(2, 33, 40)
        for out, total, head in zip(outs, totals, (weight, strided), strict=True):
            _products.write_logits(out, hidden, head, None, 1.0)
            _products.add_to_hidden(total, rows, head)
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-4)


def test_mkls_logits_are_more_exact_than_one_product_over_all_of_h(monkeypatch):
    monkeypatch.setattr(_launch, "onednn_is_faster", lambda: False)
    hidden, weight, _, _ = make(64, 1024, 2048)
    truth = hidden.double() @ weight.double().T
    out = torch.empty(64, 2048)
    _products.write_logits(out, hidden, weight, None, 1.0)
    assert relative_error(out, truth) < 0.9 * relative_error(hidden @ weight.T, truth)


@pytest.mark.skipif(not _launch.onednn_is_faster(), reason="products go through MKL on this processor")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 50])
def test_through_onednn_a_row_does_not_depend_on_the_others(num_rows):
    hidden, weight, bias, _ = make(200, 512, 4100)
    together, apart = _products.empty_rows(200, 4100, torch.float32, CPU), torch.empty(num_rows, 4100)
    _products.write_logits(together, hidden, weight, bias, 0.7)
    _products.write_logits(apart, hidden[-num_rows:], weight, bias, 0.7)
    assert torch.equal(together[-num_rows:], apart)
