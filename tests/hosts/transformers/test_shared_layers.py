"""Gates that serve several layers: later ones read what the first of them chose."""

import pytest
import torch
from transformers import DynamicCache

from seerattention.calibration.fit import Target
from seerattention.calibration.search import calibrate
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.family import full_attention_layers
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.policies import parse, select
from seerattention.rows import Rows
from tests.hosts.transformers.batches import POLICY, Chosen, assert_as_alone, prompts_of

RULE = "top_k:0.8,sink_blocks=1"


class Masks:
    """What every layer read, call by call."""

    def __init__(self):
        self.of = {}

    def __call__(self, layer, call, selection):
        self.of.setdefault(layer, []).append(selection.to_mask())

    def differ(self, one, other):
        return any(not torch.equal(a, b) for a, b in zip(self.of[one], self.of[other], strict=True))


def shared(tiny, kind="llama", **options):
    """A model whose gates, of layers 0, 2 and 4, serve two layers each or the last alone; what it reads."""
    model, seen = tiny.make(kind, num_hidden_layers=5), Masks()
    gates = tiny.gates_for(model, layers_per_gate=2, phase="both")
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    options = {"prefill": RULE, "min_tokens": 0, "observe": seen, **options}
    return host.attach(model, gates, **options), gates, seen


@pytest.mark.parametrize("named", ["llama", "qwen3", "glm4"])
@pytest.mark.parametrize("length", [157, 240])
def test_layers_equal_their_slow_computation(tiny, named, length):
    model, gates, seen = shared(tiny, named)
    ids, kept = tiny.tokens(1, length), {}
    assert [index for index, _ in gates.items()] == [0, 2, 4]
    assert gates.shared(full_attention_layers(model)) == {1: 0, 3: 2}

    def by_hand(call):
        if call.layer in (0, 2, 4):
            scores = dict(gates.items())[call.layer](call.q_nope, call.k_nope, positions=torch.arange(length))
            rows = Rows.last(length, length)
            kept["now"] = select(parse(RULE), scores, rows=rows, block_size=(16, 16))
        q, k, v = call.q, call.k, call.v
        return block_sparse_attention(q, k, v, kept["now"], scale=call.scale, backend="reference")

    out = tiny.logits(model, ids)
    with host.intercept(model, by_hand):
        slow = tiny.logits(model, ids)
    torch.testing.assert_close(out, slow, rtol=1e-4, atol=1e-4)
    assert sorted(seen.of) == [0, 1, 2, 3, 4]
    assert not seen.differ(0, 1)
    assert not seen.differ(2, 3)
    assert seen.differ(1, 2)
    assert seen.differ(3, 4)
    assert host.usage(model) == {"sparse": 5}


def test_rows_that_are_dense_are_so_in_all_layers(tiny):
    """A padded batch with a prompt that is too short to be sparse."""
    model, _, seen = shared(tiny, min_tokens=64)
    ids, mask = tiny.tokens(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[1, :70] = 0
    mask[2, :9] = 0
    out = tiny.logits(model, ids, attention_mask=mask)
    assert host.usage(model)["sparse"] == 5
    assert len(host.usage(model)) == 2
    assert set(host.usage(model).values()) == {5}
    assert not seen.differ(0, 1)
    for row, first in ((0, 0), (1, 70), (2, 9)):
        alone = tiny.logits(model, ids[row : row + 1, first:])
        torch.testing.assert_close(out[row, first:], alone[0], rtol=1e-4, atol=1e-4)


def test_a_prompt_in_pieces_reads_what_it_does_at_once(tiny):
    (model, _, seen), ids = shared(tiny), tiny.tokens(1, 165)
    out = tiny.logits(model, ids)
    whole, seen.of = seen.of, {}
    cache = DynamicCache(config=model.config)
    pieces = host.prefill(model, ids, cache, piece_tokens=48).logits
    torch.testing.assert_close(pieces[:, -1], out[:, -1], rtol=1e-4, atol=1e-4)
    for layer, (mask,) in whole.items():
        rows = [torch.nn.functional.pad(m, (0, mask.shape[3] - m.shape[3])) for m in seen.of[layer]]
        assert torch.equal(torch.cat(rows, 2), mask)


@pytest.mark.parametrize("prefill", [RULE, "dense"])
def test_decoding(tiny, prefill):
    """Dynamic, static and padded: layers that share read the same in every step."""
    decode = "token_budget:48"
    (model, _, seen), ids = shared(tiny, prefill=prefill, decode=decode), tiny.tokens(2, 90)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    text = model.generate(ids, **greedy)
    assert host.usage(model)["sparse: decoding step"] == 5 * 11
    for one, other in ((0, 1), (2, 3)):
        assert len(seen.of[one]) >= 11
        assert not seen.differ(one, other)
    assert seen.differ(1, 2)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), text)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    padded = model.generate(ids, attention_mask=mask, **greedy)
    assert torch.equal(padded[0], text[0])
    assert torch.equal(padded[1, 90:], model.generate(ids[1:, 25:], **greedy)[0, 65:])


