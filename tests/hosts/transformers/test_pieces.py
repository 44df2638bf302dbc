"""A prompt in pieces selects, and computes, what it does at once."""

import pytest
import torch
from transformers import DynamicCache

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.attach import sparse_prefill
from seerattention.hosts.transformers.pieces import piece_sizes
from seerattention.policies import Policy, TopK, parse

POLICIES = [
    "threshold:0.2",
    "top_k:0.8",
    "top_p:0.7",
    "token_budget:40",
    "top_k:0.8,sink_blocks=1,local_blocks=2,dense_last_rows=2",
    "threshold:0.2,dense_last_rows=3",
    "top_p:0.5,dense_last_rows=1",
]


class Blocks:
    """Collects the mask of every layer: rows of all pieces under each other."""

    def __init__(self):
        self.rows = {0: [], 1: []}

    def __call__(self, layer, call, selection):
        self.rows[layer].append(selection.to_mask())

    def masks(self):
        most = max(m.shape[3] for rows in self.rows.values() for m in rows)
        pad = torch.nn.functional.pad
        masks = [torch.cat([pad(m, (0, most - m.shape[3])) for m in rows], 2) for rows in self.rows.values()]
        self.rows = {0: [], 1: []}
        return masks


def whole_and_pieces(tiny, policy, length, piece, past=0):
    """Return blocks, cache and output of a prompt given at once and in pieces, after ``past`` tokens."""
    results = []
    for in_pieces in (False, True):
        model, seen = tiny.make(), Blocks()
        host.attach(model, tiny.gates_for(model), policy, min_tokens=0, observe=seen)
        cache, ids = DynamicCache(config=model.config), tiny.tokens(2, length)
        if past:
            tiny.logits(model, tiny.tokens(2, past, seed=5), cache=cache)
            seen.masks()
        if in_pieces:
            out = host.prefill(model, ids, cache, piece_tokens=piece).logits
        else:
            out = tiny.logits(model, ids, cache=cache)
        assert set(host.usage(model)) == {"sparse"}
        results.append((seen.masks(), cache, out))
    return results


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("length", "piece"), [(160, 32), (165, 48), (150, 40), (40, 64), (200, 16)])
def test_pieces_select_like_the_whole(tiny, policy, length, piece):
    (masks, cache, out), (masks_p, cache_p, out_p) = whole_and_pieces(tiny, policy, length, piece)
    for one, other in zip(masks, masks_p, strict=True):
        assert torch.equal(one, other)
    # What the second layer caches depends on all that the first one's attention computed.
    for one, other in zip(cache.layers, cache_p.layers, strict=True):
        tiny.assert_as_close(other.keys, one.keys, one.keys.double())
    tiny.assert_as_close(out_p[:, -1], out[:, -1], out[:, -1].double())


def test_a_turn_in_pieces_selects_like_the_turn(tiny):
    whole, pieces = whole_and_pieces(tiny, "threshold:0.2,dense_last_rows=2", 100, 32, past=32)
    for one, other in zip(whole[0], pieces[0], strict=True):
        assert torch.equal(one, other)
    tiny.assert_as_close(pieces[2][:, -1], whole[2][:, -1], whole[2][:, -1].double())


@pytest.mark.parametrize("policy", ["top_k:0.8,dense_last_rows=2", "threshold:0.2"])
def test_a_turn_that_begins_inside_a_block_selects_like_the_text(tiny, policy):
    """The block is completed first; from there on rows are those of the whole text given at once."""
    model, seen, ids = tiny.make(), Blocks(), tiny.tokens(2, 140)
    host.attach(model, tiny.gates_for(model), policy, min_tokens=0, observe=seen)
    tiny.logits(model, ids)
    # The first layer's choice depends on the tokens alone.
    expected = seen.masks()[0]
    cache = DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :40], cache=cache)
    seen.masks()
    host.prefill(model, ids[:, 40:], cache, piece_tokens=32)
    assert torch.equal(seen.masks()[0], expected[:, :, 3:])
    assert host.usage(model)["dense: decoding step"] == 2
    # A turn too short to complete the block.
    host.prefill(model, ids[:, :3], cache, piece_tokens=32)
    assert host.usage(model)["dense: decoding step"] == 4


