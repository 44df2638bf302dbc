"""Summaries in pages: those of all keys, whatever wrote them, and never those of others."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from seerattention.engine.call import AttentionCall, Given
from seerattention.gate import AttnGate, GateConfig
from seerattention.hosts.vllm.summaries import Made, Paged, Stale
from seerattention.rows import Rows

PAGE, PAGES = 32, 12
CPU = torch.device("cpu")


def after(stale, table, past, keys, sparse):
    return stale.after(table, np.array(past), np.array(keys), sparse)


def stale_of(stale):
    return stale.stale.nonzero().flatten().tolist()


def test_what_was_never_summarised_is_stale():
    assert stale_of(Stale(3, PAGE, CPU)) == [0, 1, 2]


def test_a_sparse_row_brings_its_pages_up_to_date():
    stale, table = Stale(8, PAGE, CPU), torch.tensor([[5, 2, 7, 0]])
    assert after(stale, table, [0], [70], {0}) == {0: [0, 1, 2]}
    assert stale_of(stale) == [0, 1, 3, 4, 6]
    assert after(stale, table, [70], [90], {0}) == {0: []}


def test_what_is_decoded_is_stale_from_its_page_on():
    stale, table = Stale(8, PAGE, CPU), torch.tensor([[5, 2, 7, 0]])
    after(stale, table, [0], [60], {0})
    # The 61st token is the last but three of the second page; the 65th the first of the third.
    assert after(stale, table, [60], [61], set()) == {}
    assert stale_of(stale) == [0, 1, 2, 3, 4, 6, 7]
    after(stale, table, [64], [65], set())
    # A next turn finds both, and the first page as it was.
    assert after(stale, table, [65], [90], {0}) == {0: [1, 2]}


def test_a_page_that_another_row_takes_over():
    stale, table = Stale(8, PAGE, CPU), torch.tensor([[5, 2], [2, 6]])
    after(stale, table[:1], [0], [64], {0})
    # A dense prompt in the page of one that has gone.
    after(stale, table[1:], [0], [40], set())
    assert after(stale, table[:1], [64], [64 + 0], {0}) == {0: [1]}


def test_rows_without_new_tokens_change_nothing():
    stale, table = Stale(8, PAGE, CPU), torch.tensor([[5, 2], [0, 0]])
    after(stale, table, [0, 0], [40, 0], {0})
    after(stale, table, [40, 0], [40, 0], set())
    assert stale_of(stale) == [0, 1, 3, 4, 6, 7]


def test_rows_that_decode_are_marked_at_once(monkeypatch):
    stale, table = Stale(16, PAGE, CPU), torch.arange(16).reshape(4, 4)
    after(stale, table, [0, 0, 0, 0], [100, 64, 33, 0], {0, 1, 2})
    assert stale_of(stale) == [6, 7, 10, 11, 12, 13, 14, 15]
    marked, mark = [], Stale._mark
    monkeypatch.setattr(Stale, "_mark", lambda *given, stale: marked.append(mark(*given, stale=stale)))
    # The first row's last page is open, the second begins one, the third brings 40 dense tokens, the fourth
    # nothing, though its table has pages.
    assert after(stale, table, [100, 64, 33, 0], [101, 65, 73, 0], set()) == {}
    assert stale_of(stale) == [3, 6, 7, 9, 10, 11, 12, 13, 14, 15]
    assert len(marked) == 1


def same(layer, k, positions):
    """A model that does not rotate."""
    return k


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(100,), (32, 32, 36), (30, 50, 20), (1, 98, 1)])
@pytest.mark.parametrize("stale", [[], [0], [0, 1]])
def test_pieces_leave_the_summaries_of_all_keys(pieces, stale):
    gate = AttnGate(GateConfig(4, 2, 32, block_size=16))
    for weight in gate.parameters():
        weight.normal_()
    keys, table = torch.randn(1, 2, 100, 32), torch.randperm(PAGES)[:5]
    # What earlier requests left.
    pages = torch.full((PAGES, 2, PAGE // gate.tokens_per_summary, gate.config.dim), 1e3)
    seen = 0
    for new in pieces:
        seen += new
        if seen > 96:
            pages[table[stale]] = float("nan")
        k = keys[:, :, :seen]
        given = Given(k[:, :, -new:], k, k, k[:, :, -new:], k[:, :, -new:])
        call = AttentionCall(layer=0, given=given, rows=Rows.last(new, seen), scale=1.0)
        kept = Paged(pages, table, stale if seen > 96 else [], PAGE)
        assert kept.follow(call, gate, same) == (None,)
    whole = gate.compress(keys, positions=torch.arange(100))
    torch.testing.assert_close(kept.read(), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "parts", [(100,), (64, 100), (71, 80, 100), (71, 80, 96), (50, 51, 52), (93, 96, 100)]
)
def test_those_made_anew_are_of_all_keys(parts):
    """Keys are rotated back once for all parts of a piece, but where one ends inside a summary."""
    gate = AttnGate(GateConfig(4, 2, 32, block_size=16))
    for weight in gate.parameters():
        weight.normal_()
    keys, turned, past, made = torch.randn(1, 2, 100, 32), [], 30, Made()

    def back(layer, k, positions):
        assert positions.tolist() == [list(range(k.shape[2]))]
        turned.append(k.shape[2])
        return k - 5

    for total in parts:
        new, k = keys[:, :, past:total], keys[:, :, :total]
        call = AttentionCall(
            layer=0, given=Given(new, k + 5, k, new, new), rows=Rows.last(total - past, total), scale=1.0
        )
        assert made.follow(call, gate, back) == (None,)
        torch.testing.assert_close(made.read(), gate.compress(k, positions=torch.arange(total)))
        past = total
    again = [total for before, total in pairwise(parts) if before % gate.tokens_per_summary]
    assert turned == [parts[0], *again]


@torch.no_grad()
def test_what_nothing_reads_is_not_made():
    gate, keys = AttnGate(GateConfig(4, 2, 32, block_size=16)), torch.randn(1, 2, 40, 32)
    call = AttentionCall(layer=0, given=Given(*(keys,) * 5), rows=Rows.last(40, 40), scale=1.0)
    made = Made()
    assert made.follow(call, gate, lambda *_: pytest.fail("rotated"), compare=False) == (None,)
    assert made.tokens == 0
