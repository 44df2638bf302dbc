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
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, softcap: float,
    window_size: tuple[int | None, int | None], learnable_sink: Tensor | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute what flash-attn-4 4.0.0b36 says of its function: tokens before heads, ends aligned."""
    assert causal
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(k.shape[2]) - torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    left, right = window_size
    seen = behind <= (0 if right is None else right)
    if left is not None:
        seen &= behind >= -left
    scores = scores.masked_fill(~seen, -math.inf)
    if learnable_sink is not None:
        column = learnable_sink.double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2).float(), None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 as its documentation has it, on this device."""
    monkeypatch.setattr(flash_attention_4, "_function", lambda: as_documented)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


@pytest.mark.parametrize("queries", [LENGTH, 7])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"window": 1}, {"softcap": 3.0}, {"sinks": True}, {"window": 5, "sinks": True}],
    ids=str,
)
def test_it_is_asked_for_the_same_attention(installed: None, queries: int, options: dict[str, Any]) -> None:
    q = torch.randn(2, 4, queries, 16)
    k, v = torch.randn(2, 2, 2, LENGTH, 16)
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(4)}
    expected = dense.dense_attention(q, k, v, scale=0.3, **options)
    torch.testing.assert_close(flash_attention_4.attend(q, k, v, scale=0.3, **options), expected)


def test_long_attention_on_a_gpu_asks_it_first(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16)
    expected = dense.dense_attention(q, k, v, scale=0.3, window=9)
    asked: list[Tensor] = []
    monkeypatch.setattr(flash_attention_4, "pays", lambda *_: True)
    monkeypatch.setattr(flash_attention_4, "unsupported", lambda *given: asked.extend(given))
    torch.testing.assert_close(dense.dense_attention(q, k, v, scale=0.3, window=9), expected)
    assert [x.data_ptr() for x in asked] == [x.data_ptr() for x in (q, k, v)]
    # A padded batch says positions, which it does not take.
    at = torch.arange(LENGTH)[None]
    monkeypatch.setattr(flash_attention_4, "attend", None)
    torch.testing.assert_close(
        dense.dense_attention(q, k, v, scale=0.3, window=9, positions=(at, at)), expected
    )


@pytest.mark.parametrize(
    ("queries", "keys", "pays"),
    [(16384, 16384, True), (16383, 16383, False), (2048, 131072, True), (1, 1 << 20, False)],
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
        ({"dtype": torch.float32}, [], [], "it computes float16 and bfloat16, not float32"),
        ({"shape": (1, 8, 64, 100)}, [], [], "head_dim must be a multiple of 8 up to 256, got 100"),
        ({"shape": (1, 8, 64, 264)}, [], [], "head_dim must be a multiple of 8 up to 256, got 264"),
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


def test_what_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_4, "PACKAGE", "no-such-package-of-anybody")
    flash_attention_4._absent.cache_clear()
    (reason,) = flash_attention_4._absent()
    flash_attention_4._absent.cache_clear()
    assert reason.endswith("is not installed; `pip install no-such-package-of-anybody` brings it")
