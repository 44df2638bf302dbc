from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import baselines
from seerattention.ops import language
from seerattention.ops.cases.select_blocks import CASES, Case
from seerattention.ops.language import jit, tl
from seerattention.ops.launch import Launch
from seerattention.ops.rules import take
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.select_blocks.kernels import choosing as kernel
from seerattention.ops.select_blocks.kernels import scores
from seerattention.policies import Calibrated, Calibration, Policy, Rule, Threshold, TokenBudget, TopK, TopP
from seerattention.rows import Rows
from seerattention.testing.choices import (
    POLICIES,
    RULELESS,
    TIED,
    check_choice,
    check_count,
    check_extremes,
    check_mass_of_ties,
    check_packed_choice,
    check_ties,
    check_unread,
)
from seerattention.testing.inputs import random_qkv
from seerattention.testing.selections import Certain, arguments

pytest.importorskip("triton")

# Rows of scores that a short block lacks hold whatever was in memory. Infinite totals take them out of the
# choice, from infinity too: maxima drop NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")

by_case = pytest.mark.parametrize("case", [c for c in CASES if not c.large], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and chunks at the sizes that an interpreter computes."""
    small = Launch(16, 64, 4, 1)
    monkeypatch.setattr(scores, "LAUNCHES", dict.fromkeys(scores.LAUNCHES, small))
    monkeypatch.setattr(scores, "HELD_BYTES", 8 * 2**10)
    monkeypatch.setattr(scores, "STRIP", 2)
    monkeypatch.setattr(kernel, "SCORE_BYTES", 4 * 2 * 16 * 32)
    monkeypatch.setattr(kernel, "SHARE_BYTES", 4 * 2 * 16 * 32)
    return


@by_case
@torch.no_grad()
def test_kernel_chooses_as_the_reference(case: Case) -> None:
    # What the other rules take from a row of scores has nothing to do with where the scores come from.
    check_choice(case, TopK(0.3), "triton")


@pytest.mark.parametrize("stale", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("name", ["shares-cut-short", "shares-unaligned-chunk", "packed-shares"])
@torch.no_grad()
def test_what_was_in_memory_is_not_read(name: str, stale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def used(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(stale) if made.is_floating_point() else made

    args = arguments(next(case for case in CASES if case.name == name))
    certain = Certain.of(policy=TopK(0.3), **args)
    monkeypatch.setattr(torch, "empty", used)
    certain.check(select_blocks(policy=TopK(0.3), **args, backend="triton"))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_policies_and_knobs(policy: Policy) -> None:
    check_choice(next(c for c in CASES if c.name == "no-sub-blocks"), policy, "triton")


@torch.no_grad()
def test_half_precision() -> None:
    check_choice(next(c for c in CASES if c.name == "later-chunk"), TopK(0.3), "triton", torch.float16)


PACKED = [case for case in CASES if case.lengths]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "policy", [TopK(0.3), TopP(0.6), TopK(0.1, sink_blocks=1, dense_last_rows=2)], ids=str
)
@torch.no_grad()
def test_packed_sequences_choose_as_alone(case: Case, policy: Policy) -> None:
    check_packed_choice(case, policy, "triton")


@torch.no_grad()
def test_limits_of_each_head_in_packed_sequences() -> None:
    # A law in the length: other limits for every sequence.
    laws = {0: ((-0.5, -0.3, 0.0), (-1.0, -0.4, 0.0))}
    policy = Calibrated(Calibration("recall", 0.9, 1000, (16, 16), -0.2, None, laws)).at(0)
    check_choice(PACKED[0], policy, "triton")


# What the others leave are maxima of NaNs, of which numpy warns.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@torch.no_grad()
def test_other_sequences_and_what_they_leave_are_not_read() -> None:
    check_unread(PACKED[0], "triton")


def test_lengths_that_only_a_device_knows() -> None:
    args = arguments(PACKED[0])
    rows = args["rows"]
    unknown = Rows.from_starts(rows.starts_q, rows.starts_k, rows.num_queries, rows.num_keys)
    with pytest.raises(NotImplementedError, match="host does not know the lengths"):
        select_blocks(policy=TopK(0.3), **args | {"rows": unknown}, backend="triton")


# --- exact scores: ties are decided alike ---------------------------------------------------------------


@pytest.mark.parametrize(("policy", "levels"), TIED, ids=str)
def test_ties_go_to_the_lower_block(policy: Policy, levels: int) -> None:
    check_ties(policy, levels, "triton")


@pytest.mark.parametrize(("queries", "block_q"), [(60, 4), (60, 16), (37, 8), (1, 4)])
@pytest.mark.parametrize("count", [1, 4, 40])
@pytest.mark.parametrize("knobs", [(0, 1, 0), (2, 3, 0), (1, 2, 2)])
def test_a_count_holds_what_is_read_anyway(
    queries: int, block_q: int, count: int, knobs: tuple[int, int, int]
) -> None:
    check_count(queries, block_q, count, knobs, "triton")


@pytest.mark.parametrize("mass", [0.3, 0.5, 0.8, 1.0])
def test_mass_of_ties(mass: float) -> None:
    check_mass_of_ties(mass, "triton")


def test_extreme_scores() -> None:
    check_extremes("triton")


# --- what the kernel cannot do -------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "reason"), RULELESS, ids=lambda x: getattr(x, "name", ""))
def test_a_policy_that_is_not_its_rule_runs_in_torch(policy: Policy, reason: str) -> None:
    args = arguments(CASES[4])
    with pytest.raises(NotImplementedError, match=reason):
        select_blocks(policy=policy, **args, backend="triton")
    plain = select_blocks(policy=policy, **args, backend="reference").to_mask()
    assert torch.equal(select_blocks(policy=policy, **args).to_mask(), plain)


def test_rules_by_example() -> None:
    assert Threshold(0.1).rule(100, 64) == Rule("share", 0.1)
    assert TopK(0.75).rule(100, 64) == Rule("count", 50)
    assert TopP(0.9).rule(100, 64) == Rule("mass", 0.9)
    assert TokenBudget(100).rule(100, 64) == Rule("count", 1)
    with pytest.raises(ValueError, match="belong to a layer"):
        Calibrated(POLICIES[-1].calibration).rule(100, 64)  # type: ignore[attr-defined]


def test_a_baseline_runs_in_torch() -> None:
    scorer = baselines.create("quest", block_size=(64, 64))
    q, k, _ = random_qkv(CASES[4])
    positions = torch.arange(1000)
    k_blocks = scorer.compress(k, positions=positions)
    args: dict[str, Any] = {"positions": positions}
    with pytest.raises(NotImplementedError, match="Quest does not say that its scores are products"):
        select_blocks(q, k_blocks, scorer, TopK(0.3), **args, backend="triton")
    select_blocks(q, k_blocks, scorer, TopK(0.3), **args)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k_blocks": torch.zeros(1, 1, 63, 16).double()}, "float16, bfloat16 and float32, not float64"),
        ({"k_blocks": torch.zeros(1, 1, 63, 16).bfloat16()}, "interpreter multiplies bfloat16"),
        ({"k_blocks": torch.zeros(1, 1, 63, 257)}, "up to 512 bytes"),
        (
            {"rows": Rows.last(1000, 64 * 32768 + 1), "k_blocks": torch.zeros(1, 1, 4 * 32768 + 1, 16)},
            "rows of at most 32768 blocks, not 32769",
        ),
    ],
)
def test_reasons_why_not(change: dict[str, Any], reason: str) -> None:
    args = arguments(CASES[4]) | change
    with pytest.raises(NotImplementedError, match=reason):
        select_blocks(policy=TopK(0.3), **args, backend="triton")


def test_a_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(CASES[0]) | {"policy": TopK(0.3)}
    monkeypatch.setattr(kernel, "run", None)
    select_blocks(**args)
    monkeypatch.setattr(language, "triton", None)
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        select_blocks(**args, backend="triton")
    monkeypatch.setattr(language, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        select_blocks(**args, backend="triton")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows.last(999, 1000), "q has 1000 tokens, rows have 999"),
        (Rows.last(1000, 1009), r"must be \[1, H, 64, E\] for q \[1, ...\] and the 1009 keys of rows, got"),
        (Rows.packed([(400, 400), (600, 600)]), r"must be \[2, H, 38, E\] .* 600 keys of the longest seq"),
    ],
)
def test_lengths_that_do_not_fit(rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_blocks(policy=TopK(0.3), **arguments(CASES[4]) | {"rows": rows})


# --- memory, launches, compilation -----------------------------------------------------------------------


def test_chunks_cover_all_rows_within_the_buffer() -> None:
    for widths, room, tile in (
        ([*range(1, 513)], 32 * 512, 64),
        ([*range(1, 2049)], 262144, 64),
        ([500] * 7, 60, 16),
        ([1], 1, 64),
    ):
        chunks = list(kernel._chunks(widths, room, tile))
        rows = [row for start, stop in reversed(chunks) for row in range(start, stop)]
        assert rows == list(range(len(widths)))
        for start, stop in chunks:
            assert stop - start == 1 or (stop - start) * scores.stride(widths[stop - 1]) <= room


@torch.no_grad()
def test_queries_summarised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(next(c for c in CASES if c.name == "later-chunk"), torch.float32)
    whole = select_blocks(policy=TopK(0.3), **args, backend="triton")
    for size in (1, 4 * 2 * 4 * 16 + 1):
        monkeypatch.setattr(kernel, "SUMMARY_BYTES", size)
        part = select_blocks(policy=TopK(0.3), **args, backend="triton")
        assert torch.equal(whole.bits, part.bits)


@torch.no_grad()
def test_kernels_are_opaque_to_the_compiler() -> None:
    args = arguments(next(c for c in CASES if c.name == "later-chunk"))
    plain = select_blocks(policy=TopK(0.3), **args, backend="triton")

    def bits(q: Tensor) -> Tensor:
        return select_blocks(policy=TopK(0.3), **(args | {"q": q}), backend="triton").bits

    compiled = torch.compile(bits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args["q"]), plain.bits)


def test_a_wrong_selection_is_noticed() -> None:
    case = next(c for c in CASES if c.name == "no-sub-blocks")
    args = arguments(case)
    certain = Certain.of(policy=TopK(0.3), **args)
    for other in (TopK(0.45), TopK(0.3, sink_blocks=1)):
        with pytest.raises(AssertionError, match=r"blocks (missing|too many), first \["):
            certain.check(select_blocks(policy=other, **args, backend="triton"))
    args["scorer"].scale *= -1
    with pytest.raises(AssertionError, match="blocks"):
        certain.check(select_blocks(policy=TopK(0.3), **args, backend="triton"))
    assert replace(TopK(0.3), sink_blocks=1).rule(10, 64) == TopK(0.3).rule(10, 64)


@jit
def _take_in_steps(scores, wanted, to):
    block = tl.arange(0, 64)
    always = (block == 20) | (block == 63)
    taken = take(tl.load(scores + block), block < 64, always, 2, tl.load(wanted), 1, 1)
    tl.store(to + block, taken.to(tl.int32))


@pytest.mark.parametrize("large", [1, 2, 5000])
def test_blocks_that_are_always_read_keep_their_place_however_large_scores_are(large: int) -> None:
    scores = torch.arange(-64, 0, dtype=torch.int32)
    scores[[20, 63]] = -16384
    scores[[7, 9, 30]] = large
    taken, wanted = torch.empty(64, dtype=torch.int32), torch.tensor([3.0])
    for count, more in ((2, []), (4, [7, 9]), (6, [7, 9, 30, 62])):
        wanted[0] = count
        _take_in_steps[(1,)](scores, wanted, taken)
        assert taken.nonzero().flatten().tolist() == sorted([20, 63, *more])
