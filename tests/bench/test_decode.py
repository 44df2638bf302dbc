"""What the decode benchmark draws, counts and checks, without timing anything."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from seerattention.bench.decode import Layer, check_sequences
from seerattention.bench.peers import dense_step, flashinfer
from seerattention.bench.plan import DecodePlan
from seerattention.ops.block_sparse_decode import block_sparse_decode


def plan(**settings):
    given = {"sizes": ((2, 256),), "density": 0.3, "block": 32, "gates": (), "pages": (), "peers": ("cudnn",)}
    given |= {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "device": "cpu"}
    return DecodePlan(**given | settings)


@pytest.fixture
def layer():
    return Layer.draw(plan(), 2, 256, 0)


def test_every_head_reads_as_many_blocks_the_last_one_among_them(layer):
    mask = layer.selection.to_mask()
    assert mask.shape == (2, 2, 1, 8)
    # 30 % of 8 blocks.
    assert (mask.sum(-1) == 2).all()
    assert mask[..., -1].all()
    assert not torch.equal(mask[0], mask[1])


def test_both_sequences_are_held_to_the_budget(layer):
    out = block_sparse_decode(layer.q, layer.k, layer.v, layer.selection, lengths=layer.lengths)
    check_sequences(layer, layer.selection, out, layer.sequence)
    for sequence in (0, 1):
        wrong = out.clone()
        wrong[sequence, 1] *= 1.01
        with pytest.raises(AssertionError, match="exceeds the budget"):
            check_sequences(layer, layer.selection, wrong, layer.sequence)


def test_a_dense_step_reads_everything(layer):
    check_sequences(layer, layer.everything(), dense_step(None, layer.q, layer.k, layer.v), layer.sequence)


def test_flashinfer_gets_every_kv_head_as_a_request(layer, monkeypatch):
    """Its wrapper is played by plain attention over the pages that it is told."""

    class Wrapper:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert layout == "HND"

        def plan(self, indptr, indices, last, heads, kv_heads, dim, page, **dtypes):
            assert (heads, kv_heads, dim, page) == (2, 1, 16, 32)
            assert (last == page).all()
            assert {indptr.dtype, indices.dtype} == {torch.int32}
            self.pages = [indices[a:b].long() for a, b in pairwise(indptr)]

        def run(self, q, cache):
            keys, values = ([x[pages].flatten(0, 2) for pages in self.pages] for x in cache)
            rows = zip(q, keys, values, strict=True)
            return torch.stack([((a @ k.T * 16**-0.5).softmax(-1) @ v) for a, k, v in rows])

    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    out = flashinfer(layer.q, layer.k, layer.v, layer.selection)()
    check_sequences(layer, layer.selection, out, layer.sequence)


def test_a_plan_names_its_scorers_and_counts():
    made = plan(gates=("default", "sub16", "quest"))
    default, gate, quest = (made.scorer(name) for name in made.gates)
    assert default.tokens_per_summary == 1
    assert (gate.block_size, gate.tokens_per_summary, gate.gate.config.per_kv_head) == ((1, 32), 16, True)
    assert (quest.block_size, quest.tokens_per_summary) == ((1, 32), 32)
    assert [made.count(tokens) for tokens in (32, 256, 4096)] == [1, 2, 38]
