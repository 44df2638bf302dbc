"""What single families need: soft-caps, sinks, rotated parts of a head, layers without RoPE, refusals."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Gemma3TextConfig, Llama4TextConfig

from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.family import family_of, halves
from seerattention.measure.observe import Watch
from seerattention.ops.dense_attention import dense_attention
from seerattention.policies import parse, select
from seerattention.rows import Rows
from seerattention.testing.budget import Budget
from seerattention.train import DistillConfig, Distiller

SCORED = ["olmo3", "smollm3", "phi3", "phi3-longrope", "glm4", "gemma2", "gemma3_text", "gpt_oss"]


@pytest.mark.parametrize("name", SCORED)
def test_scores_by_a_formula(tiny, name):
    """Pool, project, rotate by the model's own code and multiply, from q and k as the model has them."""
    length, block = 80, tiny.block
    model = tiny.make(name)
    gates = tiny.gates_for(
        model, q_pool=("avg",), k_pool=("max", "avg"), q_sub_block=block, k_sub_block=block, shares=False
    )
    order = torch.tensor(tiny.order(model))
    seen = []
    host.attach(model, gates, "top_k:0.8", min_tokens=0, observe=lambda *call: seen.append(call))
    tiny.logits(model, tiny.tokens(2, length))
    assert [layer for layer, _, _ in seen] == tiny.full_layers(model)
    for layer, call, _ in seen:
        gate = dict(gates.items())[layer]
        assert gate.config.dim == call.q.shape[-1]
        starts = torch.arange(0, length, block)
        # The call's q and k after the rotary embedding, turned back: independent of the family's taps.
        q, k = (unrotated(tiny, model, layer, x.double())[..., order] for x in (call.q, call.k))
        q, k = q.unflatten(2, (-1, block)), k.unflatten(2, (-1, block))
        q = q.mean(3)
        k = torch.cat([k.amax(3), k.mean(3)], -1)
        q, k = (
            torch.einsum("bhnd,hde->bhne", x, linear.weight.double())
            for x, linear in ((q, gate.linear_q), (k, gate.linear_k))
        )
        turned = []
        for x in (q, k):
            there = torch.empty_like(x)
            there[..., order] = x
            turned.append(tiny.rotated(model, layer, there, starts[None]))
        q, k = turned
        expected = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
        actual = gate(call.q_nope, call.k_nope).double()
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def unrotated(tiny, model, layer, x):
    """Solve for what the model's rotation, which is linear, makes into ``x`` (``[B, H, T, D]``)."""
    size, length = x.shape[-1], x.shape[2]
    basis = torch.eye(size, dtype=x.dtype)[None, :, None].expand(1, size, length, size)
    matrix = tiny.rotated(model, layer, basis, torch.arange(length)[None])[0].transpose(0, 1)
    return torch.linalg.solve(matrix, x.transpose(1, 2), left=False).transpose(1, 2)


NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
BY_LENGTH = {
    "longrope": ("phi3-longrope", {"original_max_position_embeddings": 256}),
    # Not at a block's border.
    "longrope from 250": ("phi3-longrope", {"original_max_position_embeddings": 250}),
    "dynamic": ("llama", {"rope_parameters": NTK, "max_position_embeddings": 256}),
}


def seen_by_length(tiny, name, ids, sub_block=16, **inputs):
    """A model's calls and selections with the gates that made them, and its rotary module after the pass."""
    kind, changes = BY_LENGTH[name]
    model, seen = tiny.make(kind, **changes), []
    gates = tiny.gates_for(model, gate_dim=16, q_sub_block=sub_block, k_sub_block=sub_block)
    host.attach(model, gates, "top_k:0.4", min_tokens=0, observe=lambda *call: seen.append(call))
    tiny.logits(model, ids, **inputs)
    own = dict(gates.items())
    return [(own[layer], call, selection) for layer, call, selection in seen], model


def chosen(tiny, model, gate, call, tokens, row=0):
    """What a gate chooses in a row if it is turned by the model's angles for all positions of a pass."""
    angles = copy.deepcopy(model.model.rotary_emb)(torch.zeros(1), torch.arange(tokens)[None])
    pairs, table = angles[0].shape[-1] // 2, (torch.ones(tokens, 16), torch.zeros(tokens, 16))
    for whole, of_pairs in zip(table, angles, strict=True):
        whole[:, :pairs] = whole[:, 8 : 8 + pairs] = of_pairs[0, :, :pairs]
    gate = copy.deepcopy(gate)
    gate.use_rotary(lambda positions: tuple(x[positions] for x in table))
    place, (length, _) = call.rows.places(call.rows.num_queries)[row], call.rows.known[row]
    scores, rows = gate(call.q_nope[:, :, place], call.k_nope[:, :, place]), Rows.last(length, length)
    return select(parse("top_k:0.4"), scores, rows=rows, block_size=gate.block_size).to_mask()


