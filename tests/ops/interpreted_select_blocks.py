from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from seerattention import AttnGate, GateConfig, baselines
from seerattention.ops.select_blocks import BACKENDS, select_blocks
from seerattention.ops.select_blocks._cases import CASES, Case
from seerattention.policies import Calibrated, Calibration, Policy, Rule, Threshold, TokenBudget, TopK, TopP
from seerattention.rows import Rows
from seerattention.testing.inputs import random_qkv
from seerattention.testing.selections import Certain

pytest.importorskip("triton")

kernel = BACKENDS["triton"]
by_case = pytest.mark.parametrize("case", [c for c in CASES if not c.large], ids=lambda case: case.name)
POLICIES = [
    Threshold(0.06),
    Threshold(0.0),
    TopK(0.3),
    TopK(1.0),
    TopP(0.6),
    TopP(0.95),
    TokenBudget(192),
    TokenBudget(1),
    Threshold(0.9, sink_blocks=1, local_blocks=3),
    TopK(0.1, sink_blocks=2, dense_last_rows=2),
    TopP(0.1, local_blocks=99),
    # Of each of two heads, with the number of blocks a row sees; with its density, and without.
    Calibrated(
        Calibration("density", 0.3, 1000, (64, 64), -0.5, 0.3, {0: ((-1.0, -0.1, -0.4), (-0.2, -0.3, -0.5))}),
        sink_blocks=1,
    ).at(0, None),
    Calibrated(
        Calibration("recall", 0.9, 1000, (64, 64), 0.0, None, {0: ((-3.0, 0.0, 0.0), (-2.0, 0.0, 0.0))})
    ).at(0, 40),
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and chunks at the sizes that an interpreter computes."""
    small = {"ROWS": 16, "COLUMNS": 16, "RESIDENT": 2, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernel, "LAUNCH", {"narrow": small, "wide": small})
    monkeypatch.setattr(kernel, "SCORE_BYTES", 4 * 2 * 16 * 32)
    return


def gate_of(case: Case) -> AttnGate:
    torch.manual_seed(1)
    config = GateConfig.published(**case.design) if case.published else GateConfig(**case.design)
    gate = AttnGate(config)
    for p in gate.parameters():
        # Scores of a few units, so that rows are neither uniform nor a single block.
        p.data.mul_(2 if not case.published else 60)
    return gate


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    q, k, _ = random_qkv(case, dtype=dtype)
    gate = gate_of(case).to(dtype)
    positions = torch.arange(case.keys)
    with torch.no_grad():
        k_blocks = gate.compress(k, positions=positions)
    return {
        "q": q,
        "k_blocks": k_blocks,
        "scorer": gate,
        "positions": positions[case.keys - case.queries :],
        "rows": Rows.last(case.queries, case.keys),
    }


def check(case: Case, policy: Policy, dtype: torch.dtype = torch.float32) -> None:
    args = arguments(case, dtype)
    certain = Certain.of(policy=policy, **args)
    # A check that decides hardly anything would pass whatever happens.
    assert certain.share > 0.98
    for backend in ("reference", "composed", "triton"):
        selection = select_blocks(policy=policy, **args, backend=backend)
        certain.check(selection)
        assert selection.block_size == case.block_size


@by_case
@torch.no_grad()
def test_kernel_chooses_as_the_reference(case: Case) -> None:
    # What the other rules take from a row of scores has nothing to do with where the scores come from.
    check(case, TopK(0.3))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_policies_and_knobs(policy: Policy) -> None:
    check(next(c for c in CASES if c.name == "no-sub-blocks"), policy)


@torch.no_grad()
def test_half_precision() -> None:
    check(next(c for c in CASES if c.name == "later-chunk"), TopK(0.3), torch.float16)


# --- exact scores: ties are decided alike ---------------------------------------------------------------


@dataclass
class Given:
    """Takes vectors of integers as summaries, so that every backend's scores are exact."""

    block_size: tuple[int, int] = (4, 4)
    sub_blocks: tuple[int, int] | None = (1, 1)
    scale: float = 1.0
    after_rope: ClassVar[bool] = True
    tokens_per_summary: ClassVar[int] = 4

    def compress(self, k: Tensor, *, positions: Tensor) -> Tensor:
        return k[:, :, ::4].contiguous()

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        return q[:, :, ::4]

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        return self.summarise_queries(q, positions=positions) @ k_blocks.mT


@pytest.mark.parametrize(
    ("policy", "levels"),
    [(TopK(0.1), 1), (TopK(0.5), 3), (TokenBudget(20), 3), (TokenBudget(4), 1), (Threshold(0.2), 3)],
    ids=str,
)
def test_ties_go_to_the_lower_block(policy: Policy, levels: int) -> None:
    scorer = Given()
    q = torch.zeros(1, 2, 60, 16)
    q[..., 0] = 1
    q[:, 1, :, 0] = -1
    k = torch.zeros(1, 2, 60, 16)
    k[..., 0] = torch.randint(0, levels, (1, 2, 60)) - levels // 2
    args = {
        "k_blocks": scorer.compress(k, positions=torch.arange(60)),
    }
    masks = [
        select_blocks(q, scorer=scorer, policy=policy, **args, backend=name).to_mask()
        for name in ("reference", "composed", "triton")
    ]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("mass", [0.3, 0.5, 0.8, 1.0])
def test_mass_of_ties(mass: float) -> None:
    # Four blocks of equal share 1/4, a power of two: exact in every order.
    scorer = Given()
    q, k = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    args: dict[str, Any] = {}
    args["k_blocks"] = scorer.compress(k, positions=torch.arange(16))
    taken = select_blocks(q, scorer=scorer, policy=TopP(mass), **args, backend="triton").to_mask()
    assert taken[0, 0, 3, :3].tolist() == [j / 4 < mass for j in range(3)]


def test_extreme_scores() -> None:
    scorer = Given(block_size=(4, 4))
    q, k = torch.ones(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
    k[0, 0, ::4, 0] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, 3e38, -3e38] * 2)
    args: dict[str, Any] = {}
    args["k_blocks"] = scorer.compress(k, positions=torch.arange(64))
    for policy in (TopK(0.2), TopK(0.4), TokenBudget(24)):
        masks = [
            select_blocks(q, scorer=scorer, policy=policy, **args, backend=name).to_mask()
            for name in ("reference", "composed", "triton")
        ]
        assert torch.equal(masks[0], masks[1]), policy
        assert torch.equal(masks[0], masks[2]), policy