def test_without_its_length_top_k_reads_less_and_last_rows_more(tiny):
    """Why `prefill` exists; both are what docs/design.md says of pieces that come one by one."""
    whole, _ = whole_and_pieces(tiny, "top_k:0.6", 160, 32)
    model, seen = tiny.make(), Blocks()
    host.attach(model, tiny.gates_for(model), "top_k:0.6", min_tokens=0, observe=seen)
    cache = DynamicCache(config=model.config)
    for piece in tiny.tokens(2, 160).split(32, 1):
        tiny.logits(model, piece, cache=cache)
    assert seen.masks()[0].sum() < whole[0][0].sum()
    whole, _ = whole_and_pieces(tiny, "threshold:0.2,dense_last_rows=1", 160, 32)
    host.attach(model, tiny.gates_for(model), "threshold:0.2,dense_last_rows=1", min_tokens=0, observe=seen)
    cache = DynamicCache(config=model.config)
    for piece in tiny.tokens(2, 160).split(32, 1):
        tiny.logits(model, piece, cache=cache)
    mask = seen.masks()[0]
    assert (mask | whole[0][0]).equal(mask)
    assert mask.sum() > whole[0][0].sum()


def test_unaligned_pieces_read_at_least_their_own_blocks(tiny):
    """Rows start at a piece's first token, so a row may own two blocks; both are read."""
    model, seen = tiny.make(), Blocks()
    host.attach(model, tiny.gates_for(model), "threshold:0.9", min_tokens=0, observe=seen)
    cache = DynamicCache(config=model.config)
    for piece in tiny.tokens(1, 85).split((21, 64), 1):
        tiny.logits(model, piece, cache=cache)
    second = seen.rows[0][1][0]
    # Tokens 21-36, 37-52, 53-68, 69-84 in blocks of 16.
    own = [{1, 2}, {2, 3}, {3, 4}, {4, 5}]
    for row, blocks in enumerate(own):
        assert second[:, row, sorted(blocks)].all()
    assert second.sum() < second[0].numel() * second.shape[0] / 2


@pytest.mark.parametrize("last_rows", [0, 1, 2, 5])
@pytest.mark.parametrize("piece", [16, 40, 64, 1000])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 333])
def test_sizes(tokens, piece, last_rows):
    sizes = piece_sizes(tokens, piece, 16, TopK(0.1, dense_last_rows=last_rows))
    assert sum(sizes) == tokens
    assert all(size % 16 == 0 and size <= piece for size in sizes[:-1])
    if len(sizes) > 1:
        assert sizes[-1] >= 16
        assert -(-sizes[-1] // 16) >= last_rows
        # No larger than it must be.
        assert sizes[-1] <= max(piece // 16 * 16, last_rows * 16) + piece


def test_a_policy_of_ones_own_chooses_as_it_does(tiny):
    class Even(Policy):
        """Every other block; its choice for a row does not depend on how many there are."""

        name = "even"

        def choose(self, scores, valid, block_tokens):
            return (torch.arange(scores.shape[-1]) % 2 == 0).expand_as(scores)

    whole, pieces = whole_and_pieces(tiny, Even(dense_last_rows=1), 160, 32)
    for one, other in zip(whole[0], pieces[0], strict=True):
        assert torch.equal(one, other)


def test_the_crossover_is_asked_for_the_whole_prompt(tiny):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=100)
    host.prefill(model, tiny.tokens(1, 128), DynamicCache(config=model.config), piece_tokens=32)
    assert host.usage(model) == {"sparse": 8}
    host.prefill(model, tiny.tokens(1, 96), DynamicCache(config=model.config), piece_tokens=32)
    assert host.usage(model)["dense: fewer than 100 tokens"] == 6


def test_refusals(tiny):
    model, ids = tiny.make(), tiny.tokens(1, 64)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="nothing is attached"):
        host.prefill(model, ids, cache)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    with pytest.raises(ValueError, match="at least a block, 16 tokens, got 15"):
        host.prefill(model, ids, cache, piece_tokens=15)
    with pytest.raises(ValueError, match="without padding; give prompts of other lengths one by one"):
        host.prefill(model, ids, cache, attention_mask=torch.ones(1, 64))
    with pytest.raises(ValueError, match="empty prompt"):
        host.prefill(model, ids[:, :0], cache)
    # A failure in the middle leaves nothing behind.
    with pytest.raises(IndexError):
        host.prefill(model, ids + tiny.vocab, cache, piece_tokens=32)
    assert sparse_prefill(model).prompt_tokens is None
    assert parse("top_k:0.8") == sparse_prefill(model).policy
