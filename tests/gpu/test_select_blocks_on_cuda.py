"""Summaries and selections on a CUDA device: precision, memory, no waiting, compilation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seerattention import Threshold, TokenBudget, TopK, TopP
from seerattention.ops import score_blocks as score_op
from seerattention.ops import select_blocks as select_op
from seerattention.ops import summarise_blocks as summarise_op
from seerattention.ops.cases import summarise_blocks as summaries
from seerattention.ops.cases.select_blocks import CASES, EIGHT, SIXTEEN, Case
from seerattention.ops.launch import Launch
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.select_blocks.kernels import choosing as kernel
from seerattention.ops.select_blocks.kernels import scores
from seerattention.ops.summarise_blocks import summarise_blocks
from seerattention.policies import Calibrated, Calibration, Policy
from seerattention.rows import Rows
from seerattention.testing import selections
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv
from seerattention.testing.selections import Certain
from seerattention.testing.waiting import no_waiting

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def middling(name: str, queries: int, keys: int | None = None, **options: Any) -> Case:
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 128} | options
    return Case(name=name, queries=queries, keys=keys or queries, **sizes)


MIDDLING = [
    middling("published-8k", 8192, published=True),
    middling("sixteen-8k", 8192, gate=SIXTEEN),
    middling("eight-8k", 8192, gate=EIGHT),
    middling("eight-later-chunk", 1000, 9000, batch=2, gate=EIGHT),
    middling("two-parts", 5000, head_dim=64, gate={**SIXTEEN, "gate_dim": 48}),
    middling("products", 6000, gate={"gate_dim": None}),
    middling("default", 6000, gate={"gate_dim": None, "shares": True}),
    middling("shares-eight-later-chunk", 1000, 9000, batch=2, gate={**EIGHT, "shares": True}),
    middling("shares-two-parts", 2000, head_dim=64, gate={"gate_dim": 48, "shares": True}),
    middling("wide-heads", 3000, head_dim=256, gate=SIXTEEN),
    middling("normed", 5000, gate={**SIXTEEN, "qk_norm": True}),
    middling("group-scores", 5000, gate={**SIXTEEN, "per_kv_head": True}),
    middling(
        "packed",
        5103,
        7104,
        lengths=((1, 1), (63, 63), (64, 64), (65, 65), (3000, 3000), (1000, 3001), (910, 910)),
        gate=SIXTEEN,
    ),
    middling(
        "packed-shares",
        4065,
        6066,
        lengths=((1, 1), (64, 64), (3000, 3000), (1000, 3001)),
        gate={**SIXTEEN, "shares": True},
    ),
    middling("block-128", 8192, block_size=(128, 128), gate={"q_sub_block": 32, "k_sub_block": 16}),
]
POLICIES = [Threshold(1e-2), TopK(0.1, sink_blocks=1), TopP(0.5), TokenBudget(1024, dense_last_rows=2)]


def arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return selections.arguments(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", summaries.CASES, ids=lambda case: case.name)
def test_summaries_within_the_error_budget(case: summaries.Case, dtype: torch.dtype) -> None:
    given = _cpu_inputs()(case, dtype, "cuda")
    names = [n for n in ("x", "weight", "norm") if given[n] is not None]

    def reference(*tensors: torch.Tensor) -> torch.Tensor:
        called = given | dict(zip(names, tensors, strict=True))
        return summarise_blocks(called.pop("x"), case.size, case.pools, **called, backend="reference")

    budget = Budget.of(reference, *(given[n] for n in names))
    budget.check(summarise_blocks(given.pop("x"), case.size, case.pools, **given, backend="triton"))


def _cpu_inputs() -> Any:
    """The inputs of the CPU's test of the same op."""
    path = Path(__file__).parents[1] / "ops" / "summarise_blocks" / "interpreted_triton.py"
    spec = importlib.util.spec_from_file_location("summarise_inputs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in CASES if not c.large] + MIDDLING, ids=lambda case: case.name)
def test_chooses_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    if case.head_dim == 256 and dtype == torch.float32:
        pytest.skip("the kernel takes summaries of up to 512 bytes")
    args = arguments(case, dtype)
    for policy in POLICIES:
        certain = Certain.of(policy=policy, **args)
        assert certain.share > 0.98
        certain.check(select_blocks(policy=policy, **args, backend="triton"))
        certain.check(select_blocks(policy=policy, **args, backend="reference"))


@pytest.mark.parametrize("name", ["published-32k", "sixteen-32k", "eight-32k", "default-32k"])
def test_the_sizes_that_are_benchmarked(name: str) -> None:
    args = arguments(next(c for c in CASES if c.name == name), torch.bfloat16)
    for policy in (Threshold(5e-4), TopK(0.1)):
        on_hopper = not select_op.BACKENDS["hopper"].unsupported(policy=policy, **args)
        rounding = scores.HOPPER_ROUNDING if on_hopper else 0.0
        Certain.of(policy=policy, **args, rounding=rounding).check(select_blocks(policy=policy, **args))


def test_the_gate_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (select_op, summarise_op):
        monkeypatch.setattr(op.BACKENDS["reference"], "run", None)
    monkeypatch.setattr(select_op.BACKENDS["composed"], "run", None)
    args = arguments(MIDDLING[0], torch.bfloat16)
    select_blocks(policy=TopK(0.1), **args)


class Own(Threshold):
    """A user's own policy, without a rule; like a share, its choice does not ask what is read anyway."""

    def choose(self, scores: torch.Tensor, valid: torch.Tensor, block_tokens: int) -> torch.Tensor:
        return super().choose(scores, valid, block_tokens)


@pytest.mark.parametrize("name", ["sixteen-8k", "packed"])
def test_a_policy_without_a_rule_takes_the_kernels_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in (select_op, summarise_op, score_op):
        monkeypatch.setattr(op.BACKENDS["reference"], "run", None)
    monkeypatch.setattr(score_op.BACKENDS["chunked"], "run", None)
    args = arguments(next(c for c in MIDDLING if c.name == name), torch.bfloat16)
    Certain.of(policy=Threshold(1e-2), **args).check(select_blocks(policy=Own(1e-2), **args))


@pytest.mark.parametrize("name", ["published-32k", "sixteen-32k", "eight-128k", "sixteen-128k"])
def test_memory_is_bounded(name: str) -> None:
    args = arguments(next(c for c in CASES if c.name == name), torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selection = select_blocks(policy=TopK(0.1), **args)
    extra = torch.cuda.max_memory_allocated() - before - selection.nbytes
    assert extra <= 100e6


@pytest.mark.parametrize("row_exponent", [0.0, -0.5])
def test_limits_of_each_head(row_exponent: float) -> None:
    case = next(c for c in MIDDLING if c.name == "eight-8k")
    laws = {0: tuple((-1.0 - h / 2, 0.0, 0.0) for h in range(case.heads))}
    made = Calibration("recall", 0.9, 8192, case.block_size, row_exponent, None, laws)
    policy = Calibrated(made, sink_blocks=1).at(0)
    args = arguments(case, torch.bfloat16)
    certain = Certain.of(policy=policy, **args)
    assert certain.share > 0.98
    # Its limits are on the device since the first call.
    select_blocks(policy=policy, **args, backend="triton")
    torch.cuda.synchronize()
    with no_waiting():
        selection = select_blocks(policy=policy, **args, backend="triton")
    certain.check(selection)


@pytest.mark.parametrize("name", ["sixteen-8k", "packed"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_host_is_not_waited_for(policy: Policy, name: str) -> None:
    case = next(c for c in MIDDLING if c.name == name)
    args = arguments(case, torch.bfloat16)
    select_blocks(policy=policy, **args)
    torch.cuda.synchronize()
    with no_waiting():
        if case.lengths:
            # What kernels read of it is made anew.
            args["rows"] = Rows.packed(case.lengths, "cuda")
        select_blocks(policy=policy, **args)


@pytest.mark.parametrize("case", MIDDLING[:3], ids=lambda case: case.name)
def test_compiles_as_one_graph(case: Case) -> None:
    args = arguments(case, torch.bfloat16)

    def bits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        gate = args["scorer"]
        blocks = gate.compress(k, positions=torch.arange(case.keys, device="cuda"))
        return select_blocks(policy=TopK(0.1), **(args | {"q": q, "k_blocks": blocks})).bits

    _, k, _ = random_qkv(case, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(bits, fullgraph=True)(args["q"], k)
    blocks = args["scorer"].compress(k, positions=torch.arange(case.keys, device="cuda"))
    # The compiler makes its own sines, so the summaries may differ by rounding: check, not compare.
    different = compiled != select_blocks(policy=TopK(0.1), **(args | {"k_blocks": blocks})).bits
    assert float(different.float().mean()) < 0.01


def test_packed_sequences_choose_as_alone_in_as_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(next(c for c in MIDDLING if c.name == "packed"), torch.bfloat16)
    launches = []
    for room, name in ((scores, "score"), (kernel, "choose")):
        monkeypatch.setattr(room, name, _Counted(getattr(room, name), launches))
    for policy in POLICIES:
        launches.clear()
        together = select_blocks(policy=policy, **args)
        assert len(launches) == 2
        row = 0
        for _, own in selections.alone(args):
            mask = select_blocks(policy=policy, **own).to_mask()
            down = slice(row, row + mask.shape[2])
            assert torch.equal(together.to_mask()[:, :, down, : mask.shape[3]], mask)
            row = down.stop


class _Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(grid)
        return self.kernel[grid]


def test_tiles_and_chunks_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(MIDDLING[1], torch.bfloat16)
    certain = Certain.of(policy=TopK(0.1), **args)
    for rows, columns, warps, held, size in (
        (64, 128, 4, 2**15, 2**18),
        (128, 256, 8, 2**16, 1),
        (64, 32, 4, 2**12, 2**22),
    ):
        monkeypatch.setitem(scores.LAUNCHES, "narrow", Launch(rows, columns, warps, 2))
        monkeypatch.setattr(scores, "HELD_BYTES", held)
        monkeypatch.setattr(kernel, "SCORE_BYTES", size)
        monkeypatch.setattr(kernel, "SUMMARY_BYTES", 4 * size)
        certain.check(select_blocks(policy=TopK(0.1), **args))


def test_a_long_row() -> None:
    # 16 blocks of 64 tokens of queries at the end of a million tokens.
    case = middling(
        "million", 1024, 2**20, gate={"q_sub_block": None, "k_sub_block": None}, heads=2, kv_heads=1
    )
    args = arguments(case, torch.bfloat16)
    for policy in (TopK(0.02), TopP(0.5), Threshold(1e-4)):
        Certain.of(policy=policy, **args).check(select_blocks(policy=policy, **args))


def test_more_heads_than_16_bits_of_grid() -> None:
    case = middling("batch", 64, batch=8193, heads=8, kv_heads=8, head_dim=16)
    args = arguments(case, torch.bfloat16)
    certain = Certain.of(policy=TopK(0.1), **args)
    certain.check(select_blocks(policy=TopK(0.1), **args))
