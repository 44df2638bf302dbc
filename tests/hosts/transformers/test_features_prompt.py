"""The shapes that prompts of attached models come in, line by line of the table of features."""

import torch
from transformers import DynamicCache

from seerattention.hosts import transformers as host
from tests.hosts.transformers.features import assert_sparse, attached, generated, lines, prove


def padding(tiny, tmp_path):
    model, ids = attached(tiny), tiny.tokens(1, 64)
    alone = tiny.logits(model, ids)
    for side in (slice(9, 73), slice(0, 64)):
        both, mask = tiny.tokens(2, 73, seed=3), torch.ones(2, 73, dtype=torch.long)
        both[1, side], mask[1] = ids[0], 0
        mask[1, side] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = tiny.logits(model, both, attention_mask=mask, position_ids=positions)
        tiny.assert_as_close(padded[1:, side], alone, alone.double())
    assert set(host.usage(model)) == {"sparse"}


def in_pieces(tiny, tmp_path):
    """`test_pieces.py` compares selections."""
    model, ids = attached(tiny), tiny.tokens(1, 96)
    plain = generated(model, ids)
    assert torch.equal(generated(model, ids, prefill_chunk_size=32), plain)
    cache = DynamicCache(config=model.config)
    first = host.prefill(model, ids, cache, piece_tokens=32).logits[:, -1:].argmax(-1)
    text = torch.cat([ids, first], 1)
    assert torch.equal(generated(model, text, cache=cache, max_new_tokens=11), plain)
    assert_sparse(model)


def several_turns(tiny, tmp_path):
    model, gold = attached(tiny), attached(tiny).double()
    first, second = tiny.tokens(1, 48), tiny.tokens(1, 40, seed=4)
    results = []
    for each in (model, gold):
        cache = DynamicCache(config=each.config)
        answer = generated(model, first, cache=DynamicCache(config=model.config))[:, 48:]
        for part in (first, *answer[:, :-1].split(1, 1)):
            tiny.logits(each, part, cache=cache)
        # The last decoded token comes with the next turn, as `generate` does it.
        turn = torch.cat([answer[:, -1:], second], 1)
        results.append(tiny.logits(each, turn, cache=cache))
    cache = DynamicCache(config=model.config)
    text = torch.cat([generated(model, first, cache=cache), second], 1)
    out = generated(
        model, text, cache=cache, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    tiny.assert_as_close(out.logits[0], results[0][:, -1], results[1][:, -1])
    assert_sparse(model)


def sliding_turns(tiny, tmp_path):
    """Padding at the end of a turn does no harm in that turn, but takes the place of tokens in the next."""
    model, gold, ids = (
        attached(tiny, kind="gemma2"),
        attached(tiny, kind="gemma2").double(),
        tiny.tokens(2, 96),
    )
    mask = torch.ones(2, 96, dtype=torch.long)
    mask[1, 50:64] = 0
    cache, alone, exact = (DynamicCache(config=model.config) for _ in range(3))
    for part in (slice(0, 32), slice(32, 64)):
        out = tiny.logits(model, ids[:, part], cache=cache, attention_mask=mask[:, : part.stop])
        part = slice(part.start, min(part.stop, 50))
        row = tiny.logits(model, ids[1:, part], cache=alone)
        tiny.assert_as_close(out[1:, : row.shape[1]], row, tiny.logits(gold, ids[1:, part], cache=exact))
    tiny.logits(model, ids[:, 64:], cache=cache, attention_mask=mask)


def packed(tiny, tmp_path):
    both = torch.cat([torch.arange(12), torch.arange(8)])[None]
    tiny.logits(attached(tiny), tiny.tokens(1, 20), position_ids=both)


def masks(tiny, tmp_path):
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    tiny.logits(attached(tiny), tiny.tokens(1, 20), attention_mask=mask)


def bidirectional(tiny, tmp_path):
    tiny.logits(attached(tiny), tiny.tokens(1, 20), is_causal=False)


KIND = "prompt"
CHECKS = {
    "left or right padding": padding,
    "in pieces": in_pieces,
    "several turns on one cache": several_turns,
    "the same, with sliding windows and padding between a row's tokens": sliding_turns,
    "packed sequences": packed,
    "4-D masks": masks,
    "bidirectional attention, is_causal=False": bidirectional,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
