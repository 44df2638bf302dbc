"""Block summaries follow the KV cache through crops, copies and reorderings, and are never stale.

What a piece must give after any change of the cache: the same as after a cache that was filled with those
tokens in the first place.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.rotary import Unrotate
from seerattention.hosts.transformers.support import CACHE

DECODING = "dense: decoding step"
UNKNOWN_POSITIONS = (
    "dense: cached keys have no summaries, and cannot be rotated back: their positions are not known"
)


class Case:
    """A sparse model, and what it gives for a text at once in fp32 and fp64."""

    def __init__(self, tiny, kind="llama", policy="threshold:0.25"):
        self.tiny, self.model, self.gold = tiny, tiny.make(kind), tiny.make(kind).double()
        self.gates, self.policy = tiny.gates_for(self.model), policy
        self.attach()
        host.attach(self.gold, tiny.gates_for(self.gold), policy, min_tokens=0)

    def attach(self):
        host.attach(self.model, self.gates, self.policy, min_tokens=0)

    def cache(self):
        return DynamicCache(config=self.model.config)

    def assert_as_if_filled(self, out, prefix, ids):
        """``out`` is what the sparse model gives for ``ids`` after a cache filled with ``prefix``."""
        results = []
        for model in (self.model, self.gold):
            cache = DynamicCache(config=model.config)
            self.tiny.logits(model, prefix, cache=cache)
            results.append(self.tiny.logits(model, ids, cache=cache))
        self.tiny.assert_as_close(out, *results)

    def feed(self, ids, cache, **kwargs):
        """Give a piece; returns its logits and how its layers were computed."""
        before = host.usage(self.model)
        out = self.tiny.logits(self.model, ids, cache=cache, **kwargs)
        after = host.usage(self.model)
        return out, {k for k in after if after[k] != before.get(k)}

    def assert_like_one_shot(self, out, ids):
        """``out`` is what the sparse model gives for the last tokens of ``ids`` given at once."""
        new = out.shape[1]
        expected, gold = self.tiny.logits(self.model, ids), self.tiny.logits(self.gold, ids)
        self.tiny.assert_as_close(out, expected[:, -new:], gold[:, -new:])


@pytest.mark.parametrize("removed", [3, 8, 16, 24, 31, 32, 71])
def test_cropped_cache(tiny, removed):
    """Blocks that the crop left whole keep their summaries, a block it cut is summarised again."""
    case = Case(tiny)
    ids, other = tiny.tokens(1, 72), tiny.tokens(1, 40, seed=5)
    cache = case.cache()
    case.feed(ids, cache)
    cache.crop(-removed)
    kept = 72 - removed
    out, how = case.feed(other, cache)
    assert how == {"sparse"}
    # As with summaries of which none was kept. What the cache holds of a block that was cut stays what its
    # queries saw together, which a prompt ending there might not have selected.
    results = []
    for model in (case.model, case.gold):
        again = DynamicCache(config=model.config)
        tiny.logits(model, ids, cache=again)
        again.crop(-removed)
        again.seerattention_summaries.clear()
        results.append(tiny.logits(model, other, cache=again))
    tiny.assert_as_close(out, *results)
    if kept % 16 == 0:
        case.assert_as_if_filled(out, ids[:, :kept], other)
        case.assert_like_one_shot(out, torch.cat([ids[:, :kept], other], 1))
    out, how = case.feed(tiny.tokens(1, 1), cache)
    assert how == {DECODING}


def test_cropped_to_nothing_starts_anew(tiny):
    case, ids = Case(tiny), tiny.tokens(1, 64)
    cache = case.cache()
    case.feed(tiny.tokens(1, 50, seed=9), cache)
    cache.crop(-50)
    out, how = case.feed(ids, cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


def test_cropped_and_refilled_with_another_text(tiny):
    """Other tokens in the middle of blocks, alike at every block's end: the first layer's last keys agree."""
    case = Case(tiny)
    ids, other, end = tiny.tokens(1, 64), tiny.tokens(1, 64, seed=4), tiny.tokens(1, 16, seed=6)
    other[:, 15::16] = ids[:, 15::16]
    cache = case.cache()
    case.feed(ids, cache)
    old = cache.seerattention_summaries[0].read()
    cache.crop(-64)
    with host.dense(case.model):
        tiny.logits(case.model, other, cache=cache)
    _, how = case.feed(end, cache)
    assert how == {"sparse"}
    new = cache.seerattention_summaries[0].read()
    # The first layer's keys depend on the tokens alone.
    fresh = case.cache()
    case.feed(torch.cat([other, end], 1), fresh)
    expected = fresh.seerattention_summaries[0].read()
    tiny.assert_as_close(new, expected, expected.double())
    assert (new[:, :, : old.shape[2]] - old).abs().max() > 0.1


def test_rows_swapped_whose_blocks_end_alike(tiny):
    case = Case(tiny)
    ids, end = tiny.tokens(2, 64), tiny.tokens(2, 16, seed=6)
    ids[1, 15::16] = ids[0, 15::16]
    cache = case.cache()
    case.feed(ids, cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    out, how = case.feed(end, cache)
    assert how == {"sparse"}
    case.assert_as_if_filled(out, ids.flip(0), end)


@pytest.mark.parametrize("decode_first", [False, True])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    ],
    ids=["swap", "one row", "repeat", "reorder"],
)
def test_rows_changed(tiny, change, rows, decode_first):
    case, ids = Case(tiny), tiny.tokens(2, 50)
    step, end = tiny.tokens(len(rows), 1, seed=8), tiny.tokens(len(rows), 20, seed=6)
    cache = case.cache()
    case.feed(ids, cache)
    change(cache)
    prefix = ids[rows]
    if decode_first:
        _, how = case.feed(step, cache)
        assert how == {DECODING}
    out, how = case.feed(end, cache)
    assert how == {"sparse"}
    if decode_first:
        # Decoding is dense, so the token after the prefix must be decoded in the comparison too.
        results = []
        for model in (case.model, case.gold):
            fresh = DynamicCache(config=model.config)
            for part in (prefix, step):
                tiny.logits(model, part, cache=fresh)
            results.append(tiny.logits(model, end, cache=fresh))
        tiny.assert_as_close(out, *results)
    else:
        case.assert_as_if_filled(out, prefix, end)


def test_same_order_keeps_the_summaries(tiny):
    case, ids = Case(tiny), tiny.tokens(2, 64)
    cache = case.cache()
    case.feed(ids[:, :48], cache)
    cache.reorder_cache(torch.tensor([0, 1]))
    out, how = case.feed(ids[:, 48:], cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_keys_are_rotated_back(tiny, kind, side):
    """Summaries made from a cache that the model's own attention filled are those of its keys before RoPE."""
    model, ids = tiny.make(kind), tiny.tokens(2, 72)
    mask = torch.ones(2, 72, dtype=torch.long)
    if side:
        mask[1, slice(0, 5) if side == "left" else slice(67, 72)] = 0
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    cache, seen = DynamicCache(config=model.config), {}
    with host.dense(model):
        tiny.logits(model, ids, cache=cache, **inputs)

    def keep(call):
        rows = call.rows.places(call.rows.num_queries) if call.rows.is_packed else None
        k = call.k_nope
        seen[call.layer] = k.split(1) if rows is None else [k[:, :, row] for row in rows]
        return call.dense()

    with host.intercept(model, keep):
        tiny.logits(model, ids, **inputs)
    after = torch.cat([mask, torch.ones(2, 16, dtype=torch.long)], 1)
    end = {"attention_mask": after, "position_ids": (after.cumsum(-1) - 1)[:, -16:]}
    if side == "right" and tiny.full_layers(model) == [0, 2]:
        with pytest.raises(NotImplementedError, match="padding between a row's tokens took the place"):
            tiny.logits(model, tiny.tokens(2, 16, seed=3), cache=cache, **end)
        return
    tiny.logits(model, tiny.tokens(2, 16, seed=3), cache=cache, **end)
    used = host.usage(model)
    assert used.pop("sparse") > 0
    if side == "right":
        # Padding between its tokens: where they were rotated cannot be told, so this row is dense.
        assert list(used) == [UNKNOWN_POSITIONS]
        assert all(one.kept.tokens == [88, 0] for one in cache.seerattention_summaries.values())
    else:
        assert used == {}
    for layer, row in ((layer, row) for layer in seen for row in (0, 1)):
        k_nope, summaries = seen[layer][row], cache.seerattention_summaries[layer]
        whole = min(k_nope.shape[2], summaries.kept.tokens[row]) // 16 * 16
        if not whole:
            continue
        gate, positions = summaries.kept.scorer, torch.arange(whole)
        with torch.no_grad():
            expected = gate.compress(k_nope[:, :, :whole], positions=positions)
            exact = copy.deepcopy(gate).double().compress(k_nope[:, :, :whole].double(), positions=positions)
        got = summaries.read()[row : row + 1, :, : expected.shape[2]]
        # Rotating there and back rounds twice more than the comparison.
        assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 8 * torch.finfo(
            torch.float32
        ).eps * max(k_nope.abs().max(), exact.abs().max())


