from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention import BlockSelection, block_sparse_attention, pooled_attention
from seerattention.ops import block_sparse_attention as attention_op
from seerattention.ops import dispatch
from seerattention.ops import pooled_attention as pooled_op
from seerattention.ops.cases.block_sparse_attention import CASES
from seerattention.ops.shapes import Shape
from seerattention.rows import Rows
from seerattention.testing import conformance
from seerattention.testing.inputs import random_qkv

SHAPE = Shape(name="", heads=4, kv_heads=2, queries=100, keys=100, head_dim=16)
FULL = BlockSelection.full(Rows.last(100, 100), (64, 64))


def test_backends_are_the_files_of_the_folder() -> None:
    assert set(attention_op.BACKENDS) >= {"reference", "gather", "flex"}
    assert set(pooled_op.BACKENDS) >= {"reference", "chunked"}
    for op in (attention_op, pooled_op):
        assert not any(name.startswith("_") for name in op.BACKENDS)
        assert set(op.ORDER) <= set(op.BACKENDS)
        assert "reference" not in op.ORDER


def test_a_new_backend_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Path(attention_op.__file__).parent / "gather.py").read_text(encoding="utf-8")
    (tmp_path / "added.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(attention_op, "__path__", [*attention_op.__path__, str(tmp_path)])
    backends = dispatch.load_backends(attention_op.__name__, attention_op.__path__)
    assert set(backends) == {*attention_op.BACKENDS, "added"}
    assert backends["added"].__file__ == str(tmp_path / "added.py")
    monkeypatch.setattr(attention_op, "BACKENDS", backends)
    out = block_sparse_attention(Q, K, V, FULL, backend="added")
    assert torch.equal(out, block_sparse_attention(Q, K, V, FULL, backend="gather"))
    conformance.check_attention(backends["added"], next(c for c in CASES if c.name == "later-chunk"))


def fake(*reasons: str) -> Any:
    return SimpleNamespace(unsupported=lambda **_: list(reasons))


def test_auto_takes_the_first_that_can() -> None:
    backends = {"slow": fake(), "picky": fake("not today"), "fast": fake()}
    order = ("picky", "fast", "slow")
    assert dispatch.choose(backends, order, "auto") is backends["fast"]
    assert dispatch.choose(backends, order, "slow") is backends["slow"]
    assert dispatch.explain(backends) == {"slow": [], "picky": ["not today"], "fast": []}


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {"triton": fake(), "slow": fake()}
    assert dispatch.choose(backends, ("triton", "slow"), "auto") is backends["triton"]
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert dispatch.choose(backends, ("triton", "slow"), "auto") is backends["slow"]
    assert dispatch.choose(backends, ("triton", "slow"), "triton") is backends["triton"]


def test_a_named_backend_never_falls_back() -> None:
    backends = {"picky": fake("not today", "nor tomorrow"), "able": fake()}
    with pytest.raises(NotImplementedError, match="picky: not today; nor tomorrow") as error:
        dispatch.choose(backends, ("picky", "able"), "picky", q=torch.zeros(1, 2), selection=FULL, n=3)
    assert "able" not in str(error.value)
    assert r"q: [1, 2] torch.float32 on cpu" in str(error.value)
    assert "selection: (1, 1, 2, 2) blocks of (64, 64)" in str(error.value)
    assert "n: 3" in str(error.value)


def test_auto_tells_all_reasons() -> None:
    backends = {"a": fake("too old"), "b": fake("too new"), "outside": fake()}
    with pytest.raises(NotImplementedError, match=r"(?s)a: too old.*b: too new"):
        dispatch.choose(backends, ("a", "b"), "auto")


def test_unknown_backend() -> None:
    q, k, v = random_qkv(SHAPE)
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'; there are auto, .*gather, .*reference"):
        block_sparse_attention(q, k, v, FULL, backend="cuda")
    with pytest.raises(
        ValueError, match="unknown backend ''; there are auto, chunked, hopper, reference, triton"
    ):
        pooled_attention(q, k, v, (64, 64), backend="")


def attention(q: Tensor, k: Tensor, v: Tensor) -> object:
    return block_sparse_attention(q, k, v, FULL)


def pooled(q: Tensor, k: Tensor, v: Tensor) -> object:
    return pooled_attention(q, k, v, (64, 64))


Q, K, V = random_qkv(SHAPE)


@pytest.mark.parametrize("op", [attention, pooled])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((Q[0], K, V), ValueError, r"q must be \[B, H, T, D\], .*, got \[4, 100, 16\]"),
        ((Q, K, V[None]), ValueError, r"v must be \[B, H, T, D\]"),
        ((Q, K.half(), V), TypeError, "share one floating-point dtype, got .* k torch.float16"),
        ((Q.bfloat16(), K, V), TypeError, "got q torch.bfloat16, k torch.float32"),
        ((Q.long(), K.long(), V.long()), TypeError, "floating-point dtype, got q torch.int64"),
        ((Q, K.to("meta"), V), ValueError, "on one device, got q on cpu, k on meta, v on cpu"),
        ((Q, K, V.to("meta")), ValueError, "on one device"),
        ((Q, K, V[:, :, :50]), ValueError, r"k and v must have one shape, got .* and \[1, 2, 50, 16\]"),
        ((Q, K, V[:, :1]), ValueError, "k and v must have one shape"),
        ((Q.repeat(2, 1, 1, 1), K, V), ValueError, "must agree in batch and head dimension"),
        ((Q[..., :8], K, V), ValueError, "must agree in batch and head dimension"),
        ((Q[:, :3], K, V), ValueError, "multiple of KV heads, got 3 and 2"),
        ((Q, K[:, :0], V[:, :0]), ValueError, r"k must be .* at least 1, got \[1, 0, 100, 16\]"),
        ((Q[:, :0], K, V), ValueError, r"q must be .* at least 1, got \[1, 0, 100, 16\]"),
        ((Q[..., :0], K[..., :0], V[..., :0]), ValueError, r"q must be .* at least 1, got .* 100, 0\]"),
        ((Q, K[:, :, :50], V[:, :, :50]), ValueError, "1 <= Tq <= Tk, got Tq=100 and Tk=50"),
        ((Q[:, :, :0], K, V), ValueError, "1 <= Tq <= Tk, got Tq=0"),
    ],
)
def test_inputs_that_do_not_fit(
    op: Callable[..., object], inputs: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(*inputs)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            BlockSelection.full(Rows.last(200, 200), (64, 64)),
            r"has 4 x 4 blocks .* 100 queries and 100 keys make 2 x 2",
        ),
        (BlockSelection.from_mask(torch.ones(1, 1, 4, 2).bool(), (64, 64)), "has 4 x 2 blocks"),
        (
            BlockSelection.from_mask(FULL.to_mask().expand(3, 1, 2, 2), (64, 64)),
            "the selection is for a batch of 3, q has 1",
        ),
        (
            BlockSelection.from_mask(FULL.to_mask().expand(1, 3, 2, 2), (64, 64)),
            r"has 3 heads; it must have 1, 2 \(KV heads\) or 4 \(query heads\)",
        ),
        (
            BlockSelection(FULL.bits.to("meta"), FULL.shape, FULL.block_size),
            "the selection is on meta, q on cpu",
        ),
    ],
)
def test_selections_that_do_not_fit(selection: BlockSelection, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(Q, K, V, selection)


PACKED = Rows.packed([(40, 40), (60, 60)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0; None switches it off"),
        ({"sinks": torch.zeros(3)}, ValueError, r"a logit per query head \[4\], got \[3\]"),
        ({"sinks": torch.zeros(4).long()}, TypeError, "sinks must be floating point, got torch.int64"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks are on meta, q on cpu"),
        (
            {"rows": Rows.last(50, 100)},
            ValueError,
            "of 50 queries and 100 keys, but q has 100 tokens and k 100",
        ),
        (
            {"rows": Rows.at(1, 100)},
            ValueError,
            "of 100 queries and 101 keys, but q has 100 tokens and k 100",
        ),
        ({"rows": Rows.packed([(100, 100)], "meta")}, ValueError, "rows are on meta, q on cpu"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_sparse_attention(Q, K, V, FULL, **options)


def test_packed_selections_that_do_not_fit() -> None:
    unread = Rows.from_starts(PACKED.starts_q, PACKED.starts_k, 100, 100)
    for rows, message in (
        (PACKED, "100 queries and 100 keys make 2 x 1"),
        (unread, "which 2 sequences of 100 queries and 100 keys cannot make"),
    ):
        packed: dict[str, Any] = {"rows": rows, "backend": "reference"}
        for shape in ((1, 1, 4, 1), (1, 1, 1, 1), (1, 1, 2, 3)):
            selection = BlockSelection.from_mask(torch.ones(shape, dtype=torch.bool), (64, 64))
            with pytest.raises(ValueError, match=message):
                block_sparse_attention(Q, K, V, selection, **packed)
        selection = BlockSelection.from_mask(torch.ones(1, 1, 2, 1, dtype=torch.bool), (64, 64))
        assert block_sparse_attention(Q, K, V, selection, **packed).shape == Q.shape
        twice = [x.repeat(2, 1, 1, 1) for x in (Q, K, V)]
        with pytest.raises(ValueError, match="packed sequences are one batch entry, q has 2"):
            block_sparse_attention(*twice, selection, **packed)
        with pytest.raises(NotImplementedError, match="flex: it takes no packed sequences") as raised:
            block_sparse_attention(Q, K, V, selection, rows=rows, backend="flex")
        assert "rows=100 of 100 tokens of 2 packed sequences" in str(raised.value)
