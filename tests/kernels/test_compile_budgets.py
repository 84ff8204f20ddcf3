"""Every kernel, compiled for GPUs that need not be present: no spills, registers and shared memory within budget, and
every access to [n, V] data 128 bits wide. Run with -s to see the table.
"""

import dataclasses
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET is set: this process interprets kernels", allow_module_level=True)


from expo_kernels import _launch
from expo_kernels._inputs import Tokens
from expo_kernels._triton import columns, curriculum
from expo_kernels._triton import launch as kernels
from expo_kernels._triton import launch_exponentials as exponentials
from expo_kernels.objective import Objective
from tests.kernels import compiling
from tests.kernels.chunks import make_chunk, make_exponential_chunk

pytestmark = pytest.mark.medium  # compiles kernels

VOCABULARIES = (32_000, 128_256, 151_936, 262_144)  # Llama 2, Llama 3, Qwen 2.5 and 3, Gemma 3
GROUP_SIZES = (2, 4, 8, 16, 32, 64)
# registers per thread: the maximum with which two programs of 8 warps fit an SM's 65,536 registers (on gfx942, four
# waves of two programs fit the 512 of a SIMD) and hide each other's latency
REGISTERS = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 128}
# bytes per program; only reductions across warps use shared memory
SHARED_BYTES = {"sm_80": 1024, "sm_90": 1024, "sm_100": 1024, "gfx942": 1024}
# maximum number of accesses narrower than 128 bits, which the numbers of a token and the sums of a program need; narrow
# accesses to a tile of [n, V] would add at least 16, on gfx942 8
NARROW = {
    "cuda": {"load": 32, "store": 16},
    "hip": {"load": 26, "store": 8},
}

EVERYTHING = Objective(
    dual_clip=3.0, logit_softcap=30.0, kl_importance_weighted=True, rollout_correction="token", temperature=0.9
)
SOFTCAP = Objective(logit_softcap=30.0)


def make_tokens(objective, num_sequences=4, length=8, group_size=2, *, bonus=False, is_shard=False):
    positions, shape = num_sequences * length, num_sequences
    return Tokens(
        ids=torch.zeros(positions, dtype=torch.int64),
        mask=torch.ones(positions, dtype=torch.bool),
        objective=objective,
        ids_are_local=is_shard,
        num_sequences=num_sequences,
        tokens_per_sequence=length,
        advantages=torch.zeros(shape),
        advantages_are="sequence" if is_shard else "rewards",
        group_size=group_size,
        old_logps=torch.zeros(positions),
        ref_logps=torch.zeros(positions),
        rollout_logps=torch.zeros(positions) if objective.rollout_correction else None,
        lengths=torch.zeros(shape, dtype=torch.int64),
        beta=torch.zeros(()),
        normalizer=torch.zeros(()),
        entropy_bonus=torch.zeros(()) if bonus else None,
    )


def chunk_with_gradient(vocab_size, logits_dtype, grad_dtype, num_rows=2):
    """Logits and the memory of their gradient: the same rows, or none."""
    memory, order = torch.empty(num_rows, vocab_size, dtype=logits_dtype), torch.zeros(64, dtype=torch.int64)
    if grad_dtype is None:
        return make_chunk(memory, order=order)
    assert grad_dtype.itemsize <= logits_dtype.itemsize
    grad = memory.view(grad_dtype)[:, :vocab_size]
    return make_chunk(memory, grad, order=order, residual=torch.empty(num_rows))


def run_loss(vocab_size, logits, grad, objective, *, entropy=False, bonus=False, group_size=2):
    chunk = chunk_with_gradient(vocab_size, logits, grad)
    tokens = make_tokens(objective, group_size=group_size, bonus=bonus)
    sums = kernels.make_sums(torch.device("cpu"))
    kernels.launch_row_loss(chunk, tokens, sums, torch.zeros(64), return_entropy=entropy)


def run_logps(vocab_size, logits, *, entropy=False, objective=None):
    chunk = chunk_with_gradient(vocab_size, logits, None)
    out = torch.zeros(64)
    tokens = make_tokens(objective or Objective())
    kernels.launch_logps(chunk, tokens, out, entropies=out if entropy else None, row_max=out, sum_exp=out)


def run_grad_logits(vocab_size, logits, grad, *, entropy=False, objective=None, is_shard=False):
    chunk = chunk_with_gradient(vocab_size, logits, grad)
    out = torch.zeros(64)
    kernels.launch_grad_logits(
        chunk,
        make_tokens(objective or Objective(), is_shard=is_shard),
        row_max=out,
        sum_exp=out,
        grad_logps=out,
        entropies=out if entropy else None,
        grad_entropies=out if entropy else None,
    )