def test_positions_that_count_the_padding_on_the_left(tiny):
    """As transformers makes them by itself."""
    case, ids, mask = Case(tiny), tiny.tokens(2, 96), torch.ones(2, 96, dtype=torch.long)
    cache = case.cache()
    mask[1, :5] = 0
    with host.dense(case.model):
        tiny.logits(case.model, ids[:, :64], cache=cache, attention_mask=mask[:, :64])
    _, how = case.feed(ids[:, 64:], cache, attention_mask=mask)
    assert how == {"sparse"}


@pytest.mark.parametrize(
    ("filled", "positions"), [("sparse", "true"), ("sparse", "counted"), ("dense", "true")]
)
def test_keys_taken_out_are_never_summarised_at_wrong_places(tiny, filled, positions):
    """As libraries that compress caches do it. New tokens go on where they are, or where the cache ends."""
    case, ids, keep = Case(tiny), tiny.tokens(1, 160), torch.tensor([*range(20), *range(47, 80)])
    cache = case.cache()
    if filled == "sparse":
        case.feed(ids[:, :80], cache)
    else:
        with host.dense(case.model):
            tiny.logits(case.model, ids[:, :80], cache=cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    begin = 80
    for size in (20, 1, 1, 40, 16):
        end = begin + size
        part = {"position_ids": torch.arange(begin, end)[None]} if positions == "true" else {}
        before = copy.deepcopy(cache)
        out, how = case.feed(ids[:, begin:end], cache, **part)
        assert how == {DECODING if size == 1 else UNKNOWN_POSITIONS}
        with host.intercept(case.model, lambda call: call.dense()):
            assert torch.equal(tiny.logits(case.model, ids[:, begin:end], cache=before, **part), out)
        begin = end
    cache.crop(-cache.get_seq_length())
    out, how = case.feed(ids, cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


def test_keys_taken_out_of_one_row(tiny):
    case, ids = Case(tiny), tiny.tokens(2, 112)
    cache, mask = case.cache(), torch.ones(2, 112, dtype=torch.long)
    case.feed(ids[:, :80], cache)
    # What stays of the second row moves to the right, its first 30 columns are padding from now on.
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            x[1, :, 30:] = x[1, :, [*range(10), *range(40, 80)]].clone()
    mask[1, :30] = 0
    positions = torch.arange(80, 112).expand(2, -1)
    out, how = case.feed(ids[:, 80:], cache, attention_mask=mask, position_ids=positions)
    assert how == {"sparse", UNKNOWN_POSITIONS}
    case.assert_like_one_shot(out[:1], ids[:1])


def test_angles_that_depend_on_the_length_are_not_turned_back(tiny):
    model, ids = tiny.make("phi3-longrope"), tiny.tokens(1, 80)
    cache = DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :64], cache=cache)
    host.attach(model, tiny.gates_for(model), "top_k:0.8", min_tokens=0)
    tiny.logits(model, ids[:, 64:], cache=cache)
    assert list(host.usage(model)) == [
        "dense: cached keys have no summaries, and cannot be rotated back: RoPE is of type longrope, and its "
        "angles depend on how long the text was when a key was rotated"
    ]


