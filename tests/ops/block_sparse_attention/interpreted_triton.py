"""The Triton kernel in Triton's interpreter, on a CPU.

`tests/ops/test_triton.py` runs this file in a process of its own: the interpreter is chosen by an environment
variable when the kernel's file is imported. On a GPU `tests/gpu` runs the compiled kernel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention
from seerattention.ops.block_sparse_attention import triton as backend
from seerattention.ops.cases.block_sparse_attention import CASES, OPTION_CASES, PAGED_CASES, Case
from seerattention.ops.language import INTERPRETED
from seerattention.ops.options import Options
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.mutants import Mutant, Run, dropped_last_block, swapped_head_map, wrong_scale
from seerattention.testing.paged import check_paged, in_pages, paged_inputs

# A query that sees nothing has a denominator of 0, whose logarithm the kernel takes on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
a_nan_is_planted = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

BY_NAME = {case.name: case for case in (*CASES, *OPTION_CASES)}
# The interpreter takes milliseconds per block: what these are larger in, a smaller one has as well.
SLOW = {"thousand", "batch", "big-blocks"}
SMALL = [case for case in BY_NAME.values() if not case.large and case.name not in SLOW]
TINY = Case(name="tiny", heads=4, kv_heads=2, queries=20, keys=110, head_dim=32, block_size=(16, 16))
TINY_PACKED = replace(
    TINY, name="tiny-packed", queries=56, keys=88, lengths=((20, 20), (1, 1), (0, 0), (17, 49), (18, 18))
)
#: Those that the kernel takes.
PAGED = [case for case in PAGED_CASES if case.name != "odd-pages"]
#: One of each way in which the kernel walks its blocks: what dtype they are in is another question.
HALF = [BY_NAME[name] for name in ("kv-selection", "decode-rows", "wide-columns", "packed-with-all")]


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, BlockSelection]:
    return *random_qkv(case, dtype=dtype), random_selection(
        case, density=case.density, heads=case.selection_heads
    )


def test_this_is_the_interpreter() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_output(case: Case) -> None:
    conformance.attention_matches_reference(backend, case)


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_half_precision(case: Case) -> None:
    conformance.attention_matches_reference(backend, case, torch.float16)


@pytest.mark.parametrize(
    "case", [TINY, TINY_PACKED, BY_NAME["softcap-and-sinks"]], ids=lambda case: case.name
)
def test_lse(case: Case) -> None:
    conformance.attention_lse_matches_reference(backend, case)


def test_everything_else() -> None:
    conformance.check_attention(backend, replace(TINY, keys=62))


@pytest.mark.parametrize("name", ["unaligned-chunk", "decode-rows", "many-words"])
def test_unread_keys_and_values_are_never_read(name: str) -> None:
    conformance.attention_ignores_unread(backend, BY_NAME[name], torch.float16)


@a_nan_is_planted
def test_no_sequence_reads_its_neighbours() -> None:
    case = BY_NAME["packed"]
    q, k, v, selection = inputs(case)
    out, _ = backend.run(q, k, v, selection, case.options())
    # The second sequence, of one token, lies behind 130 and before 193 keys.
    k[:, :, 131:], v[:, :, 131:] = torch.nan, torch.nan
    first, _ = backend.run(q, k, v, selection, case.options())
    assert torch.equal(first[:, :, :131], out[:, :, :131])
    assert first[:, :, 131:].isnan().all()


@a_nan_is_planted
@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_pages(case: Case) -> None:
    check_paged(backend, case)


@a_nan_is_planted
def test_pages_in_half_precision() -> None:
    check_paged(backend, PAGED[-1], torch.float16)


def test_pages_of_sequences_whose_lengths_only_the_device_knows() -> None:
    case = next(case for case in PAGED if case.name == "packed-pages")
    q, k, v, selection, options = paged_inputs(case)
    keys, values, rows = in_pages(k, case), in_pages(v, case), options.rows
    assert rows.starts_q is not None
    assert rows.starts_k is not None
    unknown = Rows.from_starts(rows.starts_q, rows.starts_k, rows.num_queries, rows.num_keys)
    out = block_sparse_attention(
        q, keys, values, selection, rows=unknown, pages=options.pages, backend="triton"
    )
    assert torch.equal(out, backend.run(q, keys, values, selection, options)[0])
    assert torch.equal(out, backend.run(q, k, v, selection, replace(options, pages=None))[0])


def test_compiled_with_pages() -> None:
    q, k, v, selection, options = paged_inputs(PAGED[0])
    keys, values = in_pages(k, PAGED[0]), in_pages(v, PAGED[0])
    whole = Options.of(q, k, return_lse=True)

    def call(q: Tensor, k: Tensor, v: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            q, k, v, selection, rows=options.rows, pages=pages, return_lse=True, backend="triton"
        )

    out, lse = torch.compile(call, fullgraph=True, backend="eager")(q, keys, values, options.pages)
    for one, other in zip((out, lse), backend.run(q, k, v, selection, whole), strict=True):
        assert torch.equal(one, other)


def test_runs_are_alike_bit_for_bit() -> None:
    q, k, v, selection = inputs(BY_NAME["kv-selection"], torch.float16)
    options = Options.of(q, k, return_lse=True)
    for one, other in zip(*(backend.run(q, k, v, selection, options) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bug", [wrong_scale, dropped_last_block, swapped_head_map])
def test_planted_bugs_are_noticed(bug: Run) -> None:
    with pytest.raises(AssertionError):
        conformance.attention_matches_reference(Mutant(bug, backend), TINY)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale: float) -> None:
    q, k, v, selection = inputs(TINY)
    out = block_sparse_attention(q, k, v, selection, scale=scale, backend="triton")
    expected = block_sparse_attention(q, k, v, selection, scale=scale, backend="reference")
    torch.testing.assert_close(out, expected)


def test_strides_do_not_matter() -> None:
    q, k, v, selection = inputs(TINY)
    options = Options.of(q, k)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    wide = torch.cat([v, v], -1)[..., :32]
    expected, _ = backend.run(q, k, v, selection, options)
    out, _ = backend.run(*strided, wide, selection, options)
    assert out.stride() == strided[0].stride()
    assert torch.equal(out, expected)


def test_the_output_lies_in_the_order_of_a_part_of_fused_queries_keys_and_values() -> None:
    case = replace(TINY, batch=2)
    q, k, v, selection = inputs(case)
    options = Options.of(q, k, return_lse=True)
    expected, expected_lse = backend.run(q, k, v, selection, options)
    fused = torch.full((2, case.queries, case.heads + 4, case.head_dim), torch.nan)
    fused[:, :, : case.heads] = q.transpose(1, 2)
    part = fused[:, :, : case.heads].transpose(1, 2)
    out, lse = backend.run(part, k, v, selection, options)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, expected)
    assert lse is not None
    assert expected_lse is not None
    assert torch.equal(lse, expected_lse)
    # What a compiler is told of the strides is so.
    op = torch.ops.seerattention.block_sparse_attention.default
    rest = 0.2, None, None, None, None, None, case.keys, True, backend.__name__
    args = part, k, v, selection.bits, [16, 16], selection.shape[3], [], *rest
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_bits_that_no_selection_may_have_are_ignored() -> None:
    q, k, v, selection = inputs(TINY)
    options = Options.of(q, k)
    bits = selection.bits.clone()
    # Columns past Nk, and blocks after the row's queries.
    bits |= ~0 << 7
    bits[:, :, 0] |= 0b1100000
    dirty = replace(selection, bits=bits)
    expected, _ = backend.run(q, k, v, selection, options)
    assert torch.equal(backend.run(q, k, v, dirty, options)[0], expected)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    shape = Shape(name="", heads=1, kv_heads=1, queries=32, keys=32, head_dim=16, block_size=(16, 16))
    q, k, v = random_qkv(shape)
    mask = torch.tensor([[0, 1], [1, 1]]).bool()[None, None]
    selection = BlockSelection.from_mask(mask, (16, 16))
    out, lse = backend.run(q, k, v, selection, Options.of(q, k, return_lse=True))
    assert (out[:, :, :16] == 0).all()
    assert lse is not None
    assert (lse[:, :, :16] == -torch.inf).all()
    assert out[:, :, 16:].isfinite().all()


def test_compiled_without_a_break() -> None:
    q, k, v, selection = inputs(TINY)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(q, k, v, selection, return_lse=True, backend="triton")
        return 2 * out, lse

    expected = call(q, k, v)
    for one, other in zip(
        torch.compile(call, fullgraph=True, backend="eager")(q, k, v), expected, strict=True
    ):
        assert torch.equal(one, other)
    op = torch.ops.seerattention.block_sparse_attention.default
    rest = 0.2, None, None, None, None, None, 110, True, backend.__name__
    args = q, k, v, selection.bits, [16, 16], selection.shape[3], [], *rest
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_reasons_why_not() -> None:
    q, k, v, selection = inputs(TINY)
    options = Options.of(q, k)
    assert backend.unsupported(q, k, v, selection, options) == []

    def why(x: Tensor, s: BlockSelection = selection) -> list[str]:
        return backend.unsupported(x, x, x, s, options)

    assert why(q.double()) == ["it computes float16, bfloat16 and float32, not float64"]
    assert why(q.bfloat16()) == ["Triton's interpreter multiplies bfloat16 matrices wrongly"]
    assert why(q.clone().requires_grad_()) == []
    assert why(torch.zeros(1, 4, 40, 257)) == ["head_dim must be at most 256, got 257"]
    assert why(q, replace(selection, block_size=(16, 24))) == [
        "KV blocks must have one of 16, 32, 64, 128 tokens, got 24"
    ]
    across = q.mT.contiguous().mT
    assert why(across)[0] == "the last dimension of q must be contiguous, its stride is 20"
    apart = replace(options, sinks=torch.zeros(8)[::2])
    assert backend.unsupported(q, k, v, selection, apart) == [
        "the last dimension of sinks must be contiguous, its stride is 2"
    ]
    assert why(q.to("meta")) == ["it needs a GPU"]
