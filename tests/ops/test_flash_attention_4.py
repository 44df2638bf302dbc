"""FlashAttention-4 is asked for what the contract of dense attention says; its kernels are tests of GPUs."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seerattention.ops import dense_attention as dense
from seerattention.ops import flash_attention_4

LENGTH = 40


def as_documented(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool
) -> tuple[Tensor, None]:
    """Compute what flash-attn-4 4.0.0b36 says of its function: tokens before heads."""
    assert causal
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * softmax_scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2).float(), None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 as its documentation has it, on this device."""
    monkeypatch.setattr(flash_attention_4, "_function", lambda: as_documented)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


def test_it_is_asked_for_the_same_attention(installed: None) -> None:
    q = torch.randn(2, 4, LENGTH, 16)
    k, v = torch.randn(2, 2, 2, LENGTH, 16)
    expected = dense.dense_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(flash_attention_4.attend(q, k, v, scale=0.3), expected)


def test_long_attention_on_a_gpu_asks_it_first(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16)
    expected = dense.dense_attention(q, k, v, scale=0.3)
    asked: list[Tensor] = []
    monkeypatch.setattr(flash_attention_4, "pays", lambda *_: True)
    monkeypatch.setattr(flash_attention_4, "unsupported", lambda *given: asked.extend(given))
    torch.testing.assert_close(dense.dense_attention(q, k, v, scale=0.3), expected)
    assert [x.data_ptr() for x in asked] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize(
    "options", [{"window": 5}, {"softcap": 3.0}, {"sinks": torch.ones(2)}, {"positions": True}], ids=str
)
def test_what_is_not_plain_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16)
    at = torch.arange(LENGTH)[None]
    options = {"positions": (at, at)} if "positions" in options else options
    expected = dense.dense_attention(q, k, v, scale=0.3, **options)
    monkeypatch.setattr(flash_attention_4, "pays", lambda *_: True)
    monkeypatch.setattr(flash_attention_4, "unsupported", lambda *_: [])
    monkeypatch.setattr(flash_attention_4, "attend", None)
    torch.testing.assert_close(dense.dense_attention(q, k, v, scale=0.3, **options), expected)


@pytest.mark.parametrize(
    ("queries", "keys", "pays"),
    [(16384, 16384, True), (16383, 16383, False), (2048, 131072, False), (1, 1 << 20, False)],
)
def test_short_attention_does_not_wait_for_its_compiler(queries: int, keys: int, pays: bool) -> None:
    q, k = (SimpleNamespace(is_cuda=True, shape=(1, 8, tokens, 64)) for tokens in (queries, keys))
    assert flash_attention_4.pays(q, k) == pays  # pyright: ignore[reportArgumentType]
    q.is_cuda = False
    assert not flash_attention_4.pays(q, k)  # pyright: ignore[reportArgumentType]


def given(**changes: Any) -> Any:
    """A tensor of a Hopper GPU, but for what is said."""
    shape = changes.pop("shape", (1, 8, 64, 128))
    found = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "shape": shape, "requires_grad": False}
    return SimpleNamespace(**{**found, **changes})


@pytest.mark.parametrize(
    ("changes", "absent", "elsewhere", "reason"),
    [
        ({}, [], [], None),
        ({"device": torch.device("cpu")}, [], [], "it needs a Hopper GPU"),
        ({}, ["flash-attn-4 is not installed"], [], "flash-attn-4 is not installed"),
        ({}, [], ["it was measured on Hopper GPUs"], "it was measured on Hopper GPUs"),
        ({"dtype": torch.float16}, [], [], "it is asked for bfloat16, not float16"),
        ({"shape": (1, 8, 64, 64)}, [], [], "it is asked for heads of 128 numbers, not 64"),
        ({"requires_grad": True}, [], [], "its gradients are not used here"),
    ],
)
def test_reasons(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], absent: list[str], elsewhere: list[str],
    reason: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(flash_attention_4, "_absent", lambda: absent)
    monkeypatch.setattr(flash_attention_4, "_elsewhere", lambda _: elsewhere)
    x = given(**changes)
    assert flash_attention_4.unsupported(x, x, x) == ([] if reason is None else [reason])
    with torch.no_grad():
        if "requires_grad" in changes:
            assert flash_attention_4.unsupported(x, x, x) == []


def test_later_queries_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_4, "_absent", list)
    monkeypatch.setattr(flash_attention_4, "_elsewhere", lambda _: [])
    q, k = given(shape=(1, 8, 64, 128)), given(shape=(1, 8, 99, 128))
    assert flash_attention_4.unsupported(q, k, k) == [
        "it is asked for as many queries as keys, not 64 and 99"
    ]


def test_what_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_4, "PACKAGE", "no-such-package-of-anybody")
    flash_attention_4._absent.cache_clear()
    (reason,) = flash_attention_4._absent()
    flash_attention_4._absent.cache_clear()
    assert reason.endswith("is not installed; `pip install no-such-package-of-anybody` brings it")
