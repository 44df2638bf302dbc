"""Where queries lie among keys: positions, causal and own blocks, sequences behind one another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seerattention.rows import Rows, num_blocks

LENGTHS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda x: (min(x), max(x))), min_size=1, max_size=4
).filter(lambda lengths: any(q for q, _ in lengths))


def slow(first, queries, keys, block_q, block_k):
    """Causal and own block pairs, token by token."""
    shape = num_blocks(queries, block_q), num_blocks(keys, block_k)
    causal, own = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for q in range(queries):
        for k in range(keys):
            causal[q // block_q, k // block_k] |= k <= first + q
            own[q // block_q, k // block_k] |= k == first + q
    return causal, own


@given(LENGTHS, st.integers(1, 9), st.integers(1, 9))
def test_blocks_are_what_tokens_say(lengths, block_q, block_k):
    rows = Rows.packed(lengths)
    causal, own = rows.causal((block_q, block_k)), rows.own((block_q, block_k))
    assert causal.shape == own.shape == rows.num_blocks((block_q, block_k))
    row = 0
    for queries, keys in lengths:
        for part, expected in zip(
            (causal, own), slow(keys - queries, queries, keys, block_q, block_k), strict=True
        ):
            found = part[row : row + len(expected)]
            assert torch.equal(found[:, : expected.shape[1]], expected)
            assert not found[:, expected.shape[1] :].any()
        row += num_blocks(queries, block_q)


@given(LENGTHS)
def test_packed_sequences_are_those_alone(lengths):
    rows = Rows.packed(lengths)
    unknown = Rows.from_starts(rows.starts_q, rows.starts_k, rows.num_queries, rows.num_keys)
    assert unknown.known == rows.known == tuple(lengths)
    places = torch.cat([torch.arange(k - q, k) for q, k in lengths])
    assert torch.equal(rows.positions(), places)
    assert torch.equal(unknown.positions(), places)
    seen = [(s.rows.num_queries, s.rows.num_keys) for s in rows.sequences()]
    assert seen == [(q, k) for q, k in lengths if q]
    for s in rows.sequences():
        assert torch.equal(places[s.queries], s.rows.positions())
        assert s.keys.stop - s.keys.start == s.rows.num_keys


@given(LENGTHS, st.integers(1, 9))
def test_blocks_of_packed_sequences(lengths, size):
    rows = Rows.packed(lengths)
    for side, tokens in enumerate((rows.num_queries, rows.num_keys)):
        places, blocks = rows.places(tokens), rows.places(tokens, size)
        first, after = rows.edges(tokens, size, torch.device("cpu")).tolist()
        token = torch.arange(tokens)
        x = torch.stack([token[a:b].sum() for a, b in zip(first, after, strict=True)])
        rectangle = rows.rectangle(x[None, None, :, None], tokens, size)
        longest = max(num_blocks(one[side], size) for one in lengths)
        assert rectangle.shape == (len(lengths), 1, longest, 1)
        assert rows.edges(tokens, size, torch.device("cpu")) is rows.edges(tokens, size, torch.device("cpu"))
        for i, one in enumerate(lengths):
            assert places[i].stop - places[i].start == one[side]
            own = [part.sum() for part in token[places[i]].split(size)] if one[side] else []
            assert x[blocks[i]].tolist() == own
            assert rectangle[i, 0, : len(own), 0].tolist() == own
    with pytest.raises(ValueError, match="are neither the"):
        rows.places(rows.num_keys + 1)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 9))
def test_maps_are_those_of_the_sequences(lengths, block_q, block_k):
    rows = Rows.packed(lengths)
    causal, seen = rows.causal((block_q, block_k)), 0
    for one, (down, across) in rows.maps((block_q, block_k)):
        assert down.start == seen
        assert torch.equal(causal[down, across], one.rows.causal((block_q, block_k)))
        assert lengths[one.index] == (one.rows.num_queries, one.rows.num_keys)
        seen = down.stop
    assert seen == len(causal)


def test_one_sequence():
    assert Rows.last(3, 10).first == 7
    assert Rows.last(3, 10).positions().tolist() == [7, 8, 9]
    shard = Rows.at(4, 6)
    assert (shard.first, shard.num_queries, shard.num_keys) == (4, 6, 10)
    assert not shard.is_packed
    assert next(shard.sequences()).rows.num_keys == 10
    assert shard.causal((4, 4)).tolist() == [[True, True, False], [True, True, True]]
    assert shard.own((4, 4)).tolist() == [[False, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rows.last(0, 4), "got Tq=0 and Tk=4"),
        (lambda: Rows.last(5, 4), "got Tq=5 and Tk=4"),
        (lambda: Rows.at(-1, 4), "at least 0, got -1"),
        (lambda: Rows.packed([(1, 2), (3, 2)]), "sequence 1 has 3 queries and 2 keys"),
        (lambda: Rows.packed([(0, 2)]), "hold no query"),
        (lambda: Rows.from_starts(torch.zeros(2), torch.zeros(2), 1, 1), "starts_q must be int32"),
        (
            lambda: Rows.from_starts(torch.zeros(2).int(), torch.zeros(3).int(), 1, 1),
            r"got \[2\] and \[3\]",
        ),
        (
            lambda: Rows.from_starts(torch.tensor([0, 2]).int(), torch.tensor([0, 4]).int(), 3, 4).known,
            "end with the 3 tokens, got 0 to 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
