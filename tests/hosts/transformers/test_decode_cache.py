"""Steps of decoding go on from the cache as it is: cropped, copied, reordered, written to, filled by others.

What a step must give after any change of the cache: the same as when all summaries are made again from it.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from seerattention import baselines
from seerattention.engine import steps, summaries
from seerattention.engine.call import Held
from seerattention.engine.kept import Kept
from seerattention.hosts import transformers as host

SPARSE = "sparse: decoding step"
UNKNOWN_POSITIONS = (
    "dense: cached keys have no summaries, and cannot be rotated back: their positions are not known"
)


class Case:
    """A model that decodes sparsely, in fp32 and fp64, and a text."""

    def __init__(self, tiny, kind="llama", batch=1, **options):
        self.tiny, self.model, self.gold = tiny, tiny.make(kind), tiny.make(kind).double()
        for model in (self.model, self.gold):
            gates = tiny.gates_for(model, phase="both")
            options = {"prefill": "threshold:0.2", "decode": "token_budget:48", "min_tokens": 0, **options}
            host.attach(model, gates, **options)
        self.ids = tiny.tokens(batch, 200)

    def run(self, model, prompt, changes, static=False):
        """Give a prompt, then after every change of the cache some tokens; returns their logits."""
        cache = (
            StaticCache(config=model.config, max_cache_len=192)
            if static
            else DynamicCache(config=model.config)
        )
        self.now = model
        outs, end = [self.tiny.logits(model, self.ids[:, :prompt], cache=cache)], prompt
        for change, tokens in changes:
            cache = change(cache) or cache
            rows = torch.arange(len(cache.layers[0].keys)) % len(self.ids)
            part = self.ids[rows, end : end + tokens]
            outs.append(self.tiny.logits(model, part, cache=cache))
            end += tokens
        return outs, cache

    def assert_right(self, prompt, changes, static=False):
        """Every step is the one with summaries that are all made again from the cache."""

        def forget(change):
            def changed(cache):
                cache = change(cache) or cache
                cache.seerattention_summaries.clear()
                return cache

            return changed

        got, cache = self.run(self.model, prompt, changes, static)
        again = [(forget(change), tokens) for change, tokens in changes]
        expected = self.run(self.model, prompt, again, static)[0]
        gold = self.run(self.gold, prompt, again, static)[0]
        for one, other, exact in zip(got, expected, gold, strict=True):
            self.tiny.assert_as_close(one, other, exact)
        return cache


def nothing(cache):
    return None


@pytest.fixture
def compared(monkeypatch):
    """How often cached keys were compared with those that were summarised."""
    calls, own = [], Kept.compared

    def counted(kept, keys, past):
        calls.append(past)
        return own(kept, keys, past)

    monkeypatch.setattr(Kept, "compared", counted)
    return calls


@pytest.mark.parametrize("static", [False, True])
def test_steps_compare_nothing(tiny, compared, static):
    """But for the first one where the cache grows, and a static cache's pieces are known from the start."""
    case = Case(tiny)
    case.run(case.model, 70, [(nothing, 1)] * 20 + [(nothing, 9)] * 5, static)
    assert len(compared) == (0 if static else 2)
    # Nor does the next piece of a prompt: what the buffers hold is known to be of these keys.
    case.run(case.model, 70, [(nothing, 1)] * 20 + [(nothing, 30)], static)
    assert len(compared) == (0 if static else 4)


@pytest.mark.parametrize("before", [1, 9, 10])
@pytest.mark.parametrize("removed", [1, 3, 8, 9, 12, 25])
def test_cropped(tiny, compared, removed, before):
    """Inside the unfinished block, at its beginning, and into finished ones."""
    case = Case(tiny)
    crop = lambda cache: cache.crop(-removed)  # noqa: E731
    case.assert_right(
        70, [(nothing, 1), (nothing, before), (crop, 1), (nothing, 9), (crop, 20), (nothing, 1)]
    )


