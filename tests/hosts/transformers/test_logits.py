"""Logits from hidden states: what a model does behind its head is done."""

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from seerattention.hosts import transformers as host
from seerattention.measure.perplexity import next_token_losses

CHANGED = {"gemma2": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 7.0}}


def test_they_are_those_of_the_models_own_forward_pass(tiny, kind):
    model, ids = tiny.make(kind, **CHANGED.get(kind, {})), tiny.tokens(1, 40)
    with torch.inference_mode():
        expected = model(ids).logits
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        assert torch.equal(host.logits_of(model, hidden), expected)
        loss = next_token_losses(model, ids[0].numpy())
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(expected[0, :-1].float(), ids[0, 1:], reduction="none")
    )


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_the_head_alone_is_not_enough(tiny, name):
    model, ids = tiny.make(name, **CHANGED[name]), tiny.tokens(1, 40)
    with torch.inference_mode():
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()(hidden)
        assert (head - host.logits_of(model, hidden)).abs().max() > 0.1


def test_a_factor_behind_the_head():
    torch.manual_seed(0)
    model = CohereForCausalLM(
        CohereConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 64, (1, 20))
    with torch.inference_mode():
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        assert torch.equal(host.logits_of(model, hidden), model(ids).logits)
