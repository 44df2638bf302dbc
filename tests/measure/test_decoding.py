"""Decoding measured step by step: what it says is what one pass over the text says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seerattention import attach, baselines, detach
from seerattention.evals.tasks import generate
from seerattention.hosts.transformers import new_gates
from seerattention.measure import bundled
from seerattention.measure.decoding import Reading, answers, continued
from seerattention.measure.perplexity import hidden_states, next_token_losses


@pytest.fixture(scope="module")
def given():
    model, tokenizer = bundled.load_teacher()
    text = bundled.text_tokens(tokenizer)[1]
    return model, np.stack([text[:480], text[480:960]])


@pytest.mark.parametrize("step", [1, 32, 200])
def test_steps_say_what_one_pass_says(given, step) -> None:
    model, windows = given
    found = continued(model, windows[:, :400], 384, step=step)
    assert found.losses.shape == found.predicted.shape == (2, 16)
    for row, said, window in zip(found.losses, found.predicted, windows[:, :400], strict=True):
        torch.testing.assert_close(row, next_token_losses(model, window)[383:], rtol=0, atol=1e-4)
        with torch.inference_mode():
            logits = model.lm_head(hidden_states(model, window)[383:-1])
        assert torch.equal(said, logits.argmax(-1))


def test_a_prompt_leaves_something(given) -> None:
    model, windows = given
    assert continued(model, windows[:, :65], 64).losses.shape == (2, 1)
    for prompt in (0, 480):
        with pytest.raises(ValueError, match=f"a prompt has 1 to 479 of these tokens, got {prompt}"):
            continued(model, windows, prompt)


@pytest.mark.parametrize("kind", ["gates", "quest", "streaming", "oracle_mass"])
def test_every_token_chooses_alone_and_reads_its_budget(given, kind) -> None:
    model, windows = given
    scorer = new_gates(model, phase="decode") if kind == "gates" else baselines.create(kind)
    dense, losses, reading = continued(model, windows, 384).losses, {}, Reading()
    some, everything = "token_budget:192,sink_blocks=1", "threshold:0.0"
    for policy, step in ((some, 1), (some, 63), (everything, 32)):
        reading = Reading()
        attach(model, scorer, prefill="dense", decode=policy, min_tokens=0, observe=reading)
        try:
            losses[policy, step] = continued(model, windows, 384, step=step).losses
        finally:
            detach(model)
        if policy == some:
            # Two whole blocks, and of the own one what is there: tokens 384 to 478 are fed.
            expected = np.mean([128 + position % 64 + 1 for position in range(384, 479)])
            assert reading.tokens == pytest.approx(expected)
            assert reading.rows == 2 * 95 * 2 * model.config.num_hidden_layers
    assert reading.tokens == pytest.approx(np.mean(np.arange(384, 479) + 1))
    torch.testing.assert_close(losses[some, 1], losses[some, 63], rtol=0, atol=1e-4)
    torch.testing.assert_close(losses[everything, 32], dense, rtol=0, atol=1e-4)
    assert (losses[some, 1] - dense).abs().max() > 1e-2


def test_prompts_are_not_counted(given) -> None:
    model, windows = given
    reading = Reading()
    assert reading.tokens == 0
    attach(
        model,
        baselines.create("quest"),
        "top_k:0.5",
        decode="token_budget:128",
        min_tokens=0,
        observe=reading,
    )
    try:
        continued(model, windows, 384, step=63)
    finally:
        detach(model)
    assert reading.rows == 2 * 95 * 2 * model.config.num_hidden_layers


def test_answers_are_those_of_one_prompt_after_the_other(given, monkeypatch) -> None:
    model, windows = given
    prompts = [windows[0, :200], windows[1, :150], windows[1, :200], windows[0, 100:300]]
    alone = [generate(model, prompt, 12)[0] for prompt in prompts]
    assert answers(model, prompts, 12) == alone
    assert len({tuple(one) for one in alone}) == 4
    # An end token that one of them says on the way: it is left out, and the others go on.
    monkeypatch.setattr(model.generation_config, "eos_token_id", [alone[0][5], 10**6])
    ended = [generate(model, prompt, 12)[0] for prompt in prompts]
    assert len(ended[0]) < 12
    assert max(map(len, ended)) == 12
    assert answers(model, prompts, 12) == ended
    # Nothing is computed once all have ended, each in its own time.
    monkeypatch.setattr(model.generation_config, "eos_token_id", [alone[0][5], alone[2][2]])
    steps: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: steps.append(1))
    assert list(map(len, answers(model, [prompts[0], prompts[2]], 12))) == [5, 2]
    hook.remove()
    assert len(steps) == 6
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert answers(model, prompts[:1], 3) == [alone[0][:3]]
