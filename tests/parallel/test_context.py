"""Where tokens lie that processes share, and that nothing is read before it has come."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from seerattention.engine.call import AttentionCall, Given
from seerattention.engine.layer import Phase, SparseLayer
from seerattention.gate import AttnGate, GateConfig
from seerattention.parallel import context_layer
from seerattention.parallel.context import Context, Exchange, merged
from seerattention.parallel.context_layer import ContextLayer
from seerattention.policies import TopK
from seerattention.rows import Rows

BLOCK = 16


def spread(size, rank, lengths, pieces):
    """What one process of so many knows, without the others."""
    context = Context(None, BLOCK, lengths)
    context.__dict__.update(size=size, rank=rank)
    for tokens in pieces:
        context.add_piece(tokens)
    return context


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("pieces", [[500], [96, 33], [1]], ids=str)
def test_every_token_has_one_process(size, pieces):
    seen = []
    for rank in range(size):
        context, place = spread(size, rank, [sum(pieces)], pieces), 0
        for chunk in context.chunks(rank):
            assert chunk.first % BLOCK == chunk.tokens % BLOCK == 0
            # Behind one another in memory, and in order.
            assert chunk.place == place
            place += chunk.tokens
            seen += range(chunk.first, chunk.first + chunk.tokens)
        assert place == context.own_tokens
    assert sorted(seen) == list(range(context.tokens))
    assert sum(pieces) <= context.tokens


@pytest.mark.parametrize("size", [2, 4])
def test_processes_have_as_much_to_read(size):
    """A query sees what comes before it, so a causal map's share is the sum of positions."""
    shares = []
    for rank in range(size):
        chunks = spread(size, rank, [4096], [4096]).chunks(rank)
        shares.append(sum(sum(range(c.first, c.first + c.tokens)) for c in chunks))
    assert max(shares) - min(shares) <= 1e-3 * max(shares)


def test_what_a_process_has_of_prompts():
    context = spread(2, 0, [100, 100, 7, 130], [130])
    # Chunks of 48 tokens: this process has 0 to 47 and 144 to 191.
    assert context.tokens == 192
    assert context.own_lengths() == [48, 48, 7, 48]
    assert context.own_blocks(BLOCK) == [0, 1, 2, 9, 10, 11]
    assert list(context.alike()) == [(slice(0, 2), 100), (slice(2, 3), 7), (slice(3, 4), 130)]
    assert list(context.ends(context.latest[0], BLOCK)) == [(2, slice(0, 7))]
    other = spread(2, 1, [100, 100, 7, 130], [130])
    # 48 to 143: rows that end at 100 end inside the block from 96 on, which is 48 tokens in.
    assert list(other.ends(other.latest[1], BLOCK)) == [
        (0, slice(48, 52)),
        (1, slice(48, 52)),
        (3, slice(80, 82)),
    ]


def test_parts_of_the_keys_add_up():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (1, 30, 30))
    outs, lses = [], []
    for part in (slice(0, 7), slice(7, 7), slice(7, 30)):
        scores = q @ k[:, :, part].mT
        lses.append(scores.logsumexp(-1))
        # Nothing was read of the second one.
        outs.append(scores.softmax(-1) @ v[:, :, part])
    expected = (q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(merged(torch.stack(outs), torch.stack(lses)), expected)


def test_large_scores_do_not_overflow():
    outs, lses = torch.ones(2, 1, 1, 1, 4), torch.full((2, 1, 1, 1), 100.0)
    outs[1] = 3
    torch.testing.assert_close(merged(outs, lses), torch.full((1, 1, 1, 4), 2.0))


def test_reading_nothing_gives_zeros():
    outs, lses = torch.zeros(2, 1, 1, 1, 4), torch.full((2, 1, 1, 1), -torch.inf)
    assert torch.equal(merged(outs, lses), torch.zeros(1, 1, 1, 4))


class Late(Exchange):
    """Keys and values that are not there before they are waited for."""

    def __init__(self, context, k, v, stream=None):
        super().__init__(context, k, v, stream)
        self.given = self.k.clone(), self.v.clone()
        self.k.fill_(torch.nan)
        self.v.fill_(torch.nan)

    def wait(self):
        self.k.copy_(self.given[0])
        self.v.copy_(self.given[1])


@pytest.mark.parametrize("policy", [TopK(0.5), None], ids=["sparse", "dense"])
def test_keys_are_waited_for(tmp_path, monkeypatch, policy):
    """Rows of several lengths, whose keys must be views of what is on its way."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        torch.manual_seed(0)
        context = Context(dist.group.WORLD, BLOCK, [90, 90, 40])
        context.add_piece(90)
        q, k, v = (torch.randn(3, heads, context.own_tokens, 32) for heads in (4, 2, 2))
        gate = AttnGate(GateConfig(4, 2, 32, BLOCK))
        phase = Phase({0: gate}, policy)
        handler = SparseLayer(phase, Phase({}, None), SimpleNamespace(why_not=None), min_tokens=0)
        call = AttentionCall(
            0, Given(q, k, v, q, k), Rows.last(context.own_tokens, context.own_tokens), scale=0.2
        )
        expected = ContextLayer(context).prefill(handler, call)
        monkeypatch.setattr(context_layer, "Exchange", Late)
        assert torch.equal(ContextLayer(context).prefill(handler, call), expected)
        assert not expected[2, :, 40:].any()
    finally:
        dist.destroy_process_group()


def test_what_reads_nothing_waits_too(tmp_path, monkeypatch):
    """A process whose chunks are padding: memory of what is on its way must not be given back."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        context = Context(dist.group.WORLD, BLOCK, [0])
        context.add_piece(2 * BLOCK)
        q, k, v = (torch.randn(1, 2, context.own_tokens, 32) for _ in range(3))
        waited = []
        monkeypatch.setattr(Exchange, "wait", lambda exchange: waited.append(exchange))
        rows = Rows.last(context.own_tokens, context.own_tokens)
        call = AttentionCall(0, Given(q, k, v, q, k), rows, scale=0.2)
        handler = SparseLayer(Phase({}, None), Phase({}, None), SimpleNamespace(why_not=None))
        assert not ContextLayer(context).prefill(handler, call).any()
        assert len(waited) == 1
    finally:
        dist.destroy_process_group()