def test_gates_of_their_own_for_decoding_share_as_they_do(tiny):
    """Prefill by a gate per layer, decoding by one of two layers, and the other way round."""
    ids = tiny.tokens(1, 190)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for prefill, decode in ((1, 2), (2, 1)):
        model, seen = tiny.make(num_hidden_layers=4), Masks()
        gates = tiny.gates_for(model, layers_per_gate=prefill)
        own = tiny.gates_for(model, layers_per_gate=decode, phase="decode")
        host.attach(
            model, gates, RULE, decode="token_budget:48", decode_gates=own, min_tokens=0, observe=seen
        )
        model.generate(ids, **greedy)
        first, steps = [m[0] for m in seen.of.values()], [m[1:] for m in seen.of.values()]
        assert torch.equal(first[2], first[3]) == (prefill == 2)
        assert all(map(torch.equal, steps[2], steps[3])) == (decode == 2)
        for part in range(2):
            expected = {0, 2} if (prefill, decode)[part] == 2 else {0, 1, 2, 3}
            assert {i for i, _ in (gates, own)[part].items()} == expected


def test_served_together(tiny):
    model, seen = tiny.make(num_hidden_layers=4), Chosen()
    host.attach(model, tiny.gates_for(model, layers_per_gate=2), POLICY, min_tokens=0, observe=seen)
    assert_as_alone(model, seen, prompts_of(tiny, 170, 33, 96), max_batch_tokens=112)


def test_saved_and_loaded(tiny, tmp_path):
    (model, _, _), ids = shared(tiny), tiny.tokens(1, 100)
    out = tiny.logits(model, ids)
    host.save_gates(model, tmp_path / "gates")
    loaded = host.load_gates(tmp_path / "gates")
    assert [index for index, _ in loaded.items()] == [0, 2, 4]
    host.attach(model, loaded, RULE, min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), out)


def test_a_layer_whose_chooser_did_not_run(tiny):
    model, _, _ = shared(tiny)
    decoder = model.get_decoder()
    hidden = torch.randn(1, 40, 64)
    positions = torch.arange(40)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    with pytest.raises(RuntimeError, match="layer 1 reads what layer 0 chose, which was not called before"):
        decoder.layers[1](hidden, position_ids=positions, position_embeddings=rotary)


@pytest.mark.parametrize("wrong", [0, 6, -1, 1.5, "2"])
def test_so_many_layers_per_gate_that_there_are(tiny, wrong):
    model = tiny.make(num_hidden_layers=5)
    with pytest.raises(ValueError, match="layers_per_gate must be a whole number from 1 to 5"):
        tiny.gates_for(model, layers_per_gate=wrong)


@pytest.mark.parametrize("missing", ["0", "2", "3"])
def test_gates_that_are_not_of_every_nth_layer(tiny, missing):
    model = tiny.make(num_hidden_layers=4)
    gates = tiny.gates_for(model)
    del gates.layers[missing]
    with pytest.raises(ValueError, match=r"these gates are for layers \[.*\]; the model's full-attention"):
        host.attach(model, gates, RULE)


def test_calibrated(tiny):
    """Limits are found on the layers that choose, and hold for those that read the same."""
    model, seen = tiny.make(num_hidden_layers=4), Masks()
    gates, text = tiny.gates_for(model, layers_per_gate=2), tiny.tokens(1, 4 * 512)[0].numpy()
    found = calibrate(model, gates, text, Target(density=0.5), length=512, windows=2)
    assert sorted(found.policy.calibration.laws) == [0, 2]
    host.attach(model, gates, found.policy, min_tokens=0, observe=seen)
    tiny.logits(model, torch.from_numpy(text[None, -512:]))
    assert not seen.differ(0, 1)
    assert seen.differ(1, 2)
    assert found.rows[-1]["density"] == pytest.approx(0.5, abs=0.1)