@pytest.mark.parametrize("removed", [3, 25])
def test_a_static_cache_is_cropped(tiny, removed):
    """Its tensors stay the same, and only the device is told how many tokens are left."""

    def crop(cache):
        for layer in cache.layers:
            layer.cumulative_length.sub_(removed)

    changes = [(nothing, 1), (nothing, 9), (crop, 1), (nothing, 9), (crop, 20), (nothing, 1)]
    Case(tiny).assert_right(70, changes, static=True)


def test_prefill_knows_of_crops_before_steps_of_other_gates(tiny):
    """A turn whose steps follow a crop into the prompt, and then a prompt again."""
    quest = baselines.create("quest", block_size=(16, 16))
    case = Case(tiny, decode_gates=quest)
    crop = lambda cache: cache.crop(-12)  # noqa: E731
    case.assert_right(70, [(nothing, 1), (crop, 1), (nothing, 9), (nothing, 20)])
    assert set(host.usage(case.model)) == {"sparse", SPARSE}


def test_a_crop_of_what_is_unfinished_costs_nothing(tiny, compared):
    """As at every step of assisted decoding; and the steps are exactly those without the tokens cropped."""
    case = Case(tiny)
    plain = case.run(case.model, 70, [(nothing, 1), (nothing, 3), (nothing, 2)])[0]
    count = len(compared)
    cache = DynamicCache(config=case.model.config)
    outs = []
    for begin, end, gone in ((0, 70, 0), (70, 71, 0), (71, 79, 5), (74, 76, 0)):
        outs.append(tiny.logits(case.model, case.ids[:, begin:end], cache=cache))
        cache.crop(-gone)
    assert len(compared) == 2 * count
    tiny.assert_as_close(
        outs[3], plain[3], case.run(case.gold, 70, [(nothing, 1), (nothing, 3), (nothing, 2)])[0][3]
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
        lambda cache: setattr(cache, "changed", cache.layers[0].keys.mul_(1.5)),
        lambda cache: setattr(cache, "changed", cache.layers[1].keys[:, :, 20:24].zero_()),
        lambda cache: setattr(cache.layers[1], "keys", cache.layers[1].keys.clone()),
    ],
    ids=["swap", "double", "select", "repeat", "copy", "pickle", "scale", "zero", "clone"],
)
def test_changed(tiny, change):
    case = Case(tiny, batch=3)
    case.assert_right(
        70, [(nothing, 1), (nothing, 1), (change, 1), (nothing, 7), (change, 5), (nothing, 25), (change, 1)]
    )


def test_copies_go_on_alone(tiny, compared):
    """Nothing is compared, and what one of them decodes is not in the other's summaries."""
    case = Case(tiny)
    others = tiny.tokens(1, 40, seed=9)
    cache = case.run(case.model, 70, [(nothing, 1), (nothing, 1)])[1]
    count = len(compared)
    branches = [(copy.deepcopy(cache), others), (cache, case.ids[:, 72:112])]
    for token in range(40):
        for branch, text in branches:
            tiny.logits(case.model, text[:, token : token + 1], cache=branch)
    assert len(compared) == count
    for branch, _ in branches:
        again = copy.deepcopy(branch)
        again.seerattention_summaries.clear()
        for one in (branch, again):
            # A piece reads what the steps left.
            tiny.logits(case.model, case.ids[:, 112:132], cache=one)
        got, expected = (one.seerattention_summaries[0].read() for one in (branch, again))
        tiny.assert_as_close(got, expected, expected.double())


