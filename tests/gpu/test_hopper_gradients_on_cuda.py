"""The Hopper kernel of the gradients of keys and values: what it claims, and where others take over."""

from dataclasses import replace

import pytest
import torch

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention.kernels import backward, hopper_backward
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.testing import gradients
from seerattention.testing.inputs import random_selection
from seerattention.testing.waiting import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

PLAIN = Case(name="plain", heads=8, kv_heads=2, queries=1000, keys=1000, head_dim=128, density=0.2)
#: Later chunks leave blocks that nobody reads, which become NaN. Others share what is compiled with these.
CASES = [
    PLAIN,
    replace(PLAIN, name="later-chunk", queries=333),
    replace(PLAIN, name="last-token", queries=1, keys=500),
    replace(PLAIN, name="one-token", queries=1, keys=1),
    replace(PLAIN, name="odd-lengths", queries=77, keys=301),
    replace(PLAIN, name="nearly-empty", queries=1920, keys=2000, density=0.01),
    replace(PLAIN, name="everything", queries=129, keys=700, density=1.0),
    replace(PLAIN, name="batch", queries=200, keys=420, batch=3),
    replace(PLAIN, name="sinks", queries=333, sinks=True),
    replace(PLAIN, name="no-groups", kv_heads=8, queries=300),
    replace(PLAIN, name="one-kv-head", kv_heads=1, queries=300),
    replace(PLAIN, name="one-selection", queries=300, selection_heads=1),
    replace(PLAIN, name="kv-selection", queries=300, selection_heads=2),
    replace(PLAIN, name="blocks-128", queries=515, block_size=(128, 128)),
    replace(PLAIN, name="rows-192", queries=515, block_size=(192, 64)),
    replace(PLAIN, name="columns-128", queries=515, head_dim=64, block_size=(64, 128)),
]


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Count the calls of the kernel."""
    calls = []
    keys = hopper_backward.keys

    def counted(*given):
        calls.append(given)
        return keys(*given)

    monkeypatch.setattr(hopper_backward, "keys", counted)
    return calls


def first_block_read(call):
    """Let every row read the first block: the longest column that there can be."""
    mask = call.selection.to_mask()
    mask[..., 0] = True
    return replace(call, selection=BlockSelection.from_mask(mask, call.selection.block_size))


def check(call, taken):
    """Check the gradients of this path and of Triton's within the budget, and that a second run agrees."""
    found, again = (call.gradients(gradients.by_name("hopper")) for _ in range(2))
    assert len(taken) == 2
    triton = call.gradients(gradients.by_name("triton"))
    assert len(taken) == 2
    for name, budget in call.budgets().items():
        budget.check(found[name])
        replace(budget, gold=triton[name].double()).check(found[name])
        assert torch.equal(found[name], again[name])
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case, taken):
    gradients.check_gradients(gradients.by_name("hopper"), case, torch.bfloat16, "cuda")
    assert len(taken) == 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision(head_dim, taken):
    case = replace(PLAIN, queries=333, head_dim=head_dim)
    gradients.check_gradients(gradients.by_name("hopper"), case, torch.float16, "cuda")
    assert len(taken) == 2


@pytest.mark.parametrize("queries", [333, 1000])
def test_as_triton(queries, taken):
    check(gradients.Call.of(replace(PLAIN, queries=queries), torch.bfloat16, "cuda"), taken)


def test_split_columns(taken):
    case = replace(PLAIN, queries=4096, keys=4096, density=0.02)
    call = first_block_read(gradients.Call.of(case, torch.bfloat16, "cuda"))
    counts, _ = backward.readers(call.q, call.k, call.selection, call.options)
    processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count
    plan = backward.split_columns(counts, 1, 2 * processors)
    assert int(plan[len(counts) : 2 * len(counts)].max()) > 2, "nothing is split; nothing would be tested"
    check(call, taken)


def test_a_selection_shared_by_a_batch(taken):
    case = replace(PLAIN, queries=200, keys=420, batch=3)
    call = gradients.Call.of(case, torch.bfloat16, "cuda")
    check(replace(call, selection=random_selection(case, density=0.3, batch=1, device="cuda")), taken)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_calls_agree(head_dim):
    # Of a race between a copy and the reads before it, single calls may see nothing.
    case = replace(PLAIN, queries=1500, keys=1500, head_dim=head_dim)
    call = first_block_read(gradients.Call.of(case, torch.bfloat16, "cuda"))
    out, lse = block_sparse_attention(call.q, call.k, call.v, call.selection, return_lse=True)
    shift, delta = backward.rows(call.grad, torch.zeros_like(lse), out, lse)
    given = call.grad, call.q, call.k, call.v, shift, delta, call.selection, call.options
    dk, dv = hopper_backward.keys(*given)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        again = hopper_backward.keys(*given)
        differing += (again[0] != dk).any() | (again[1] != dv).any()
    assert int(differing) == 0, f"{int(differing)} of 500 calls differ"