# --- what the kernel cannot do -------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(Policy):
    """A user's own, without a rule."""

    name: ClassVar[str] = "odd"
    value: float = 0

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        return (torch.arange(scores.shape[-1]) % 2 == 1).expand_as(scores)


@dataclass(frozen=True)
class Reversed(TopK):
    """Changes how a policy with a rule chooses."""

    name: ClassVar[str] = "reversed"

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        return super().choose(-scores, valid, block_tokens)


@pytest.mark.parametrize("policy", [Odd(), Reversed(0.3)], ids=str)
def test_a_policy_without_a_rule_runs_in_torch(policy: Policy) -> None:
    args = arguments(CASES[4])
    with pytest.raises(NotImplementedError, match=f"the policy {policy.name} gives no rule"):
        select_blocks(policy=policy, **args, backend="triton")
    plain = select_blocks(policy=policy, **args, backend="reference").to_mask()
    assert torch.equal(select_blocks(policy=policy, **args).to_mask(), plain)


def test_rules_by_example() -> None:
    assert Threshold(0.1).rule(100, 64) == Rule("share", 0.1)
    assert TopK(0.75).rule(100, 64) == Rule("count", 50)
    assert TopP(0.9).rule(100, 64) == Rule("mass", 0.9)
    assert TokenBudget(100).rule(100, 64) == Rule("count", 1)
    assert Calibrated(POLICIES[-1].calibration).rule(100, 64) is None  # type: ignore[attr-defined]


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
        ({"k_blocks": torch.zeros(1, 1, 63, 16).double()}, "float16, bfloat16 or float32, not torch.float64"),
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
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        select_blocks(**args, backend="triton")
    monkeypatch.setattr(kernel, "triton", None)
    with pytest.raises(NotImplementedError, match="the package triton is not installed"):
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
    for widths, scores, tile in (
        ([*range(1, 513)], 32 * 512, 64),
        ([*range(1, 2049)], 262144, 64),
        ([500] * 7, 60, 16),
        ([1], 1, 64),
    ):
        chunks = list(kernel._chunks(widths, scores, tile))
        rows = [row for start, stop in reversed(chunks) for row in range(start, stop)]
        assert rows == list(range(len(widths)))
        for start, stop in chunks:
            assert stop - start == 1 or (stop - start) * kernel._padded(widths[stop - 1]) <= scores


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