@pytest.mark.parametrize("static", [False, True])
def test_inference_mode_comes_and_goes(tiny, static):
    """Buffers outlive the mode in which they were made, and inference tensors are told by themselves."""
    case = Case(tiny)
    plain, outs = case.run(case.model, 70, [(nothing, 1)] * 3)[0], []
    for inside in ((True, False, True, False), (False, True, False, True)):
        kind = {"max_cache_len": 96} if static else {}
        cache = (StaticCache if static else DynamicCache)(config=case.model.config, **kind)
        with torch.inference_mode():
            # A static cache's own tensors are made here.
            outs.append([tiny.logits(case.model, case.ids[:, :70], cache=cache)])
        for mode, token in zip(inside[: 0 if static else 3], range(70, 73), strict=False):
            with torch.inference_mode(mode):
                outs[-1].append(tiny.logits(case.model, case.ids[:, token : token + 1], cache=cache).clone())
    for some in outs:
        assert all(map(torch.equal, some, plain))


def test_inference_tensors_are_cropped(tiny, compared):
    """As at every step of assisted decoding: a view that does not say what it is of is told by its memory."""
    case = Case(tiny)
    crop = lambda cache: cache.crop(-2)  # noqa: E731
    changes = [(nothing, 1), (nothing, 3), (nothing, 1), (crop, 3), (crop, 1), (nothing, 1)]
    plain = case.run(case.model, 70, changes)[0]
    count = len(compared)
    with torch.inference_mode():
        outs = case.run(case.model, 70, changes)[0]
    assert all(map(torch.equal, outs, plain))
    assert len(compared) == 2 * count


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["dense", "policy", "copy"])
def test_a_static_cache_goes_on_after_dense_steps(tiny, how, inference):
    """Inside `dense`, by the policy, and in a copy made after them, whatever mode the cache was made in."""
    quest = baselines.create("quest", block_size=(16, 16))
    case = Case(tiny, decode="threshold:0.15", decode_gates=quest if how == "policy" else None)

    def dense_step(cache):
        part = case.ids[:, -3:]
        if how == "policy":
            host.set_policy(case.now, decode="dense")
            case.tiny.logits(case.now, part, cache=cache)
            host.set_policy(case.now, decode="threshold:0.15")
            return cache
        with host.dense(case.now):
            case.tiny.logits(case.now, part, cache=cache)
        return copy.deepcopy(cache) if how == "copy" else cache

    with torch.inference_mode(inference):
        case.assert_right(70, [(nothing, 1), (nothing, 1), (dense_step, 15), (nothing, 9)], static=True)


class EightBits(QuantizedLayer):
    """Gives keys back as it stored them, in steps of a 127th of their greatest value."""

    def _quantize(self, tensor, axis):
        step = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / step).round(), step

    def _dequantize(self, stored):
        return stored[0] * stored[1]


def test_a_quantised_cache_is_compared_at_every_step(tiny, compared):
    """Its keys are others after they were rounded, and its beams are reordered where nobody sees it."""
    case, ids = Case(tiny), tiny.tokens(2, 90)
    cache = Cache(layers=[EightBits(nbits=8, residual_length=8) for _ in range(2)])
    cache.seerattention_summaries, outs = {}, []
    for end in (70, *range(71, 91)):
        begin = cache.get_seq_length()
        again = copy.deepcopy(cache)
        again.seerattention_summaries.clear()
        for one in (cache, again):
            outs.append(tiny.logits(case.model, ids[:, begin:end], cache=one))
        if end == 80:
            cache.reorder_cache(torch.tensor([1, 0]))
    assert len(compared) >= 2 * 20
    assert host.usage(case.model) == {"sparse": 4, SPARSE: 80}
    for got, expected in zip(outs[::2], outs[1::2], strict=True):
        assert (got - expected).abs().max() < (got - outs[0][:, -1:]).abs().max() / 100


