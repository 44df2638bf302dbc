"""What every backend of `select_blocks` must choose, alike but for blocks within rounding of a limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattention.ops.cases.select_blocks import Case
from seerattention.ops.select_blocks import select_blocks
from seerattention.policies import Calibrated, Calibration, Policy, Threshold, TokenBudget, TopK, TopP
from seerattention.rows import Rows
from seerattention.testing.selections import Certain, alone, arguments

#: Every rule, with knobs and without.
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
    TopK(0.05, sink_blocks=2, local_blocks=3),
    TokenBudget(320, sink_blocks=2, local_blocks=2),
    TokenBudget(320, local_blocks=99),
    TopP(0.1, local_blocks=99),
    # Of each of two heads, with the number of blocks a row sees; with its density, and without.
    Calibrated(
        Calibration("density", 0.3, 1000, (64, 64), -0.5, 0.3, {0: ((-1.0, -0.1, -0.4), (-0.2, -0.3, -0.5))}),
        sink_blocks=1,
    ).at(0),
    Calibrated(
        Calibration("recall", 0.9, 1000, (64, 64), 0.0, None, {0: ((-3.0, 0.0, 0.0), (-2.0, 0.0, 0.0))})
    )
    .at(0)
    .for_prompt(40, 64, rows_after=0),
]


#: Policies to be tried on scores that tie, and how many different scores there are.
TIED: list[tuple[Policy, int]] = [
    (TopK(0.1), 1),
    (TopK(0.5), 3),
    (TokenBudget(20), 3),
    (TokenBudget(4), 1),
    (Threshold(0.2), 3),
    (TokenBudget(20, sink_blocks=1), 3),
    (TokenBudget(24, sink_blocks=2, local_blocks=2), 1),
    (TokenBudget(12, sink_blocks=2, local_blocks=3), 3),
    (TopK(0.5, sink_blocks=1, local_blocks=2, dense_last_rows=2), 3),
]


@torch.no_grad()
def check_choice(case: Case, policy: Policy, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Check what a backend, and the reference, choose for a gate's scores.

    Raises:
        AssertionError: If one chooses other than rounding could explain.
    """
    args = arguments(case, dtype)
    certain = Certain.of(policy=policy, **args)
    # A check that decides hardly anything would pass whatever happens.
    assert certain.share > 0.98
    for name in ("reference", "composed", backend):
        selection = select_blocks(policy=policy, **args, backend=name)
        certain.check(selection)
        selection.check(args["rows"])
        assert selection.block_size == case.block_size


@torch.no_grad()
def check_packed_choice(case: Case, policy: Policy, backend: str) -> None:
    """Check that packed sequences choose as each does alone, to the bit.

    Raises:
        AssertionError: If one does not.
    """
    args = arguments(case)
    together = select_blocks(policy=policy, **args, backend=backend)
    masks = [select_blocks(policy=policy, **own, backend=backend).to_mask() for _, own in alone(args)]
    masks = [F.pad(m, (0, together.shape[3] - m.shape[3])) for m in masks]
    assert torch.equal(together.to_mask(), torch.cat(masks, 2))


