"""The demo's maps: what is drawn is the true map, the gate's share and the selection of one head."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seerattention.demo import figures
from seerattention.hosts.transformers import new_gates
from seerattention.policies import TopK

BLOCKS = 6


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_maps_of_heads_and_the_picture_of_them(per_kv_head, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    gates = new_gates(model, block_size=16, per_kv_head=per_kv_head)
    tokens = np.random.default_rng(0).integers(0, 64, 16 * BLOCKS)
    maps = figures.head_maps(model, gates, tokens, TopK(0.5, sink_blocks=1))
    assert len(maps) == 4
    assert sorted(m["spread"] for m in maps) == [m["spread"] for m in maps]
    assert len({(m["layer"], m["head"]) for m in maps}) == 4
    for found in maps:
        assert found["head"] in range(4)
        for key in ("true", "gate", "selected"):
            assert found[key].shape == (BLOCKS, BLOCKS)
            assert not np.triu(found[key], 1).any()
        np.testing.assert_allclose(found["true"].sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(found["gate"].sum(-1), 1, rtol=1e-5)
        # The first and the own block, and of the rest what the gate has highest.
        assert found["selected"][:, 0].all()
        assert np.diagonal(found["selected"]).all()
        free = slice(1, BLOCKS - 1)
        last, share = found["selected"][-1, free], found["gate"][-1, free]
        assert not last.all()
        assert not last.any() or share[last].min() >= share[~last].max()
    figures.draw_maps(maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