def test_filled_by_the_dense_model(tiny):
    """A text read before attaching, continued sparsely; reading all of it is what the dense model does."""
    model, ids = tiny.make(), tiny.tokens(1, 60)
    cache = DynamicCache(config=model.config)
    gold, dense = tiny.gold_logits(model, ids), tiny.logits(model, ids)
    tiny.logits(model, ids[:, :40], cache=cache)
    host.attach(model, tiny.gates_for(model), "top_k:1", min_tokens=0)
    out = tiny.logits(model, ids[:, 40:], cache=cache)
    assert host.usage(model) == {"sparse": 2}
    tiny.assert_as_close(out, dense[:, 40:], gold[:, 40:])


def test_other_gates_make_their_own_summaries(tiny):
    case, ids = Case(tiny), tiny.tokens(1, 64)
    cache = case.cache()
    case.feed(ids[:, :48], cache)
    first = cache.seerattention_summaries[0].read()
    other = host.new_gates(case.model, block_size=16, init="random")
    host.attach(case.model, other, case.policy, min_tokens=0)
    _, how = case.feed(ids[:, 48:], cache)
    assert how == {"sparse"}
    second = cache.seerattention_summaries[0]
    assert second.kept.scorer is dict(other.items())[0]
    # Four-token sub-blocks.
    assert second.read().shape[2] == 64 // 4
    assert not torch.equal(second.read()[:, :, :6], first[:, :, :6])