@pytest.mark.parametrize("name", BY_LENGTH)
def test_no_table_holds_angles_by_length(tiny, name):
    kind, changes = BY_LENGTH[name]
    model = tiny.make(kind, **changes)
    gates = tiny.gates_for(model, gate_dim=16)
    host.attach(model, gates, "top_k:0.4")
    gate = dict(gates.items())[0]
    assert gate.angles(64, torch.device("cpu")) is None
    assert gate.per_token().summary_options(64, queries=True) is None


@torch.no_grad()
@pytest.mark.parametrize("length", [249, 251, 256, 257, 262, 271, 272, 273, 300])
@pytest.mark.parametrize("sub_block", [4, 16])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_prompt_is_turned_by_one_set_of_factors(tiny, name, sub_block, length):
    """That of its length, whatever parts of it queries and keys are summarised in."""
    seen, model = seen_by_length(tiny, name, tiny.tokens(1, length), sub_block)
    for gate, call, selection in seen:
        assert torch.equal(selection.to_mask(), chosen(tiny, model, gate, call, length))


@torch.no_grad()
@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_batch_is_turned_by_the_factors_of_its_longest(tiny, name):
    """As the model does it."""
    ids, mask = tiny.tokens(2, 262), torch.ones(2, 262, dtype=torch.long)
    mask[0, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    seen, model = seen_by_length(tiny, name, ids, attention_mask=mask, position_ids=positions)
    for gate, call, selection in seen:
        short, long = selection.row_slice(0, 12).to_mask()[..., :12], selection.row_slice(12, 29).to_mask()
        assert torch.equal(short, chosen(tiny, model, gate, call, 262))
        assert torch.equal(long, chosen(tiny, model, gate, call, 262, row=1))


@pytest.mark.parametrize("name", BY_LENGTH)
def test_gates_leave_the_models_own_rotary_state_alone(tiny, name):
    """Some modules keep the frequencies of the longest text so far; a gate's part of a text is none."""
    kind, changes = BY_LENGTH[name]
    plain, model = (tiny.make(kind, **changes) for _ in range(2))
    host.attach(model, tiny.gates_for(model, gate_dim=16), "top_k:1", min_tokens=0)
    for length in (258, 300, 271, 200, 257):
        for each in (plain, model):
            tiny.logits(each, tiny.tokens(1, length))
        assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("length", [50, 150])
def test_longrope_is_dense_with_a_full_selection(tiny, length):
    """Below and above the length at which the model's frequencies change."""
    model, ids = tiny.make("phi3-longrope"), tiny.tokens(2, length)
    dense, gold = tiny.logits(model, ids), tiny.gold_logits(model, ids)
    tiny.attach_full(model)
    tiny.assert_as_close(tiny.logits(model, ids), dense, gold)


def test_longrope_has_no_pairs_between_its_own(tiny):
    with pytest.raises(NotImplementedError, match="gate_dim must be 16, not 8"):
        tiny.gates_for(tiny.make("phi3-longrope"), gate_dim=8, rope_pairs="spread")


def test_halves():
    assert halves(8, 8) == list(range(8))
    assert halves(8, 4) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert halves(8, 4, interleaved=True) == [0, 2, 4, 5, 1, 3, 6, 7]
    for rotated in (0, 2, 8, 16):
        assert sorted(halves(16, rotated, interleaved=True)) == list(range(16))


def test_partial_rotation_without_an_order_is_refused(tiny, monkeypatch):
    model = tiny.make("phi3")
    monkeypatch.delattr(family_of(model), "order")
    with pytest.raises(NotImplementedError, match=r"rotates 8 of 16 values of a head.*no order\(\)"):
        tiny.gates_for(model)
    host.attach(model, tiny.gates_for(model, rope=False), "top_k:0.5")


def slow(q, k, v, softcap, sinks, window):
    """One row of scores at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    past, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            seen = slice(0 if window is None else max(0, past + i + 1 - window), past + i + 1)
            scores = (k[:, h // group, seen] @ q[:, h, i, :, None])[..., 0] * 0.3
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            shares = scores.exp()
            total = shares.sum(-1, keepdim=True)
            if sinks is not None:
                total = total + sinks[h].exp()
            out[:, h, i] = ((shares / total)[:, None] @ v[:, h // group, seen])[:, 0]
    return out


@pytest.mark.parametrize("queries", [1, 9, 40])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_dense_attention_with_softcap_and_sinks(monkeypatch, queries, window, softcap, with_sinks):
    monkeypatch.setattr("seerattention.ops.dense_attention.EXPLICIT_BYTES", 8000)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 8, generator=generator)
        for heads, length in ((4, queries), (2, 40), (2, 40))
    )
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    out = dense_attention(q, k, v, scale=0.3, window=window, softcap=softcap, sinks=sinks)

    def reference(q, k, v):
        return slow(q, k, v, softcap, None if sinks is None else sinks.to(q.dtype), window)

    Budget.of(reference, q, k, v).check(out)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_matter(tiny, name):
    """Else the comparisons with dense attention would prove nothing about them."""
    model, ids = tiny.make(name), tiny.tokens(1, 70)
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.self_attn.attn_logit_softcapping = None
        if name == "gpt_oss":
            layer.self_attn.sinks.data.sub_(5)
    dense, without = tiny.logits(model, ids), tiny.logits(other, ids)
    assert (dense - without).abs().max() > 0.01 * dense.abs().max()
    calls = []
    with host.intercept(model, lambda call: calls.append(call) or call.dense()):
        tiny.logits(model, ids)
    assert all((call.softcap == 3.0) == (name == "gemma2") for call in calls)
    assert all((call.sinks is not None) == (name == "gpt_oss") for call in calls)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_gates_learn_the_map_under_softcap_and_sinks(tiny, name):
    """The frozen pass computes what the model computes, and gates come closer to its map."""
    model, ids = tiny.make(name), tiny.tokens(1, 64)
    seen, expected = [], tiny.logits(model, ids)
    trainer = Distiller(
        model, tiny.gates_for(model), lambda step: ids.numpy(), DistillConfig(steps=20, lr=1e-2)
    )
    head = model.get_decoder().register_forward_hook(lambda module, args, out: seen.append(out[0]))
    steps = list(trainer.run())
    head.remove()
    logits = model.get_output_embeddings()(seen[0])
    if name == "gemma2":
        limit = model.config.final_logit_softcapping
        logits = limit * torch.tanh(logits / limit)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert steps[-1].loss < steps[0].loss
    assert not host.attached(model)


def test_recall_counts_the_softcap(tiny):
    """Everything read is a recall of 1; else it is the share of capped scores, not of plain ones."""
    model, calls = tiny.make("gemma2"), []
    host.attach(
        model, tiny.gates_for(model), "top_k:0.8", min_tokens=0, observe=lambda *call: calls.append(call)
    )
    tiny.logits(model, tiny.tokens(1, 96))
    layer, call, selection = calls[0]
    observer = Watch(rows=96)
    observer(layer, call, selection)
    k = call.k.repeat_interleave(2, 1)
    scores = 3.0 * torch.tanh(call.q @ k.mT * call.scale / 3.0)
    causal = torch.ones(96, 96, dtype=torch.bool).tril()
    shares = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    read = selection.to_mask().repeat_interleave(16, -1).repeat_interleave(16, -2)
    assert observer.recall == pytest.approx(float((shares * read).sum() / (4 * 96)), rel=1e-5)


def test_layers_without_rope_have_gates_that_do_not_rotate(tiny):
    gates = dict(tiny.gates_for(tiny.make("smollm3")).items())
    x, positions = torch.randn(1, 4, 3, 16), torch.tensor([0, 16, 400])
    assert not torch.equal(gates[0].rotate(x, positions), x)
    assert torch.equal(gates[1].rotate(x, positions), x)


def test_refused_families_say_why(tiny):
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(num_hidden_layers=1, vocab_size=16))
    with pytest.raises(NotImplementedError, match=r"deepseek_v3\) is not supported: multi-head latent"):
        host.new_gates(model)
    with pytest.raises(NotImplementedError, match="multi-head latent"):
        host.attach(model, tiny.gates_for(tiny.make()), "top_k:0.5")
    with pytest.raises(NotImplementedError, match="within chunks of the text"):
        family_of(SimpleNamespace(config=Llama4TextConfig()))
    reasons = host.refused()
    assert all(reasons.values())
    assert not set(reasons) & set(host.families())


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_bidirectional_attention_is_refused(tiny, name):
    with pytest.raises(NotImplementedError, match="with use_bidirectional_attention tokens see later ones"):
        host.new_gates(tiny.make(name, use_bidirectional_attention=True))


def test_images_are_refused():
    text = Gemma3TextConfig()
    whole = SimpleNamespace(model_type="gemma3", get_text_config=lambda: text)
    with pytest.raises(NotImplementedError, match=r"image tokens see later ones.*Gemma3ForCausalLM"):
        family_of(SimpleNamespace(config=whole))