def test_filled_by_others(tiny):
    """By the dense model, or beside other gates: the steps read what the cache holds."""
    case = Case(tiny)
    for model in (case.model, case.gold):
        host.add_gates(model, "other", tiny.gates_for(model, phase="both", init="random").to(model.dtype))

    def dense(cache):
        with host.dense(case.now):
            tiny.logits(case.now, case.ids[:, :7], cache=cache)

    def gates(name):
        return lambda cache: host.set_gates(case.now, name)

    case.assert_right(
        70, [(dense, 1), (nothing, 3), (dense, 2), (gates("other"), 1), (nothing, 1), (gates("default"), 1)]
    )
    assert set(host.usage(case.model)) == {"sparse", SPARSE}


def test_keys_taken_out_make_steps_dense(tiny):
    case = Case(tiny)

    def take(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    cache = case.run(case.model, 70, [(nothing, 1)] * 20)[1]
    take(cache)
    before = host.usage(case.model)
    for token in range(90, 94):
        tiny.logits(case.model, case.ids[:, token : token + 1], cache=cache)
    after = host.usage(case.model)
    assert {how for how in after if after[how] != before.get(how)} == {UNKNOWN_POSITIONS}


def test_a_static_cache_is_reset_and_used_again(tiny, compared):
    """Its buffers stay the same tensors, as graphs need them."""
    case, ids = Case(tiny), tiny.tokens(1, 96, seed=5)
    cache = case.run(case.model, 70, [(nothing, 1)] * 5, static=True)[1]
    buffers = [(one.steps.summaries, one.steps.tail) for one in cache.seerattention_summaries.values()]
    places = [x.data_ptr() for both in buffers for x in both]
    cache.reset()
    got = [tiny.logits(case.model, part, cache=cache) for part in ids.split((70, *(1,) * 26), 1)]
    after = [(one.steps.summaries, one.steps.tail) for one in cache.seerattention_summaries.values()]
    assert [x.data_ptr() for both in after for x in both] == places
    fresh = StaticCache(config=case.model.config, max_cache_len=192)
    expected = [tiny.logits(case.model, part, cache=fresh) for part in ids.split((70, *(1,) * 26), 1)]
    assert all(map(torch.equal, got, expected))


def test_a_short_prompt_of_a_static_cache_is_a_step(tiny):
    """Only the device knows that nothing came before it, and its own block is all of it."""
    case, outs = Case(tiny), []
    for static in (False, True):
        outs.append(case.run(case.model, 9, [(nothing, 1)] * 30, static)[0])
    gold = case.run(case.gold, 9, [(nothing, 1)] * 30)[0]
    for got, expected, exact in zip(outs[1], outs[0], gold, strict=True):
        tiny.assert_as_close(got, expected, exact)


@pytest.mark.parametrize(
    "bug", ["trusts any tensor", "does not count writes", "keeps the tail", "adds nothing"]
)
def test_planted_bugs_are_noticed(tiny, monkeypatch, bug):
    """The checks of this file fail where summaries are stale."""
    case = Case(tiny, decode="threshold:0.15")
    swap = lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1]))  # noqa: E731
    scale = lambda cache: setattr(cache, "changed", cache.layers[0].keys.neg_())  # noqa: E731
    crop = lambda cache: cache.crop(-12)  # noqa: E731
    if bug == "trusts any tensor":
        monkeypatch.setattr(summaries._Seen, "removed", lambda seen, now: 0)
        case, change = Case(tiny, batch=3, decode="threshold:0.15"), swap
    elif bug == "does not count writes":
        monkeypatch.setattr(
            Held, "of", classmethod(lambda cls, keys, length, calls=0: cls(keys, length, (None, None, 0)))
        )
        change = scale
    elif bug == "keeps the tail":
        monkeypatch.setattr(steps.Steps, "left", lambda buffers, past: past)
        change = crop
    else:
        monkeypatch.setattr(steps, "update_summaries", lambda *args, **kwargs: None)
        change = nothing
    with pytest.raises(AssertionError, match="is over the budget"):
        case.assert_right(
            70, [(nothing, 1), (nothing, 10), (change, 1), (nothing, 15), (nothing, 15), (nothing, 15)]
        )