def test_copied_cache(tiny):
    """A prefix computed once serves several continuations."""
    case, prefix = Case(tiny), tiny.tokens(1, 48)
    cache = case.cache()
    case.feed(prefix, cache)
    for seed in (2, 3):
        branch, end = copy.deepcopy(cache), tiny.tokens(1, 32, seed=seed)
        out, how = case.feed(end, branch)
        assert how == {"sparse"}
        case.assert_like_one_shot(out, torch.cat([prefix, end], 1))
        assert branch.get_seq_length() == 80
    assert cache.get_seq_length() == 48


def test_padding_that_begins_in_a_later_piece(tiny):
    case, ids = Case(tiny), tiny.tokens(2, 64)
    cache = case.cache()
    _, how = case.feed(ids[:, :32], cache)
    assert how == {"sparse"}
    mask = torch.ones(2, 64)
    mask[1, 48:] = 0
    out, how = case.feed(ids[:, 32:], cache, attention_mask=mask)
    assert how == {"sparse"}
    case.assert_like_one_shot(out[:1], ids[:1])
    case.assert_like_one_shot(out[1:, :16], ids[1:, :48])


def test_decoded_tokens_are_summarised_too(tiny):
    """A chat: prompt, decoded answer, next prompt. All of it selects as if given at once."""
    case, ids = Case(tiny), tiny.tokens(1, 80)
    cache = case.cache()
    case.feed(ids[:, :32], cache)
    for token in range(32, 48):
        _, how = case.feed(ids[:, token : token + 1], cache)
        assert how == {DECODING}
    _, how = case.feed(ids[:, 48:], cache)
    assert how == {"sparse"}
    summaries = cache.seerattention_summaries[0]
    gate = summaries.kept.scorer
    at_once = {}

    def keep(call):
        at_once[call.layer] = gate.compress(call.k_nope, positions=call.positions)
        return call.dense()

    with host.intercept(case.model, keep):
        tiny.logits(case.model, ids)
    # The first layer's keys do not depend on how attention was computed.
    tiny.assert_as_close(summaries.read(), at_once[0], at_once[0].double())