def run_shard(vocab_size, *, entropy=False, objective=None):
    chunk = chunk_with_gradient(vocab_size, F32, None)
    kernels.launch_read_shard(chunk, make_tokens(objective or Objective(), is_shard=True), has_entropy=entropy)


def run_combine_shards():
    chunk, out = make_chunk(torch.empty(2, 16), order=torch.zeros(64, dtype=torch.int64)), torch.zeros(64)
    tokens = make_tokens(Objective(), is_shard=True)
    kernels.launch_combine_shards(chunk, tokens, torch.zeros(8, 4, 2), out, entropies=out, row_max=out, sum_exp=out)


def run_token_loss(objective):
    chunk, out = make_chunk(torch.empty(2, 16), order=torch.zeros(64, dtype=torch.int64)), torch.zeros(64)
    tokens, sums = make_tokens(objective, bonus=True, is_shard=True), kernels.make_sums(torch.device("cpu"))
    kernels.launch_token_loss(chunk, tokens, sums, out, out, entropies=out, grad_entropies=out)


def run_exponentials(vocab_size, *, objective=None, entropy=False, logs=False, has_memory=True):
    chunk = make_exponential_chunk(vocab_size, order=torch.zeros(64, dtype=torch.int64), has_memory=has_memory)
    tokens = make_tokens(objective or Objective())
    exponentials.launch_exponentials(chunk, tokens, has_entropy=entropy, stores_logs=logs)


def run_combine_tiles():
    chunk, out = make_exponential_chunk(16, order=torch.zeros(64, dtype=torch.int64)), torch.zeros(64)
    tokens = make_tokens(SOFTCAP)
    exponentials.launch_combine_tiles(chunk, tokens, out, entropies=out, row_max=out, sum_exp=out)


def run_exponential_grads(vocab_size):
    chunk, out = make_exponential_chunk(vocab_size, order=torch.zeros(64, dtype=torch.int64)), torch.zeros(64)
    rows = {"row_max": out, "sum_exp": out, "grad_logps": out}
    exponentials.launch_exponential_grads(chunk, make_tokens(SOFTCAP), **rows)


def run_log_grads(vocab_size):
    chunk, out = make_exponential_chunk(vocab_size, order=torch.zeros(64, dtype=torch.int64)), torch.zeros(64)
    rows = {"row_max": out, "sum_exp": out, "grad_logps": out, "entropies": out, "grad_entropies": out}
    exponentials.launch_log_grads(chunk, make_tokens(Objective()), **rows)


def run_scale(vocab_size, dtype):
    kernels.launch_scale(torch.empty(2, vocab_size, dtype=dtype), torch.ones(()))


def run_column_squares(vocab_size):
    columns.launch_column_squares(torch.empty(2, vocab_size, dtype=BF16), torch.ones(()))


def run_curriculum_update():
    ids, rates = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64)
    table = torch.zeros(5), torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    curriculum.launch_update(ids, rates, *table, torch.zeros(4, dtype=torch.float64))


def run_curriculum_race():
    curriculum.launch_race(torch.zeros(5), torch.zeros(1, dtype=torch.int64))


def run_sequences(objective, *, bonus=False):
    sums, out = kernels.make_sums(torch.device("cpu")), torch.zeros(64)
    entropies = {"entropies": out, "grad_entropies": out} if bonus else {}
    kernels.launch_sequence_loss(make_tokens(objective, bonus=bonus), sums, out, out, **entropies)


