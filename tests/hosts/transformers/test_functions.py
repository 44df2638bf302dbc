"""What transformers says to attention is obeyed or refused by name, and never dropped."""

import functools

import pytest
import torch
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.request import KEYWORD


@pytest.fixture
def model(tiny):
    model = tiny.make()
    return host.attach(model, tiny.gates_for(model), "top_k:0.7", min_tokens=0)


def by_config(model):
    model.config.is_causal = False


def by_module(model):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2-mixed"])
@pytest.mark.parametrize("how", [by_config, by_module, {"is_causal": False}])
def test_bidirectional_attention_is_refused(tiny, name, how):
    """Whichever way it is asked for, and whether the text is short enough to be dense or not."""
    model, ids, more = tiny.make(name), tiny.tokens(1, 40), {}
    causal = tiny.logits(model, ids)
    host.attach(model, tiny.gates_for(model), "top_k:1")
    if isinstance(how, dict):
        more = how
    else:
        how(model)
    with host.dense(model):
        both = tiny.logits(model, ids, **more)
        assert not torch.equal(both, causal)
    for length in (40, 5):
        with pytest.raises(NotImplementedError, match=r"(is_causal=False|bidirectional).*dense\(model\)"):
            tiny.logits(model, ids[:, :length], **more)
    assert not host.usage(model)


def test_is_causal_is_taken_where_it_says_what_is_so(tiny, model):
    ids = tiny.tokens(1, 60)
    assert torch.equal(tiny.logits(model, ids, is_causal=True), tiny.logits(model, ids))
    model.config.is_causal = True
    assert torch.equal(tiny.logits(model, ids, is_causal=None), tiny.logits(model, ids))


@pytest.mark.parametrize(
    "asked",
    [
        {"position_bias": torch.zeros(1, 4, 60, 60)},
        {"cu_seq_lens_q": torch.tensor([0, 30, 60]), "cu_seq_lens_k": torch.tensor([0, 30, 60])},
        {"logit_softcap": 30.0},
    ],
)
def test_what_is_asked_of_attention_and_not_known_is_refused_by_name(tiny, model, asked):
    ids = tiny.tokens(1, 60)
    with pytest.raises(NotImplementedError, match=f"asked for {', '.join(sorted(asked))}; .*leave it out"):
        tiny.logits(model, ids, **asked)
    nothing = dict.fromkeys(asked)
    count = {"num_items_in_batch": torch.tensor(60), "output_hidden_states": True, "use_cache": False}
    assert torch.equal(tiny.logits(model, ids, **nothing, **count), tiny.logits(model, ids))


def test_masks_of_the_models_own_are_refused(tiny, model, monkeypatch):
    """As a family may get them in a later transformers."""

    def every_other(batch, head, query, key):
        return key % 2 == 0

    own = functools.partial(create_causal_mask, and_mask_function=every_other)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", own)
    with pytest.raises(NotImplementedError, match=r"the model asks for and_masks.*what comes before them"):
        tiny.logits(model, tiny.tokens(1, 60))


def test_what_is_given_by_its_place_is_seen(tiny, model):
    ids, both = tiny.tokens(1, 20), torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(NotImplementedError, match="position_ids jump after token 11"):
        model.model(ids, None, both)
    with pytest.raises(ValueError, match="empty prompt: inputs_embeds is"):
        model.model(None, None, None, None, torch.zeros(1, 0, 64))


def test_layers_that_do_not_hand_their_keywords_on_are_refused(tiny, model):
    """Else they would be dense without a word, and usage would say nothing."""
    for layer in model.model.layers:

        def forward(hidden_states, plain=layer.self_attn.forward, **given):
            return plain(hidden_states, **{n: x for n, x in given.items() if n != KEYWORD})

        layer.self_attn.forward = forward
    with pytest.raises(RuntimeError, match=r"layer 0 does not hand its keywords on.*with transformers 5"):
        tiny.logits(model, tiny.tokens(1, 60))
    with host.dense(model):
        tiny.logits(model, tiny.tokens(1, 60))


def test_a_head_dim_by_another_name_is_refused(tiny):
    """Not every configuration has one, so that it has a default."""
    model = tiny.make(head_dim=32)
    del model.config.__dict__["head_dim"]
    with (
        pytest.raises(RuntimeError, match=r"before it \[1, 8, 20, 16\] and.*its family's file does not fit"),
        host.intercept(model, lambda call: call.dense()),
    ):
        tiny.logits(model, tiny.tokens(1, 20))


def test_the_name_alone_is_no_attention(tiny):
    host.attach(tiny.make(), baselines.create("quest"), "top_k:0.5")
    model = tiny.make()
    model.set_attn_implementation("seerattention")
    with pytest.raises(ValueError, match=r"attach\(model, gates, policy\) asks for; leave it out"):
        tiny.logits(model, tiny.tokens(1, 20))