@pytest.mark.parametrize("stages", [3, 4])
def test_the_number_of_stages_changes_nothing(stages, monkeypatch):
    call = gradients.Call.of(PLAIN, torch.bfloat16, "cuda")
    expected = call.gradients(gradients.by_name("hopper"))
    monkeypatch.setitem(hopper_backward.STAGES, 128, stages)
    for name, x in call.gradients(gradients.by_name("hopper")).items():
        assert torch.equal(x, expected[name])


def test_strides_do_not_matter(taken):
    call = gradients.Call.of(replace(PLAIN, queries=333), torch.bfloat16, "cuda")
    attend = gradients.by_name("hopper")
    expected = call.gradients(attend)
    strided = replace(
        call, **{n: getattr(call, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "grad")}
    )
    found = strided.gradients(attend)
    assert len(taken) == 2
    # Nobody may be handed strides other than a compiler was told.
    assert [found[n].stride() for n in ("q", "k", "v")] == [
        x.stride() for x in (strided.q, strided.k, call.v)
    ]
    for name, x in expected.items():
        assert torch.equal(found[name], x)


@pytest.mark.parametrize("how", ["one number", "odd stride", "odd address"])
def test_gradients_of_the_output_that_tma_cannot_read(how, taken):
    call = gradients.Call.of(replace(PLAIN, queries=333), torch.bfloat16, "cuda")
    grad = torch.ones_like(call.grad[..., :1]) if how == "one number" else call.grad
    call = replace(call, grad=grad.expand(call.q.shape).contiguous())
    other = {
        "one number": lambda x: grad.expand(x.shape),
        "odd stride": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :128],
        "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }[how](call.grad)
    attend = gradients.by_name("hopper")
    expected, found = call.gradients(attend), replace(call, grad=other).gradients(attend)
    assert len(taken) == 2
    for name, x in expected.items():
        assert torch.equal(found[name], x)


def test_bits_that_are_a_view():
    call = gradients.Call.of(replace(PLAIN, queries=2100, keys=2100), torch.bfloat16, "cuda")
    apart = torch.stack([call.selection.bits, call.selection.bits + 1], -1)[..., 0]
    scattered = replace(call, selection=replace(call.selection, bits=apart))
    attend = gradients.by_name("hopper")
    expected = call.gradients(attend)
    for name, x in scattered.gradients(attend).items():
        assert torch.equal(x, expected[name])


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks", "kv"])
def test_some_inputs_learn(which):
    call = gradients.Call.of(replace(PLAIN, queries=333, sinks=True), torch.bfloat16, "cuda")
    expected = call.gradients(gradients.by_name("hopper"))
    given = {"q": call.q, "k": call.k, "v": call.v, "sinks": call.options.sinks}
    names = ["k", "v"] if which == "kv" else [which]
    leaves = {n: x.detach().requires_grad_(n in names) for n, x in given.items()}
    outputs = block_sparse_attention(
        *(leaves[n] for n in "qkv"), call.selection, sinks=leaves["sinks"], return_lse=True, backend="hopper"
    )
    found = torch.autograd.grad(outputs, [leaves[n] for n in names], [call.grad, call.grad_lse])
    for name, x in zip(names, found, strict=True):
        assert torch.equal(x, expected[name])


def test_lse_alone_learns(taken):
    call = gradients.Call.of(replace(PLAIN, queries=333), torch.bfloat16, "cuda")
    check(replace(call, grad=torch.zeros_like(call.grad)), taken)


def test_compiled_without_a_break(taken):
    call = gradients.Call.of(PLAIN, torch.bfloat16, "cuda")
    attend = gradients.by_name("auto")

    def twice(*args):
        out, lse = attend(*args)
        return 2 * out, lse

    found = call.gradients(torch.compile(twice, fullgraph=True))
    assert len(taken) == 1
    for name, x in call.gradients(twice).items():
        assert torch.equal(found[name], x)


def test_nothing_waits_for_the_device(taken):
    call = gradients.Call.of(PLAIN, torch.bfloat16, "cuda")
    attend = gradients.by_name("auto")
    call.gradients(attend)
    torch.cuda.synchronize()
    with no_waiting():
        call.gradients(attend)
    assert len(taken) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(taken):
    case = replace(PLAIN, queries=333)
    found, expected = (
        gradients.Call.of(case, torch.bfloat16, device).gradients(gradients.by_name("hopper"))
        for device in ("cuda:1", "cuda:0")
    )
    assert len(taken) == 2
    for name, x in expected.items():
        assert torch.equal(found[name].to("cuda:0"), x)