@torch.no_grad()
def check_unread(case: Case, backend: str) -> None:
    """Check that other packed sequences, and what shorter ones leave, are not read.

    Raises:
        AssertionError: If NaN there changes what one chooses.
    """
    args = arguments(case)
    whole = select_blocks(policy=TopK(0.3), **args, backend=backend).bits
    q, k_blocks, rows = args["q"].clone(), args["k_blocks"].clone(), args["rows"]
    read, own = 5, torch.zeros(len(k_blocks), k_blocks.shape[2], dtype=torch.bool)
    own[read, : -(-rows.lengths[read][1] // args["scorer"].tokens_per_summary)] = True
    k_blocks.masked_fill_(~own[:, None, :, None], torch.nan)
    one, (down, _) = next(x for x in rows.maps(args["scorer"].block_size) if x[0].index == read)
    q[:, :, : one.queries.start] = q[:, :, one.queries.stop :] = torch.nan
    poisoned = select_blocks(policy=TopK(0.3), **args | {"q": q, "k_blocks": k_blocks}, backend=backend).bits
    assert torch.equal(whole[:, :, down], poisoned[:, :, down])


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
        """Take a key of every block."""
        return k[:, :, ::4].contiguous()

    def summarise_queries(self, q: Tensor, *, positions: Tensor, rows: Rows | None = None) -> Tensor:
        """Take the first query of every block."""
        return q[:, :, :: self.block_size[0]]

    def score(self, q: Tensor, k_blocks: Tensor, *, positions: Tensor, valid: Tensor) -> Tensor:
        """Multiply them."""
        return self.summarise_queries(q, positions=positions) @ k_blocks.mT


def both(scorer: Any, q: Tensor, k: Tensor, policy: Policy, backend: str) -> list[Tensor]:
    """Masks of the reference and of a backend; the queries are the last tokens."""
    args: dict[str, Any] = {
        "k_blocks": scorer.compress(k, positions=torch.arange(k.shape[2])),
        "rows": Rows.last(q.shape[2], k.shape[2]),
    }
    plain, composed, kernels = (
        select_blocks(q, scorer=scorer, policy=policy, **args, backend=name).to_mask()
        for name in ("reference", "composed", backend)
    )
    assert torch.equal(plain, composed)
    return [plain, kernels]


def check_ties(policy: Policy, levels: int, backend: str) -> None:
    """Check that of equal scores the lower block is taken.

    Raises:
        AssertionError: If it is not.
    """
    q = torch.zeros(1, 2, 60, 16)
    q[..., 0] = 1
    q[:, 1, :, 0] = -1
    k = torch.zeros(1, 2, 60, 16)
    k[..., 0] = torch.randint(0, levels, (1, 2, 60)) - levels // 2
    assert torch.equal(*both(Given(), q, k, policy, backend))


def check_count(queries: int, block_q: int, count: int, knobs: tuple[int, int, int], backend: str) -> None:
    """Check short rows, more read anyway than counted, and query blocks that span several KV blocks.

    Raises:
        AssertionError: If other than ``count`` blocks are read, or what is read anyway is not.
    """
    scorer = Given(block_size=(block_q, 4))
    q, k = torch.ones(1, 1, queries, 16), torch.zeros(1, 1, 60, 16)
    k[..., 0] = torch.randint(0, 4, (1, 1, 60))
    sinks, local, dense = knobs
    policy = TokenBudget(4 * count, sink_blocks=sinks, local_blocks=local, dense_last_rows=dense)
    masks = both(scorer, q, k, policy, backend)
    assert torch.equal(*masks)
    for row, mask in enumerate(masks[0][0, 0]):
        first = 60 - queries + row * block_q
        last = min(first + block_q, 60) - 1
        seen = set(range(last // 4 + 1))
        forced = {*range(sinks), *range(max(0, first // 4 - local + 1), last // 4 + 1)} & seen
        if row >= len(masks[0][0, 0]) - dense:
            forced = seen
        read = set(mask.nonzero()[:, 0].tolist())
        assert forced <= read <= seen
        assert len(read) == max(len(forced), min(count, len(seen)))


def check_mass_of_ties(mass: float, backend: str) -> None:
    """Check how many of equal blocks a mass takes.

    Raises:
        AssertionError: If they are more or fewer.
    """
    # Four blocks of equal share 1/4, a power of two: exact in every order.
    scorer: Any = Given()
    q, k = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    args: dict[str, Any] = {}
    args["k_blocks"] = scorer.compress(k, positions=torch.arange(16))
    taken = select_blocks(q, scorer=scorer, policy=TopP(mass), **args, backend=backend).to_mask()
    assert taken[0, 0, 3, :3].tolist() == [j / 4 < mass for j in range(3)]


def check_extremes(backend: str) -> None:
    """Check scores at the ends of what fp32 holds.

    Raises:
        AssertionError: If they are not ranked as numbers are.
    """
    scorer = Given(block_size=(4, 4))
    q, k = torch.ones(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
    k[0, 0, ::4, 0] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, 3e38, -3e38] * 2)
    for policy in (TopK(0.2), TopK(0.4), TokenBudget(24)):
        assert torch.equal(*both(scorer, q, k, policy, backend)), policy


# --- policies that are not their rules -------------------------------------------------------------------


@dataclass(frozen=True)
class Odd(Policy):
    """A user's own, without a rule."""

    name: ClassVar[str] = "odd"
    value: float = 0

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Take every second block."""
        return (torch.arange(scores.shape[-1]) % 2 == 1).expand_as(scores)


@dataclass(frozen=True)
class Reversed(TopK):
    """Changes how a policy with a rule chooses."""

    name: ClassVar[str] = "reversed"

    def choose(self, scores: Tensor, valid: Tensor, block_tokens: int) -> Tensor:
        """Take the worst blocks."""
        return super().choose(-scores, valid, block_tokens)


@dataclass(frozen=True)
class SecondToo(TopK):
    """Changes what is always read."""

    name: ClassVar[str] = "second_too"

    def always(self, own: Tensor, valid: Tensor) -> Tensor:
        """Read the second block too."""
        second = torch.arange(own.shape[1], device=own.device) == 1
        return super().always(own, valid) | (second & valid)


#: Policies of a user that are not their rules, and why no kernel runs them.
RULELESS: list[tuple[Policy, str]] = [
    (Odd(), "the policy odd gives no rule"),
    (Reversed(0.3), "the policy reversed gives no rule"),
    (SecondToo(0.3), "the policy second_too always reads blocks of its own"),
]