F32, BF16 = torch.float32, torch.bfloat16
# name: (function of V that launches it, [n, V] reads by bits per logit, [n, V] writes by bits per logit)
CASES = {
    "loss, float32 in place": (lambda V: run_loss(V, F32, F32, Objective()), (32, 32), (32,)),
    "loss, bfloat16 over float32": (lambda V: run_loss(V, F32, BF16, Objective()), (32, 32), (16,)),
    "loss, bfloat16 in place": (lambda V: run_loss(V, BF16, BF16, Objective()), (16, 16), (16,)),
    "loss, every option": (lambda V: run_loss(V, F32, BF16, EVERYTHING, entropy=True), (32, 32), (16,)),
    "loss, bfloat16, every option": (lambda V: run_loss(V, BF16, BF16, EVERYTHING, entropy=True), (16, 16), (16,)),
    "loss, cispo": (lambda V: run_loss(V, F32, BF16, Objective(surrogate="cispo", kl="k2")), (32, 32), (16,)),
    "loss, sapo": (lambda V: run_loss(V, F32, BF16, Objective(surrogate="sapo", kl="k1")), (32, 32), (16,)),
    "loss, entropy bonus": (lambda V: run_loss(V, F32, BF16, Objective(), bonus=True), (32, 32), (16,)),
    "loss, every option and a bonus": (lambda V: run_loss(V, F32, BF16, EVERYTHING, bonus=True), (32, 32), (16,)),
    "loss without gradient": (lambda V: run_loss(V, F32, None, Objective()), (32,), ()),
    "logps": (lambda V: run_logps(V, F32), (32,), ()),
    "logps, bfloat16, entropies": (lambda V: run_logps(V, BF16, entropy=True), (16,), ()),
    "logps, softcap, entropies": (lambda V: run_logps(V, F32, entropy=True, objective=EVERYTHING), (32,), ()),
    "gradient": (lambda V: run_grad_logits(V, F32, BF16), (32,), (16,)),
    "gradient, bfloat16, entropies": (lambda V: run_grad_logits(V, BF16, BF16, entropy=True), (16,), (16,)),
    "gradient, every option": (
        lambda V: run_grad_logits(V, F32, BF16, entropy=True, objective=EVERYTHING),
        (32,),
        (16,),
    ),
    "shard": (lambda V: run_shard(V), (32,), ()),
    "shard, softcap, entropies": (lambda V: run_shard(V, entropy=True, objective=EVERYTHING), (32,), ()),
    "shards combined, entropies": (lambda _: run_combine_shards(), (), ()),
    "token loss, every option and a bonus": (lambda _: run_token_loss(EVERYTHING), (), ()),
    "gradient of a shard": (lambda V: run_grad_logits(V, F32, BF16, is_shard=True), (32,), (16,)),
    "gradient of a shard, every option": (
        lambda V: run_grad_logits(V, F32, BF16, entropy=True, objective=EVERYTHING, is_shard=True),
        (32,),
        (16,),
    ),
    "exponentials": (lambda V: run_exponentials(V), (32,), (16,)),
    "exponentials, softcap, entropies": (lambda V: run_exponentials(V, objective=SOFTCAP, entropy=True), (32,), (16,)),
    "logs of exponentials, entropies": (lambda V: run_exponentials(V, entropy=True, logs=True), (32,), (16,)),
    "sums of exponentials": (lambda V: run_exponentials(V, has_memory=False), (32,), ()),
    "tiles combined, entropies": (lambda _: run_combine_tiles(), (), ()),
    "gradient of exponentials": (lambda V: run_exponential_grads(V), (16,), (16,)),
    "gradient of logs": (lambda V: run_log_grads(V), (16,), (16,)),
    "scale, float32": (lambda V: run_scale(V, F32), (32,), (32,)),
    "scale, bfloat16": (lambda V: run_scale(V, BF16), (16,), (16,)),
    "curriculum update": (lambda _: run_curriculum_update(), (), ()),
    "curriculum race": (lambda _: run_curriculum_race(), (), ()),
    "sequences": (lambda _: run_sequences(Objective(dual_clip=3.0)), (), ()),
    "sequences, every option": (
        lambda _: run_sequences(Objective(ratio="sequence", rollout_correction="sequence", dual_clip=3.0)),
        (),
        (),
    ),
    "sequences, gmpo, a bonus": (lambda _: run_sequences(Objective(surrogate="gmpo"), bonus=True), (), ()),
    "sequences, vespo": (lambda _: run_sequences(Objective(surrogate="vespo", rollout_correction="token")), (), ()),
}
# one spilled value of 8 bytes, which costs less than one program less on a multiprocessor
SPILLS_WITH_TEMPERATURES = {
    "sm_80": {name: ["8 bytes spilled"] for name in ("gradient, every option", "gradient of a shard, every option")}
}
READ_NO_TEMPERATURE = ("token loss", "scale", "curriculum", "sequences")
OF_EXPONENTIALS = {name for name in CASES if "exponentials" in name or name == "gradient of logs"}


def compile_one(launch, target):
    with compiling.launches(compiling.TARGETS[target]) as launched:
        launch()
    (kernel,) = launched.kernels
    return kernel


