"""What other libraries are given is the selection; what they compute is checked by the bench, on a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import peers
from seerattention.ops.shapes import Shape
from seerattention.testing.inputs import random_selection


@pytest.mark.parametrize("heads", [2, 6])
def test_lists_of_flash_attention_4_are_the_selection(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    def lists(*given: Any, block_size: tuple[int, int]) -> tuple[Any, ...]:
        assert block_size == (16, 16)
        return given

    monkeypatch.setattr(peers, "_module", lambda *_: SimpleNamespace(BlockSparseTensorsTorch=lists))
    shape = Shape(name="", heads=2, kv_heads=2, queries=200, keys=200, head_dim=16, block_size=(16, 16))
    selection = random_selection(shape, density=0.4)
    own_counts, own, counts, blocks = peers._blocks(selection, heads)
    assert own_counts.shape == (1, heads, 13)
    assert own_counts.eq(1).all()
    expected = selection.to_mask().repeat_interleave(heads // 2, 1)
    for head in range(heads):
        for row in range(13):
            assert own[0, head, row].tolist() == [row]
            listed = blocks[0, head, row, : counts[0, head, row]].tolist()
            assert listed == [j for j in expected[0, head, row].nonzero()[:, 0].tolist() if j != row]
    assert peers._blocks(selection, heads)[2] is counts


@pytest.mark.parametrize(
    ("peer", "module", "package"),
    [
        (peers.flash_attention_4, "flash_attn.cute", "flash-attn-4"),
        (peers.flashinfer, "flashinfer", "flashinfer-python"),
    ],
)
def test_what_is_not_installed_is_left_out_with_the_command(
    monkeypatch: pytest.MonkeyPatch, peer: Any, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    shape = Shape(name="", heads=2, kv_heads=2, queries=64, keys=64, head_dim=16, block_size=(16, 16))
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    with pytest.raises(NotImplementedError, match=f"peer {module}: .* -m pip install {package}` brings it"):
        peer(q, k, v, random_selection(shape, density=0.4))
