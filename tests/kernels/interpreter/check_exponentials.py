"""Heads that keep bfloat16 exponentials of their logits, run by Triton's interpreter.

Run through `test_interpreter.py`.
"""

import math

import pytest
import torch

from expo_kernels import Objective, _launch, linear_expo_loss, linear_token_logps, reference
from expo_kernels._head import Chunk, Exponentials, Span
from expo_kernels._inputs import Tokens
from expo_kernels._triton import backend
from expo_kernels._triton import launch_exponentials as kernels
from tests.kernels.interpreter.batches import SEQUENCE_LEVEL, TOKEN_LEVEL, relative_error
from tests.ptx.checks import check_linear_logps, check_linear_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in.*:RuntimeWarning"
)  # skipped rows hold numbers that are never used

BF16, COLUMNS = torch.bfloat16, _launch.EXPONENTIAL_COLUMNS
OBJECTIVES = TOKEN_LEVEL | SEQUENCE_LEVEL


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Switches the exponentials on; the launches that store them or their logs."""
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "1")
    stored, original = [], backend.launch_exponentials

    def counted(chunk, tokens, **options):
        stored.append("logs" if options["stores_logs"] else "exponentials")
        original(chunk, tokens, **options)

    monkeypatch.setattr(backend, "launch_exponentials", counted)
    return stored


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the kernels on given float32 logits


def read(logits, ids, *, objective=None, bias=None, temperatures=None, stores_logs=False):
    """A chunk that has the exponentials of given logits, or their logs."""
    num_rows, vocab_size = logits.shape
    block, padded = _launch.exponential_tile(vocab_size).block, -(-vocab_size // 16) * 16
    buffer, memory = torch.full((num_rows, block), math.nan), torch.full((num_rows, padded), math.nan, dtype=BF16)

    def by_tile():
        for start in range(0, vocab_size, block):
            part = logits[:, start : start + block]
            buffer.fill_(math.nan)[:, : part.shape[1]] = part
            yield buffer

    kept = Exponentials(memory, by_tile(), vocab_size, bias)
    chunk = Chunk(Span(slice(0, num_rows), None), buffer, memory[:, :vocab_size], exponentials=kept)
    mask, objective = torch.ones(num_rows, dtype=torch.bool), objective or Objective()
    tokens = Tokens(ids=ids, mask=mask, objective=objective, temperatures=temperatures)
    kernels.launch_exponentials(chunk, tokens, has_entropy=True, stores_logs=stores_logs)
    return chunk, tokens


def rows_of(logits, ids, grad_logps, *, grad_entropies=None, **options):
    """Log-probs and entropies of given logits, and dL/dlogits as the head assembles them."""
    chunk, tokens = read(logits, ids, stores_logs=grad_entropies is not None, **options)
    logps, entropies, row_max, sum_exp = (torch.full((len(ids),), math.nan) for _ in range(4))
    kernels.launch_combine_tiles(chunk, tokens, logps, entropies=entropies, row_max=row_max, sum_exp=sum_exp)
    values = {"row_max": row_max, "sum_exp": sum_exp, "grad_logps": grad_logps}
    if grad_entropies is None:
        kernels.launch_exponential_grads(chunk, tokens, **values)
        grad = chunk.row_scale.double()[:, None] * chunk.grad_logits.double()
    else:
        kernels.launch_log_grads(chunk, tokens, **values, entropies=entropies, grad_entropies=grad_entropies)
        grad = chunk.grad_logits.double()
    rows = torch.arange(len(ids))
    assert not chunk.exponentials.memory.isnan().any()
    for columns, of_columns in ((ids, chunk.rounding_residual), (chunk.other_ids, chunk.other_grad)):
        assert not grad[rows, columns].any()
        grad[rows, columns] = of_columns.double()
    return logps, entropies, grad


def assert_rows_match(
    logits, ids=None, *, temperature=1.0, softcap=None, with_entropies=False, bias=None, grad_error=2**-8
):
    """`grad_error`: of the columns that are rounded to bfloat16, relative in the norm; by default the unit roundoff."""
    num_rows, vocab_size = logits.shape
    exact = logits.double() if bias is None else logits.double() + bias.double()
    scaled = reference.scaled_logits(exact, temperature, softcap)
    if ids is None:  # as a policy samples them
        ids = torch.multinomial(torch.softmax(scaled, -1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    grad_logps, grad_entropies = normal(num_rows, seed=2), 0.3 * normal(num_rows, seed=3)
    by_row = isinstance(temperature, torch.Tensor)
    objective = Objective(temperature=1.0 if by_row else temperature, logit_softcap=softcap)
    given = rows_of(
        logits,
        ids,
        grad_logps,
        grad_entropies=grad_entropies if with_entropies else None,
        objective=objective,
        bias=bias,
        temperatures=temperature if by_row else None,
    )
    logps, probs = torch.log_softmax(scaled, -1), torch.softmax(scaled, -1)
    entropies = torch.special.entr(probs).sum(-1)
    grads = grad_logps[:, None] * (torch.nn.functional.one_hot(ids, vocab_size) - probs)
    if with_entropies:
        grads += grad_entropies[:, None] * (torch.special.entr(probs) - probs * entropies[:, None])
    cap_grads = 1.0 if softcap is None else 1 - torch.tanh(exact / softcap) ** 2
    grads *= cap_grads / (temperature[:, None] if by_row else temperature)
    rows = torch.arange(num_rows)
    assert float((given[0] - logps[rows, ids]).abs().max()) <= 2e-5
    assert float((given[1] - entropies).abs().max()) <= 2e-5
    # the chosen column and the most probable other one are not rounded to bfloat16
    size = (grad_logps.abs() + grad_entropies.abs() * with_entropies).double() / temperature
    others = exact.scatter(1, ids[:, None], -math.inf).argmax(dim=1)
    for columns in (ids, others):
        assert float(((given[2] - grads)[rows, columns].abs() / size).max()) <= 2e-5
        given[2][rows, columns] = grads[rows, columns] = 0.0
    assert relative_error(given[2], grads) <= grad_error


@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
def test_rows_of_any_spread_and_offset(spread, offset, with_entropies):
    # float32 logits of 1e4 have steps of 1e-3, but they are exact as given
    logits = spread * normal(6, 9000) + offset
    # where many columns count, the error is that of rounding them to bfloat16: 1.65e-3
    options = {"grad_error": 1.8e-3} if spread == 1.0 else {}
    assert_rows_match(logits, with_entropies=with_entropies, temperature=0.8, **options)


@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_rows_of_different_temperatures(offset, with_entropies):
    logits, temperature = 4 * normal(6, 9000) + offset, 0.5 + torch.arange(6) / 5
    assert_rows_match(logits, with_entropies=with_entropies, temperature=temperature)


def test_rows_of_different_temperatures_with_a_softcap():
    assert_rows_match(12 * normal(4, 9000), softcap=5.0, temperature=0.6 + torch.arange(4) / 4)


@pytest.mark.parametrize("with_entropies", [False, True])
@pytest.mark.parametrize("V", [17, 128, 1003, COLUMNS, COLUMNS + 1, 33_000])
def test_rows_of_any_length(V, with_entropies):
    assert_rows_match(3 * normal(4, V), with_entropies=with_entropies, bias=normal(V, seed=5).to(BF16))


@pytest.mark.parametrize("softcap", [3.0, 30.0])
def test_a_softcap_and_chosen_ids_that_a_policy_would_not_sample(softcap):
    ids = torch.tensor([0, 5000, 8999, 7])
    assert_rows_match(12 * normal(4, 9000), ids, softcap=softcap, temperature=1.3)
    assert_rows_match(12 * normal(4, 9000), ids, bias=normal(9000, seed=4))


@pytest.mark.parametrize("with_entropies", [False, True])
def test_maxima_that_rise_from_tile_to_tile(with_entropies):
    """Exponentials of earlier tiles are scaled by a power of two, and of much earlier ones become 0."""
    logits = normal(5, 4 * COLUMNS + 5)
    for row, heights in enumerate([(0, 60, 0, 120), (0, 0, 0, 0), (300, 0, 0, 0), (0, 200, 400, 600), (0, 44, 44, 90)]):
        for tile, height in enumerate(heights):
            logits[row, tile * COLUMNS + 9] += height
    ids = torch.tensor([4 * COLUMNS + 2, 7, 9, 3 * COLUMNS + 9, COLUMNS + 9])
    assert_rows_match(logits, ids, with_entropies=with_entropies)


def exponents_of(logits):
    chunk, _ = read(logits, torch.zeros(len(logits), dtype=torch.int64))
    return chunk.exponentials.tiles[:, kernels.kernels.EXPONENT.value]


def test_all_tiles_of_usual_rows_have_one_exponent():
    """Only then does the gradient need no pass over the exponentials."""
    for spread in (1.0, 4.0, 12.0):
        exponents = exponents_of(spread * normal(5, 6 * COLUMNS))
        assert torch.equal(exponents, exponents[:1].expand_as(exponents))
    rising = normal(5, 2 * COLUMNS)
    rising[:, COLUMNS] = 100.0
    first, second = exponents_of(rising)
    assert (second - first > kernels.kernels.MARGIN.value).all()


def test_sums_are_those_of_exponentials_before_rounding():
    # 2^(z - k) = (1 + 2^-9) / 2 in every column, which bfloat16 rounds to 1 / 2
    chunk, _ = read(torch.full((1, 2 * COLUMNS), math.log(1 + 2**-9)), torch.tensor([0]))
    assert (chunk.grad_logits.float() == 0.5).all()
    sums = chunk.exponentials.tiles[:, kernels.kernels.SUM_EXP.value].sum()
    assert float(sums) == pytest.approx(COLUMNS * (1 + 2**-9), rel=1e-6)


@pytest.mark.parametrize("with_entropies", [False, True])
def test_columns_of_probability_0(with_entropies):
    logits = 2 * normal(4, 9000)
    logits[0, :COLUMNS] = logits[1, COLUMNS : 2 * COLUMNS] = logits[2, 2 * COLUMNS :] = -math.inf
    logits[3, ::2] = -math.inf
    assert_rows_match(logits, torch.tensor([8999, 3, 17, 1]), with_entropies=with_entropies)


# --- the public functions


@pytest.mark.parametrize("advantages", ["rewards", "sequence", "token"])
@pytest.mark.parametrize("name", ["default", "softcap", "rollout", "k2", "cispo", "token"])
def test_token_level_losses_in_chunks(name, advantages, launched):
    check_linear_loss(objective=OBJECTIVES[name], advantages=advantages, has_bias=advantages == "token")
    assert set(launched) == {"exponentials"}


@pytest.mark.parametrize("rows_per_chunk", [5, 100])
@pytest.mark.parametrize("name", ["gspo", "gspo weighted", "gmpo rollout", "vespo"])
def test_sequence_level_losses_in_whole_sequences_and_by_a_pass_of_their_own(name, rows_per_chunk, launched):
    check_linear_loss(objective=OBJECTIVES[name], rows_per_chunk=rows_per_chunk, has_bias=True)
    assert set(launched) == {"exponentials"}


@pytest.mark.parametrize("name", ["default", "gspo", "token"])
def test_an_entropy_bonus(name, launched):
    check_linear_loss(V=5000, T=2, objective=OBJECTIVES[name], entropy_bonus=0.5, has_bias=True)
    assert set(launched) == {"logs"}


def test_log_probs_and_their_gradients(launched):
    check_linear_logps(V=5000)
    assert set(launched) == {"exponentials"}


def test_log_sum_exps_and_their_gradients(launched):
    check_linear_logps(V=5000, return_lse=True)
    assert set(launched) == {"exponentials"}  # those of the forward pass; backward takes float32 logits


def make_head(N=24, H=32, V=5000, *, spread=2.0, seed=0):
    hidden, weight = normal(N, H, seed=seed), normal(V, H, seed=seed + 1)
    weight *= spread / (hidden @ weight.T).std()
    ids = torch.multinomial(torch.softmax(hidden @ weight.T, -1), 1, generator=torch.Generator().manual_seed(seed))
    return hidden.to(BF16).requires_grad_(), weight.to(BF16).requires_grad_(), ids[:, 0]


def grads_of(hidden, weight, ids, *, entropies=False, bias=None, **options):
    """Log-probs, and gradients of their weighted sum."""
    leaves = [hidden, weight, *([] if bias is None else [bias])]
    logps, entropy = linear_token_logps(hidden, weight, ids, bias=bias, return_entropy=True, **options)
    total = (logps * normal(len(ids), seed=8)).sum()
    if entropies:
        total = total + (entropy * normal(len(ids), seed=9)).sum()
    return [logps.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)]


def true_grads_of(hidden, weight, ids, *, entropies=False, bias=None, temperature=1.0):
    leaves = [
        tensor.detach().double().requires_grad_() for tensor in (hidden, weight, *([] if bias is None else [bias]))
    ]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0.0)
    logps, entropy = reference.token_logps(logits, ids, temperature), reference.token_entropies(logits, temperature)
    total = (logps * normal(len(ids), seed=8)).sum()
    if entropies:
        total = total + (entropy * normal(len(ids), seed=9)).sum()
    return [logps.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
def test_gradients_are_as_exact_as_from_float32_logits(spread, entropies, monkeypatch):
    hidden, weight, ids = make_head(spread=spread)
    bias = (0.5 * normal(5000, seed=3)).to(BF16).requires_grad_()
    options = {"entropies": entropies, "bias": bias, "temperature": 0.8}
    truth, given = true_grads_of(hidden, weight, ids, **options), grads_of(hidden, weight, ids, **options)
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "0")
    plain = grads_of(hidden, weight, ids, **options)
    for one, true in zip(given[:2], truth[:2], strict=True):
        assert float((one - true).abs().max()) <= 2e-5
    for one, other, true in zip(given[2:], plain[2:], truth[2:], strict=True):
        assert relative_error(one, true) <= max(2e-3, 1.01 * relative_error(other, true))


def test_gradients_do_not_depend_on_the_number_of_chunks_and_two_runs_give_equal_bits():
    hidden, weight, ids = make_head(N=40)
    truth = true_grads_of(hidden, weight, ids)
    for rows in (1, 7, 40):
        budget = {"logits_budget_mb": rows * (5000 + 2 * COLUMNS) * 2 / 2**20}
        given, again = (grads_of(hidden, weight, ids, **budget) for _ in range(2))
        for one, other, true in zip(given, again, truth, strict=True):
            assert torch.equal(one, other)
            assert relative_error(one, true) <= 2e-3


def loss_of(hidden, weight, ids, old, ref, **options):
    mask = torch.ones(4, 6, dtype=torch.bool)
    return linear_expo_loss(
        hidden.view(4, 6, -1), weight, ids.view(4, 6), mask, advantages=normal(4, seed=6), old_logps=old.view(4, 6),
        ref_logps=ref.view(4, 6), **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"entropy_bonus": 0.1}, {"objective": Objective(ratio="sequence")}])
def test_on_policy_ratios_are_exactly_one_and_equal_policies_have_no_kl(options, launched):
    hidden, weight, ids = make_head(spread=6.0)
    with torch.no_grad():
        old = linear_token_logps(hidden, weight, ids)
    out = loss_of(hidden, weight, ids, old, old, **options)
    assert len(launched) == 2
    assert torch.equal(out.logps.view(-1), old)
    assert float(out.metrics["ratio_max"]) == float(out.metrics["ratio_mean"]) == 1.0
    assert float(out.metrics["kl"]) == 0.0


@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_masked_contents_and_unknown_ids_never_matter(bonus):
    hidden, weight, ids = make_head()
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(4)) < 0.6

    def outcome(states, ids):
        states = states.detach().view(4, 6, -1).requires_grad_()
        out = linear_expo_loss(
            states, weight, ids.view(4, 6), mask, advantages=normal(4, seed=6), beta=0.0, entropy_bonus=bonus
        )
        return [out.loss.detach(), out.logps, *torch.autograd.grad(out.loss, (states, weight))]

    spoilt = torch.where(mask.view(-1, 1), hidden, math.nan), torch.where(mask.view(-1), ids, 2**40)
    for one, other in zip(outcome(hidden, ids), outcome(*spoilt), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_rows_without_a_slope_and_a_frozen_head():
    hidden, weight, ids = make_head()
    logps = linear_token_logps(hidden, weight.detach(), ids)
    (grad,) = torch.autograd.grad((logps * torch.tensor([1.0, 0.0] * 12)).sum(), hidden)
    assert not grad[1::2].any()
    assert grad[::2].any(dim=1).all()


def test_the_backward_of_log_probs_may_use_the_other_path(monkeypatch):
    """Both keep the same row values."""
    hidden, weight, ids = make_head(spread=4.0)
    truth = true_grads_of(hidden, weight, ids, temperature=0.7)[2:]
    for forward, backward in (("1", "0"), ("0", "1")):
        monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", forward)
        logps = linear_token_logps(hidden, weight, ids, temperature=0.7)
        monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", backward)
        grads = torch.autograd.grad((logps * normal(len(ids), seed=8)).sum(), (hidden, weight))
        for one, true in zip(grads, truth, strict=True):
            assert relative_error(one, true) <= 2e-3


def test_the_gradient_of_a_bias_is_a_float32_sum():
    hidden, weight, ids = make_head(N=200, V=300)
    bias = torch.zeros(300, requires_grad=True)
    given, truth = (function(hidden, weight, ids, bias=bias) for function in (grads_of, true_grads_of))
    assert given[4].dtype == torch.float32
    assert relative_error(given[4], truth[4]) <= 1e-3


def test_heads_that_do_not_keep_exponentials(launched, monkeypatch):
    hidden, weight, ids = make_head(V=200)
    old = ref = torch.zeros(24)
    linear_token_logps(hidden.float(), weight.float(), ids)
    linear_token_logps(hidden, weight.float(), ids)
    linear_token_logps(hidden, weight[:100], ids % 100)  # float32 products
    loss_of(hidden, weight, ids, old, ref, entropy_bonus=0.1, objective=Objective(logit_softcap=30.0))
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "0")
    linear_token_logps(hidden, weight, ids)
    assert launched == []
    monkeypatch.setenv("EXPO_KERNELS_EXPONENTIALS", "1")
    loss_of(hidden, weight.float(), ids, old, ref, weight_dtype=BF16)
    assert launched == ["exponentials"]
