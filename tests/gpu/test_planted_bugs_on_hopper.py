"""Bugs planted in the kernels for Hopper turn checks red: what a source says, and what it must not say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from seerattention import TopK, TopP
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.block_sparse_attention import hopper as attention
from seerattention.ops.block_sparse_attention.kernels import hopper_backward as columns
from seerattention.ops.cases.block_sparse_attention import Case
from seerattention.ops.cases.select_blocks import EIGHT_BITS
from seerattention.ops.cases.select_blocks import Case as Choice
from seerattention.ops.select_blocks import select_blocks
from seerattention.ops.select_blocks.kernels import choosing, scores
from seerattention.ops.summarise_blocks import hopper as summaries
from seerattention.ops.summarise_blocks import summarise_blocks
from seerattention.testing import gradients
from seerattention.testing.budget import Budget
from seerattention.testing.inputs import random_qkv, random_selection
from seerattention.testing.selections import Certain, arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

PLAIN = Case(name="plain", heads=8, kv_heads=2, queries=1000, keys=1300, head_dim=128, density=0.2)


@torch.no_grad()
def check_scores(**more: str) -> None:
    gate = {"gate_dim": None, "shares": True, **more}
    case = Choice(name="", heads=8, kv_heads=2, head_dim=128, queries=2500, keys=2900, gate=gate)
    args = arguments(case, torch.bfloat16, "cuda")
    for policy in (TopK(0.1), TopP(0.9)):
        adding = scores.HOPPER_ADDING if more else 0.0
        certain = Certain.of(policy=policy, **args, rounding=scores.HOPPER_ROUNDING, adding=adding)
        certain.check(select_blocks(policy=policy, **args, backend="hopper"))


def check_scores_of_8_bits() -> None:
    check_scores(**EIGHT_BITS)


@torch.no_grad()
def check_summaries() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4099, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    weight = torch.randn(8, 384, 64, device="cuda") / 384**0.5
    angle = torch.rand(2, 1025, 64, device="cuda") * 6
    options = {"size": 4, "pools": ("max", "min", "avg"), "rotary": (angle.cos(), angle.sin())}

    def by(backend: str) -> Callable[..., torch.Tensor]:
        return lambda x, weight: summarise_blocks(x, weight=weight, backend=backend, **options)

    budget = Budget.of(by("reference"), x, weight.bfloat16())
    budget.check(by("hopper")(x, weight.bfloat16()))


@torch.no_grad()
def check_attention() -> None:
    for heads in (8, 2):
        selection = random_selection(PLAIN, density=0.2, heads=heads, device="cuda")
        qkv = random_qkv(PLAIN, dtype=torch.bfloat16, device="cuda")
        if heads == 2:
            # Tokens before heads, as models have them.
            qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
        budget = Budget.of(
            lambda *qkv, read=selection: block_sparse_attention(*qkv, read, backend="reference"), *qkv
        )
        budget.check(block_sparse_attention(*qkv, selection, backend="hopper"))


def check_columns() -> None:
    gradients.check_gradients(gradients.by_name("hopper"), PLAIN, torch.bfloat16, "cuda")
    longest = replace(PLAIN, queries=4096, keys=4096, density=1.0, heads=2, kv_heads=1)
    gradients.check_gradients(gradients.by_name("hopper"), longest, torch.bfloat16, "cuda")


#: By kernel: the module that starts it and its name there, the check, and the bugs.
KERNELS: dict[str, tuple[ModuleType, str, Callable[[], None], dict[str, tuple[str, str]]]] = {
    "scores": (
        scores, "hopper_kernel", check_scores,
        {
            "sees the next summary": ("1, PRODUCT)) * BLOCK_Q", "1, PRODUCT)) * BLOCK_Q + BLOCK_Q"),
            "misses its last summary": ("1, PRODUCT)) * BLOCK_Q", "1, PRODUCT)) * BLOCK_Q - BLOCK_Q"),
            "the least of the places": ("gl.max(product.reshape", "gl.min(product.reshape"),
            "the last product": ("best = gl.maximum(best, _by_place(product))", "best = _by_place(product)"),
            "another head's keys": ("[head // group, 0, tile", "[head % (heads // group), 0, tile"),
            "sums leave a block out": ("block[None, :] < own", "block[None, :] + 1 < own"),
            "blocks change places": (".permute((0, 2, 1, 3)).reshape", ".permute((0, 1, 2, 3)).reshape"),
            "scores without their factor": ("best * scale + shift", "best * STEPS + shift"),
            "places of another part": ("part * PLACES + place) * E", "place) * E"),
        },
    ),
    "scores of 8 bits": (
        scores, "hopper_kernel", check_scores_of_8_bits,
        {
            "the least of two": ('_pairs("max", best', '_pairs("min", best'),
            "the last product": ('_pairs("max", best, _by_place(product))', "_by_place(product)"),
            "the second consumer's rows": ("row + 2 * ROWS, 0]", "row + ROWS, 0]"),
        },
    ),
    "choice": (
        choosing, "choose", check_scores,
        {
            "the least share, not the largest": ("max.s16x2", "min.s16x2"),
            "its own block does not count": ('+ _fast("ex2", own - highest))', "+ 0.0)"),
            "one total for all rows": ("at + i, mask=stored", "at, mask=stored"),
            "the second half first": (
                "tl.join((best << 16) >> 16, best >> 16)", "tl.join(best >> 16, (best << 16) >> 16)"
            ),
        },
    ),
    "summaries": (
        summaries, "kernel", check_summaries,
        {
            "the least, not the largest": ('_pick("max", high, number)', '_pick("min", high, number)'),
            "means of half": ("total * (1.0 / SIZE)", "total * (0.5 / SIZE)"),
            "turned the other way": ("a * cos_a - b * sin_a", "a * cos_a + b * sin_a"),
            "another text's angles": ("turn = head // heads * turn_rows", "turn = head * 0"),
            "a short block's mean": ("total / count.to(gl.float32)", "total * 0.25"),
            "a short block's first token": ("for token in range(count)", "for token in range(1, count)"),
            "another head's matrix": ("(row % heads * COUNT + number)", "(number + row * 0)"),
        },
    ),
    "attention": (
        attention, "kernel", check_attention,
        {
            "sees the next key": ("<= query[:, None], s", "<= query[:, None] + 1, s"),
            "misses its own key": ("<= query[:, None], s", "< query[:, None], s"),
            "a tile that goes alone counts twice": ("first_query, t * 64)", "first_query, 128)"),
            "the first tile of a pair twice": ("next_tile * 64, i", "tile * 64, i"),
            "the first tile's keys in both": ("(tile - column // 64)", "tile"),
            "outputs keep their old factor": ("gl.convert_layout(alpha, o_row)[:, None]", "1.0"),
            "sums keep their old factor": ("total * alpha + gl.sum", "total + gl.sum"),
            "the second head's queries": ("second_head = head + ITEM_HEADS - 1", "second_head = head"),
            "another head's list": ("head // (sizes[0] // sel_heads)", "head % sel_heads"),
            "outputs as if heads came first": ("rows.to(gl.int64) * strides[2]", "rows.to(gl.int64)"),
        },
    ),
    "columns": (
        columns, "kernel", check_columns,
        {
            "seen by the query before": ("> query[None, :], 0.0", "> query[None, :] + 1, 0.0"),
            "not seen by its own query": ("> query[None, :], 0.0", ">= query[None, :], 0.0"),
            "without deltas": ("p * (dp - delta[None, :])", "p * dp"),
            "without the factor": ("dk = dk * scale", "dk = dk * 1.0"),
            "another head's list": ("(first_head + pair // span) // SHARED", "first_head // SHARED"),
            "a part in another's place": ("+ part, -1)", "+ part * 0, -1)"),
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "LEAST_TOKENS", 0)


def plant(kernel: str, bug: tuple[str, str] | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an op start a copy of its kernel, a module or a function of one, with a bug, or without."""
    module, name, _, _ = KERNELS[kernel]
    planted = getattr(module, name)
    alone = not isinstance(planted, ModuleType)
    file = planted.fn.__code__.co_filename if alone else planted.__file__
    source = Path(file).read_text(encoding="utf-8")
    if bug is not None:
        assert bug[0] in source
        source = source.replace(*bug)
    copy = folder / f"planted_{kernel}.py"
    copy.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec is not None
    assert spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr(module, name, getattr(made, name) if alone else made)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_right_passes(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(kernel, None, tmp_path, monkeypatch)
    KERNELS[kernel][2]()


@pytest.mark.parametrize(("kernel", "bug"), [(name, bug) for name in KERNELS for bug in KERNELS[name][3]])
def test_bugs_are_noticed(kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, check, bugs = KERNELS[kernel]
    plant(kernel, bugs[bug], tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check()
