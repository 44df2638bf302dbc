"""Gradients of `block_sparse_attention` on a CUDA device: the error budget, NaN, bits, waiting and memory."""

from dataclasses import replace

import pytest
import torch

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import BACKENDS
from seerattention.ops.block_sparse_attention.kernels import backward
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, Case
from seerattention.testing import gradients
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = [case for case in CASES if not case.large]
BY_NAME = {case.name: case for case in (*SMALL, *OPTION_CASES)}
LATER = Case(name="later", heads=8, kv_heads=2, queries=333, keys=1000, head_dim=128)


def check(backend, case, dtype):
    call = gradients.Call.of(case, dtype, "cuda")
    if reasons := BACKENDS[backend].unsupported(call.q, call.k, call.v, call.selection, call.options):
        assert backend == "hopper", reasons
        pytest.skip("; ".join(reasons))
    gradients.check_gradients(gradients.by_name(backend), case, dtype, device="cuda")


@pytest.mark.parametrize("case", [*SMALL, *OPTION_CASES], ids=lambda case: case.name)
def test_triton(case):
    check("triton", case, torch.bfloat16)


# Every case compiles five kernels for seconds; the dtypes need not meet all of them.
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["one-token", "wide-128", "unaligned-chunk", "wide-256", "packed-with-all"])
def test_triton_in_other_dtypes(name, dtype):
    check("triton", BY_NAME[name], dtype)


@pytest.mark.parametrize("case", [*SMALL, *OPTION_CASES], ids=lambda case: case.name)
def test_hopper(case):
    check("hopper", case, torch.bfloat16)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [
        (64, (32, 16), torch.bfloat16),
        (64, (128, 128), torch.float32),
        (80, (1, 64), torch.bfloat16),
        (96, (128, 64), torch.float16),
        (128, (128, 128), torch.bfloat16),
        (128, (48, 32), torch.bfloat16),
        (256, (128, 64), torch.bfloat16),
        (256, (64, 16), torch.float32),
    ],
)
def test_head_dims_and_blocks(head_dim, block_size, dtype):
    case = Case(
        name="", heads=4, kv_heads=2, queries=9 if block_size[0] == 1 else 300, keys=500,
        head_dim=head_dim, block_size=block_size,
    )  # fmt: skip
    check("triton", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
def test_groups_and_densities(density, kv_heads, dtype):
    check("triton", replace(LATER, kv_heads=kv_heads, density=density), dtype)


@pytest.mark.parametrize("backend", ["gather", "reference"])
@pytest.mark.parametrize("name", ["thousand", "later-chunk", "softcap-and-sinks"])
def test_portable(backend, name):
    case = BY_NAME[name]
    call = gradients.Call.of(case, torch.float32, "cuda")
    found = call.gradients(gradients.by_name(backend))
    for gradient, budget in call.budgets().items():
        budget.check(found[gradient])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_columns_that_every_row_reads_are_split(dtype):
    # The first block's list is many times longer than the share of a program.
    case = Case(name="", heads=8, kv_heads=2, queries=4096, keys=4096, head_dim=64, density=0.02)
    call = gradients.Call.of(case, dtype, "cuda")
    mask = call.selection.to_mask()
    mask[..., 0] = True
    call = replace(call, selection=BlockSelection.from_mask(mask, case.block_size))
    counts = mask.sum(2).unflatten(1, (2, 4)).sum(2).flatten().to(torch.int32)
    launch = backward.KEYS[2, 64]
    plan = backward.split_columns(counts, 1, launch.most_programs(call.q.device))
    assert int(plan[len(counts) : 2 * len(counts)].max()) > 2, "nothing is split; nothing would be tested"
    found, again = (call.gradients(gradients.by_name("auto")) for _ in range(2))
    for name, budget in call.budgets().items():
        budget.check(found[name])
        assert torch.equal(found[name], again[name])


def test_nan_in_one_sequence_stays_there():
    case = BY_NAME["packed"]
    call = gradients.Call.of(case, torch.bfloat16, "cuda")
    attend = gradients.by_name("triton")
    clean = call.gradients(attend)
    # The second sequence, of one token, lies behind 130 and before 193 keys.
    bad = {name: getattr(call, name).clone() for name in ("q", "k", "v", "grad")}
    for x in bad.values():
        x[:, :, 131:] = torch.nan
    dirty = replace(call, **bad).gradients(attend)
    for name in ("q", "k", "v"):
        assert torch.equal(dirty[name][:, :, :131], clean[name][:, :, :131])


@pytest.mark.parametrize(
    "case", [BY_NAME["thousand"], BY_NAME["packed-with-all"]], ids=lambda case: case.name
)
def test_compiled_without_a_break(case):
    call = gradients.Call.of(case, torch.bfloat16, "cuda")
    attend = gradients.by_name("auto")

    def twice(*args):
        out, lse = attend(*args)
        return 2 * out, lse

    found = call.gradients(torch.compile(twice, fullgraph=True))
    for name, x in call.gradients(twice).items():
        assert torch.equal(found[name], x)


def test_nothing_waits_for_the_device():
    call = gradients.Call.of(BY_NAME["thousand"], torch.bfloat16, "cuda")
    attend = gradients.by_name("auto")
    call.gradients(attend)
    torch.cuda.synchronize()
    with no_waiting():
        call.gradients(attend)


def test_memory_at_32k_tokens_is_bounded():
    case = Case(name="", heads=8, kv_heads=2, queries=32768, keys=32768, head_dim=64, density=0.1)
    q, k, v = (x.requires_grad_() for x in random_qkv(case, dtype=torch.bfloat16, device="cuda"))
    selection = random_selection(case, density=case.density, heads=1, device="cuda")
    grad = torch.randn_like(q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_sparse_attention(q, k, v, selection).backward(grad)
    extra = torch.cuda.max_memory_allocated() - before
    programs = backward.KEYS[2, 64].most_programs(q.device)
    workspace = 8 * programs * 64 * 64 * 4
    # Output and gradients, three numbers per query and what lse's gradient is, lists, and the rest.
    lists = 4 * programs * (4 * 512 + 513)
    assert extra <= 2 * q.nbytes + 2 * k.nbytes + 5 * 4 * q[..., 0].numel() + workspace + lists + 2**22


def test_gradients_of_gradients_are_refused():
    q, k, v = (x.requires_grad_() for x in random_qkv(LATER, dtype=torch.bfloat16, device="cuda"))
    out = block_sparse_attention(q, k, v, random_selection(LATER, density=0.3, device="cuda"))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        dq.sum().backward()
