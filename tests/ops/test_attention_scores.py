from __future__ import annotations

import math

import pytest
import torch

from seerattention.ops import attention_scores
from seerattention.ops.attention_scores import block_mass
from seerattention.ops.shapes import Shape
from seerattention.rows import num_blocks
from seerattention.testing.inputs import random_qkv


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 65), (37, 139)])
@pytest.mark.parametrize("block_size", [(32, 32), (16, 32), (32, 16)])
def test_the_mass_of_blocks_is_what_all_queries_give_them(
    block_size: tuple[int, int], queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(name="", heads=4, kv_heads=2, queries=queries, keys=keys, head_dim=8, batch=2)
    q, k, _ = random_qkv(shape)
    expected = torch.zeros(2, 4, num_blocks(queries, block_size[0]), num_blocks(keys, block_size[1]))
    for b in range(2):
        for h in range(4):
            for r in range(queries):
                logits = [float(q[b, h, r] @ key) * 0.3 for key in k[b, h // 2]]
                weights = [math.exp(x) for x in logits[: keys - queries + r + 1]]
                for c, weight in enumerate(weights):
                    expected[b, h, r // block_size[0], c // block_size[1]] += weight / sum(weights)
    for work in (attention_scores.WORK_BYTES["cpu"], 1, 4 * 2 * keys * block_size[0] * 2):
        # One slice, one query block at a time, two at a time.
        monkeypatch.setitem(attention_scores.WORK_BYTES, "cpu", work)
        torch.testing.assert_close(block_mass(q, k, block_size, scale=0.3), expected)