def test_static_cache_by_hand(tiny, kind):
    case, ids = Case(tiny, kind), tiny.tokens(2, 64)
    cache = StaticCache(config=case.model.config, max_cache_len=128)
    outs = [case.feed(part, cache) for part in ids.split((32, 16, 16), 1)]
    assert all(how == {"sparse"} for _, how in outs)
    case.assert_like_one_shot(torch.cat([out for out, _ in outs], 1), ids)
    cache.reset()
    out, how = case.feed(ids, cache)
    assert how == {"sparse"}
    case.assert_like_one_shot(out, ids)


def test_beams_then_a_continuation(tiny):
    """Beams trade places at every step; the continuation makes new summaries of what moved."""
    case, ids, end = Case(tiny), tiny.tokens(1, 40), tiny.tokens(3, 20, seed=2)
    cache = case.cache()
    kept = host.cache_argument(case.model, cache)
    case.model.generate(ids, max_new_tokens=26, num_beams=3, do_sample=False, **kept)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    _, how = case.feed(end, cache)
    assert how == {"sparse"}
    for layer, summaries in ((i, cache.seerattention_summaries[i]) for i in (0, 1)):
        keys = cache.layers[layer].keys
        positions = torch.arange(keys.shape[2]).expand(3, -1)
        back = Unrotate(case.model)(layer, keys, positions)
        with torch.no_grad():
            expected = summaries.kept.scorer.compress(back, positions=positions[0])
        tiny.assert_as_close(summaries.read(), expected, expected.double())


def rename_cache(model, name):
    """Let attention modules take their cache by another name, as from another transformers."""
    (own,) = host.cache_argument(model, None)
    for layer in model.model.layers:

        def renamed(module, args, kwargs):
            return args, {name if key == own else key: value for key, value in kwargs.items()}

        def forward(*args, plain=layer.self_attn.forward, **kwargs):
            return plain(*args, **{own if key == name else key: value for key, value in kwargs.items()})

        layer.self_attn.register_forward_pre_hook(renamed, with_kwargs=True, prepend=True)
        layer.self_attn.forward = forward


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name_of_the_cache_is_taken(tiny, name):
    results = []
    for rename in (False, True):
        model = tiny.make()
        host.attach(model, tiny.gates_for(model), "threshold:0.2", min_tokens=0)
        if rename:
            rename_cache(model, name)
        cache = StaticCache(config=model.config, max_cache_len=128)
        results.append([tiny.logits(model, part, cache) for part in tiny.tokens(1, 97).split((64, 32, 1), 1)])
        assert cache.seerattention_summaries[0].kept.tokens == [97]
    assert all(map(torch.equal, *results))


def test_a_cache_by_an_unknown_name_is_refused(tiny):
    model = tiny.make()
    ids, dense = tiny.tokens(1, 96), tiny.logits(model, tiny.tokens(1, 96))
    tiny.attach_full(model)
    rename_cache(model, "kv_store")
    message = r"layer 0 attends to 128 keys, 96 of them new, .* only .*kv_store.*, by transformers 5\."
    with pytest.raises(RuntimeError, match=message):
        tiny.logits(model, ids, StaticCache(config=model.config, max_cache_len=128))
    # A growing cache is needed from the second call on.
    cache = DynamicCache(config=model.config)
    tiny.assert_as_close(tiny.logits(model, ids, cache), dense, tiny.gold_logits(tiny.make(), ids))
    for tokens in (1, 32):
        with pytest.raises(RuntimeError, match=f"{tokens} of them new"):
            tiny.logits(model, ids[:, :tokens], cache)


def test_a_model_that_takes_no_cache_is_refused(tiny):
    class Renamed(type(tiny.make())):
        def forward(self, input_ids, kv_store=None): ...

    with pytest.raises(RuntimeError, match="Renamed takes no KV cache, only self, input_ids, kv_store"):
        host.cache_argument(Renamed(tiny.make().config), DynamicCache())


def test_the_oldest_transformers_is_named():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    floor = re.search(r'"transformers>=(\d+\.\d+)', project)
    assert f"versions {floor[1]} to" in CACHE
