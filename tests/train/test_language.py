"""The language-model loss in slices is the model's own."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from seerattention.train import language
from seerattention.train.language import IGNORED, LanguageLoss


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_the_loss_is_that_of_the_whole_logits_and_so_is_its_gradient(tiny, monkeypatch, kind):
    shape = {**tiny.shape, "head_dim": 16}
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=2.0, pad_token_id=0))
    elif kind == "granite":
        model = GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0))
    else:
        model = tiny.make()
    model.eval()
    # 37 is no multiple of it.
    monkeypatch.setattr(language, "LOGIT_ROWS", 16)
    tokens = torch.randint(0, 97, (1, 37))
    targets = torch.cat([tokens[:, 1:], torch.tensor([[IGNORED]])], 1)
    loss = LanguageLoss(model)(tokens, targets) / 36
    loss.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected = model(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    eps = 64 * torch.finfo(torch.float32).eps
    assert loss.item() == pytest.approx(expected.item(), rel=eps)
    for name, parameter in model.named_parameters():
        error = float((parameter.grad - mine[name]).abs().max())
        assert error <= eps * float(parameter.grad.abs().max()), name
    with torch.no_grad():
        assert (LanguageLoss(model)(tokens, targets) / 36).item() == pytest.approx(expected.item(), rel=eps)
