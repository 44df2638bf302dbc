"""The CPU's kernel that chooses blocks, compiled for every kind of CPU that this one can be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import TokenBudget, TopK, TopP, baselines
from seerattention.ops import native as compiled
from seerattention.ops.cases.select_blocks import CASES, Case
from seerattention.ops.native import choosing
from seerattention.ops.select_blocks import native, select_blocks
from seerattention.policies import Calibrated, Calibration, Policy
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
from seerattention.testing.selections import Certain, arguments

SMALL = [case for case in CASES if not case.large]
PACKED = [case for case in SMALL if case.lengths]
BY_NAME = {case.name: case for case in SMALL}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Rows of more blocks than a register has lanes, of more summaries than a tile, and of less than one.
MIDDLING = [
    Case(name="default", heads=6, kv_heads=2, queries=2500, keys=2500, head_dim=64, gate={"shares": True}),
    Case(name="later", heads=4, kv_heads=2, queries=700, keys=2900, head_dim=64, gate={"shares": True}),
    Case(name="two", batch=2, heads=4, kv_heads=2, queries=999, keys=999, head_dim=32, gate={"shares": True}),
    Case(
        name="every-query", heads=2, kv_heads=1, queries=900, keys=900, head_dim=16, block_size=(128, 128),
        gate={"q_sub_block": 1, "k_sub_block": 4, "shares": True},
    ),
    Case(
        name="one-summary-each", heads=2, kv_heads=2, queries=3000, keys=3000, head_dim=16,
        block_size=(16, 16),
        gate={"q_sub_block": 16, "k_sub_block": 16, "shares": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SMALL, *MIDDLING], ids=lambda case: case.name)
def test_chooses_as_the_reference(level: str, case: Case, dtype: torch.dtype) -> None:
    check_choice(case, TopK(0.3), "native", dtype)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_and_knobs(level: str, policy: Policy) -> None:
    check_choice(BY_NAME["no-sub-blocks"], policy, "native")
    check_choice(BY_NAME["shares"], TopP(0.6), "native")


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "policy", [TopK(0.3), TopP(0.6), TopK(0.1, sink_blocks=1, dense_last_rows=2)], ids=str
)
def test_packed_sequences_choose_as_alone(level: str, case: Case, policy: Policy) -> None:
    check_packed_choice(case, policy, "native")


def test_limits_of_each_head_in_packed_sequences(level: str) -> None:
    # A law in the length: other limits for every sequence.
    laws = {0: ((-0.5, -0.3, 0.0), (-1.0, -0.4, 0.0))}
    policy = Calibrated(Calibration("recall", 0.9, 1000, (16, 16), -0.2, None, laws)).at(0)
    check_choice(PACKED[0], policy, "native")


@pytest.mark.parametrize("case", PACKED[:2], ids=lambda case: case.name)
def test_other_sequences_and_what_they_leave_are_not_read(level: str, case: Case) -> None:
    check_unread(case, "native")


@pytest.mark.parametrize(("policy", "levels"), TIED, ids=str)
def test_ties_go_to_the_lower_block(level: str, policy: Policy, levels: int) -> None:
    check_ties(policy, levels, "native")


@pytest.mark.parametrize(("queries", "block_q"), [(60, 4), (60, 16), (37, 8), (1, 4)])
@pytest.mark.parametrize("count", [1, 4, 40])
@pytest.mark.parametrize("knobs", [(0, 1, 0), (2, 3, 0), (1, 2, 2)])
def test_a_count_holds_what_is_read_anyway(
    level: str, queries: int, block_q: int, count: int, knobs: tuple[int, int, int]
) -> None:
    check_count(queries, block_q, count, knobs, "native")


@pytest.mark.parametrize("mass", [0.3, 0.5, 0.8, 1.0])
def test_mass_of_ties(level: str, mass: float) -> None:
    check_mass_of_ties(mass, "native")


def test_summaries_that_do_not_fit(level: str) -> None:
    given = arguments(BY_NAME["no-sub-blocks"]) | {"policy": TopK(0.3)}
    keys = given.pop("k_blocks")
    for wrong, message in (
        (keys[..., :8], "must agree in batch and dimension"),
        (torch.cat((keys, keys), 3), "must agree in batch and dimension"),
        (torch.cat([keys] * 3, 1), "heads of queries must be a multiple of those of keys"),
        (torch.cat([keys] * 8, 1), "heads of queries must be a multiple of those of keys"),
        (keys[:, :0], r"keys must be \[B, H, S >= 1, E\]"),
        (keys[..., :0], r"keys must be \[B, H, S >= 1, E\]"),
    ):
        for backend in ("native", "composed"):
            with pytest.raises(ValueError, match=message):
                select_blocks(k_blocks=wrong, **given, backend=backend)
    empty = {"q": given.pop("q")[:0], "k_blocks": keys[:0]}
    with pytest.raises(ValueError, match=r"queries must be \[B, H, S >= 1, E\]"):
        select_blocks(**empty, **given, backend="native")


def test_extreme_scores(level: str) -> None:
    check_extremes("native")


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_runs_and_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    for name, policy in (("two", TopP(0.5)), ("default", TokenBudget(500))):
        args = arguments(next(case for case in MIDDLING if case.name == name), dtype)
        runs = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(select_blocks(policy=policy, **args, backend="native").bits)
        torch.set_num_threads(1)
        assert all(torch.equal(other, runs[0]) for other in runs[1:])


@torch.no_grad()
def test_a_piece_chooses_as_the_whole(level: str) -> None:
    args = arguments(MIDDLING[0])
    whole = select_blocks(policy=TopP(0.6), **args, backend="native").to_mask()
    for first, count in ((0, 64), (1024, 640), (2432, 68)):
        part = args | {"q": args["q"][:, :, first : first + count], "rows": Rows.at(first, count)}
        mask = select_blocks(policy=TopP(0.6), **part, backend="native").to_mask()
        down = slice(first // 64, (first + count - 1) // 64 + 1)
        assert torch.equal(mask, whole[:, :, down, : mask.shape[3]])


@pytest.mark.parametrize("case", [MIDDLING[0], MIDDLING[2], BY_NAME["thousand"]], ids=lambda case: case.name)
@torch.no_grad()
def test_bugs_are_noticed(level: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs in what the kernel is told: each must be seen by the check that all backends pass."""
    args = arguments(case) | {"policy": TopK(0.5, sink_blocks=1, local_blocks=2)}
    certain, run = Certain.of(**args), choosing.choose
    certain.check(select_blocks(**args, backend="native"))

    def check_noticed(bug: Callable[..., tuple[Any, ...]]) -> None:
        monkeypatch.setattr(choosing, "choose", lambda *told: run(*bug(*told)))
        with pytest.raises(AssertionError, match="blocks"):
            certain.check(select_blocks(**args, backend="native"))

    def place(number: int, change: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
        return lambda *told: (*told[:number], change(told[number]), *told[number + 1 :])

    check_noticed(place(0, lambda queries: queries.roll(1, 2)))
    check_noticed(place(0, lambda queries: queries.roll(1, 1)))
    check_noticed(place(1, lambda keys: keys.roll(1, 2)))
    check_noticed(place(7, lambda shares: not shares))
    check_noticed(place(8, lambda scale: -scale))
    check_noticed(place(10, lambda values: values + 1))
    check_noticed(place(12, lambda knobs: [0, *knobs[1:]]))
    check_noticed(place(12, lambda knobs: [knobs[0], 1, 0]))


#: What a line of the kernel is, and what it must not be.
PLANTED = {
    "sees the next summary": ("ceil_div(end, size_k))", "ceil_div(end, size_k) + 1)"),
    "misses its last summary": ("ceil_div(end, size_k))", "ceil_div(end, size_k) - 1)"),
    "the last product, not the largest": ("best[v] = larger(best[v], x);", "best[v] = x;"),
    "the last lane, not the largest": ("x = larger(x, load(at + lane))", "x = load(at + lane)"),
    "sums leave blocks out": ("block < blocks; ++block, ++i)", "block < 0; ++block, ++i)"),
    "misses its own block": ("last / call.block_k + 1, own", "last / call.block_k, own"),
    "a local block too many": ("- (call.local - 1)", "- call.local"),
    "one block fewer": ("n < room; ++n) set(block_of", "n < room - 1; ++n) set(block_of"),
    "another head's keys": ("head / (call.heads / call.kv_heads)", "head % call.kv_heads"),
}


def check_all() -> None:
    for case in (MIDDLING[0], MIDDLING[3]):
        for policy in (TopK(0.3, sink_blocks=1, local_blocks=2), TopP(0.6)):
            check_choice(case, policy, "native")


def test_what_is_right_passes(level: str) -> None:
    check_all()


@pytest.mark.parametrize("bug", PLANTED)
@torch.no_grad()
def test_bugs_in_the_kernel_are_noticed(
    level: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level != "avx512":
        pytest.skip("one kind of CPU is enough")
    right, wrong = PLANTED[bug]
    copy = Path(shutil.copytree(compiled.SOURCES, tmp_path / "native"))
    found = [path for path in copy.iterdir() if path.suffix in (".h", ".cpp") and right in path.read_text()]
    assert len(found) == 1
    found[0].write_text(found[0].read_text().replace(right, wrong))
    monkeypatch.setattr(compiled, "SOURCES", copy)
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-O0"))
    compiled.build()
    with pytest.raises(AssertionError):
        check_all()


@pytest.mark.parametrize(("policy", "reason"), RULELESS, ids=lambda x: getattr(x, "name", ""))
def test_a_policy_that_is_not_its_rule_runs_in_torch(level: str, policy: Policy, reason: str) -> None:
    args = arguments(BY_NAME["thousand"])
    with pytest.raises(NotImplementedError, match=reason):
        select_blocks(policy=policy, **args, backend="native")
    assert select_blocks(policy=policy, **args).shape == (1, 2, 16, 16)


def test_a_baseline_runs_in_torch(level: str) -> None:
    scorer = baselines.create("quest", block_size=(64, 64))
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16)
    k_blocks = scorer.compress(k, positions=torch.arange(300))
    with pytest.raises(NotImplementedError, match="Quest does not say that its scores are products"):
        select_blocks(q, k_blocks, scorer, TopK(0.3), backend="native")
    select_blocks(q, k_blocks, scorer, TopK(0.3))


def test_chosen_once_it_is_compiled(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(BY_NAME["thousand"]) | {"policy": TopK(0.3)}
    monkeypatch.setattr(native, "run", lambda **_: "native")
    assert select_blocks(**args) == "native"
    monkeypatch.setattr(choosing, "missing", lambda: "it is not compiled")
    assert select_blocks(**args).shape == (1, 2, 16, 16)
    with pytest.raises(NotImplementedError, match="native: it is not compiled"):
        select_blocks(**args, backend="native")


@torch.no_grad()
def test_opaque_to_the_compiler(level: str) -> None:
    args = arguments(BY_NAME["later-chunk"])
    plain = select_blocks(policy=TopK(0.3), **args, backend="native")

    def bits(q: Tensor) -> Tensor:
        return select_blocks(policy=TopK(0.3), **(args | {"q": q}), backend="native").bits

    compiled = torch.compile(bits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args["q"]), plain.bits)


def test_reasons_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "missing", lambda: None)
    for summaries, reasons in (
        (torch.zeros(1, 1, 4, 6), []),
        (torch.zeros(1, 1, 4, 7), ["summaries must be of an even count of numbers, got 7"]),
        (
            torch.zeros(1, 1, 4, 6).double(),
            ["it takes summaries in float32, bfloat16 and float16, not torch.float64"],
        ),
        (torch.zeros(1, 1, 4, 6, device="meta"), ["it runs on a CPU, not on meta"]),
    ):
        assert choosing.unsupported(summaries) == reasons