def problems(kernel, target, reads, writes, tile):
    """The budgets that a kernel exceeds; it processes [n, V] logits of that many bits, one tile per iteration."""
    used = compiling.usage(kernel)
    found = []
    if used.spilled_bytes:
        found.append(f"{used.spilled_bytes} bytes spilled")
    if used.registers > REGISTERS[target]:
        found.append(f"{used.registers} registers")
    if used.shared_bytes > SHARED_BYTES[target]:
        found.append(f"{used.shared_bytes} bytes of shared memory")
    threads = tile.num_warps * kernel.metadata.target.warp_size
    for kind, widths in (("load", reads), ("store", writes)):
        needed = sum(tile.block * bits // threads // 128 for bits in widths)
        wide = sum(bits >= 128 for bits in used.access_bits[kind])
        narrow = len(used.access_bits[kind]) - wide
        if wide < needed or (widths and narrow > NARROW[kernel.metadata.target.backend][kind]):
            found.append(f"{wide} of {needed} {kind}s of [n, V] are 128 bits wide, {narrow} are narrower")
    return found


def over_budget(cases, target):
    """The budgets that the kernels of some cases exceed; prints a table of all."""
    print(f"\n{target:8} {'kernel':32} registers  spilled  shared  global accesses of 128 bits (narrower)")
    wrong = {}
    for name, (launch, reads, writes) in cases.items():
        kernel = compile_one(lambda launch=launch: launch(151_936), target)
        used = compiling.usage(kernel)
        wide = {kind: sum(bits >= 128 for bits in widths) for kind, widths in used.access_bits.items()}
        narrow = {kind: len(widths) - wide[kind] for kind, widths in used.access_bits.items()}
        print(
            f"{target:8} {name:32} {used.registers:9} {used.spilled_bytes:8} {used.shared_bytes:7}  "
            f"{wide['load']} loads ({narrow['load']}), {wide['store']} stores ({narrow['store']})"
        )
        with mock.patch.object(_launch, "is_amd", return_value=target.startswith("gfx")):
            tile = _launch.row_tile(151_936, max(reads, default=32) // 8)
            if name in OF_EXPONENTIALS:
                tile = _launch.exponential_tile(151_936)
        if name.startswith("scale"):
            tile = _launch.flat_tile()
        found = problems(kernel, target, reads, writes, tile)
        if found:
            wrong[name] = found
    return wrong


@pytest.mark.parametrize("target", compiling.TARGETS)
def test_kernels_stay_within_budget(target):
    assert not over_budget(CASES, target)


@pytest.mark.parametrize("target", compiling.TARGETS)
def test_kernels_stay_within_budget_with_a_temperature_per_token(target, monkeypatch):
    def with_temperatures(*args, original=make_tokens, **options):
        return dataclasses.replace(original(*args, **options), temperatures=torch.ones(64))

    monkeypatch.setitem(globals(), "make_tokens", with_temperatures)
    cases = {name: case for name, case in CASES.items() if not name.startswith(READ_NO_TEMPERATURE)}
    assert over_budget(cases, target) == SPILLS_WITH_TEMPERATURES.get(target, {})


@pytest.mark.parametrize("target", compiling.TARGETS)
def test_column_squares_stay_within_budget(target):
    kernel = compile_one(lambda: run_column_squares(151_936), target)
    with mock.patch.object(_launch, "is_amd", return_value=target.startswith("gfx")):
        block = _launch.column_tile()
    tile = _launch.Tile(block.num_rows * block.num_columns, block.num_warps)
    assert not problems(kernel, target, (16,), (), tile)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_binary_serves_every_named_vocabulary_and_group_size(target):
    for name, (launch, _, _) in CASES.items():
        with compiling.launches(compiling.TARGETS[target], compiles=False) as launched:
            for vocab_size in VOCABULARIES:
                launch(vocab_size)
        assert len(set(launched.keys)) == 1, name
    with compiling.launches(compiling.TARGETS[target], compiles=False) as launched:
        for group_size in GROUP_SIZES:
            run_loss(VOCABULARIES[0], F32, F32, Objective(), group_size=group_size)
    assert len(set(launched.keys)) == 1


@pytest.mark.parametrize(("target", "columns"), [("sm_90", 4096), ("gfx942", 8192)])
def test_the_budget_check_finds_a_kernel_that_spills(target, columns):
    tile = _launch.Tile(columns, 1)
    with (
        mock.patch.object(_launch, "row_tile", return_value=tile),
        mock.patch.object(_launch, "most_registers", return_value=255),
    ):
        kernel = compile_one(lambda: run_loss(151_936, F32, F32, EVERYTHING, entropy=True), target)
    found = " ".join(problems(kernel, target, (32, 32), (32,), tile))
    assert "bytes spilled" in found
    assert "registers" in found


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_budget_check_finds_narrow_accesses(target):
    # rows of an odd vocabulary are not aligned to 128 bits
    kernel = compile_one(lambda: run_loss(50_257, F32, F32, Objective()), target)
    found = problems(kernel, target, (32, 32), (32,), _launch.row_tile(50_257, 4))
    assert any("loads" in line for line in found)
    assert any("stores" in line for line in found)
