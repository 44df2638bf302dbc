"""Attaching, generating and distilling on a CUDA device."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from seerattention import baselines
from seerattention.hosts.transformers import (
    attach,
    cache_argument,
    dense,
    detach,
    new_gates,
    prefill,
    set_policy,
    usage,
)
from seerattention.testing.budget import Budget
from seerattention.train import DistillConfig, Distiller, TextWindows
from seerattention.train.replay import Replay

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to("cuda").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_selection_equals_dense(model, dtype):
    tokens = torch.randint(0, 128, (2, 700), generator=torch.Generator().manual_seed(1)).cuda()
    model = model.to(dtype)
    with torch.inference_mode():
        dense = model(tokens).logits
        gold = model.double()(tokens).logits.detach()
        model.to(dtype)
        band = torch.finfo(dtype).eps * float(gold.abs().max())
        budget = Budget(gold, dtype, 2 * float((dense.double() - gold).abs().max()) + band)
        attach(model, new_gates(model), "top_k:1.0", min_tokens=0)
        sparse = model(tokens).logits
        assert usage(model) == {"sparse": 2}
        detach(model)
        again = model(tokens).logits
    model.float()
    budget.check(sparse)
    assert torch.equal(again, dense)


def test_sparse_generation_runs(model):
    tokens = torch.randint(0, 128, (1, 1000), generator=torch.Generator().manual_seed(2)).cuda()
    attach(model, new_gates(model), "top_k:0.2", min_tokens=0)
    try:
        written = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    finally:
        detach(model)
    assert written.shape == (1, 1008)


def test_distillation_lowers_the_loss(model):
    rng = np.random.default_rng(0)
    batches = TextWindows(rng.integers(0, 128, 20000), 1024, seed=3)
    torch.manual_seed(0)
    gates = new_gates(model, init="random")
    # Without gaps, so that losses of different steps compare.
    steps = list(Distiller(model, gates, batches, DistillConfig(steps=40, lr=3e-3), reach=1024).run())
    assert np.mean([s.loss for s in steps[-5:]]) < np.mean([s.loss for s in steps[:5]])


def test_steps_with_gaps_in_positions_are_those_of_the_cpu(model):
    batches = TextWindows(np.random.default_rng(0).integers(0, 128, 20000), 1024, 2, seed=3)
    torch.manual_seed(0)
    gates, found = new_gates(model, phase="both"), []
    for one, taught in ((model, gates), (copy.deepcopy(model).cpu(), copy.deepcopy(gates).cpu())):
        trainer = Distiller(one, taught, batches, DistillConfig(steps=1))
        while int(trainer.reach.positions(trainer.seed, trainer.index, 1024, 64)[-1]) < 1024:
            trainer.done += 1
        values = trainer.accumulate(batches(trainer.index), 0.1).cpu()
        found.append((values, torch.cat([p.grad.flatten().cpu() for p in taught.parameters()])))
    (mine, gradient), (expected, reference) = found
    assert torch.allclose(mine, expected, rtol=0.01)
    assert torch.cosine_similarity(gradient, reference, dim=0) > 0.99


@pytest.mark.parametrize("phase", ["prefill", "both"])
def test_steps_that_are_replayed_are_those_run_kernel_by_kernel(model, phase, monkeypatch):
    batches = TextWindows(np.random.default_rng(0).integers(0, 128, 20000), 1024, 2, seed=3)
    config, found = DistillConfig(steps=5, lr=3e-3, grad_accum=2), []
    for replayed in (True, False):
        torch.manual_seed(0)
        gates = new_gates(model, phase=phase)
        start = torch.cat([p.detach().flatten() for p in gates.parameters()])
        if not replayed:
            monkeypatch.setattr(Replay, "__call__", lambda self, name, run, given, learning: run(*given))
        trainer = Distiller(model, gates, batches, config, reach=2048)
        losses = [step.loss for step in trainer.run()]
        assert len(trainer._replay._graphs) == (len(gates.layers) if replayed else 0)
        assert all(trainer._replay._graphs.values())
        learned = torch.cat([p.detach().flatten() for p in gates.parameters()])
        found.append((losses, learned - start))
    (losses, moved), (expected, reference) = found
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(losses)) == 5
    assert torch.cosine_similarity(moved, reference, dim=0) > 0.999


@pytest.mark.parametrize("side", ["left", "right"])
# In bfloat16 a gate's score within rounding of the threshold may choose otherwise: a fixed choice there.
@pytest.mark.parametrize(("dtype", "scorer"), [(torch.float32, "gates"), (torch.bfloat16, "streaming")])
def test_a_padded_batch_is_one_call_and_equal_to_its_rows(model, ops, dtype, scorer, side):
    lengths = (1500, 700, 1, 64, 65, 1000, 128, 63, 1499, 5, 320, 32, 900, 448, 1023, 2)
    ids = torch.randint(0, 128, (16, 1500), generator=torch.Generator().manual_seed(6)).cuda()
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 1500 - length if side == "left" else 0 :][:length] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = [own[real][None] for own, real in zip(ids, mask.bool(), strict=True)]
    with torch.inference_mode():
        golds = [model.double()(own).logits for own in alone]
        model.to(dtype)
        error = 2 * max(
            float((model(own).logits.double() - gold).abs().max())
            for own, gold in zip(alone, golds, strict=True)
        )
        error += torch.finfo(dtype).eps * float(max(gold.abs().max() for gold in golds))
        chooser = new_gates(model) if scorer == "gates" else baselines.create(scorer, block_size=(64, 64))
        attach(model, chooser, "threshold:0.05" if scorer == "gates" else "top_k:0.3", min_tokens=0)
        try:
            ops.taken()
            batch = model(ids, attention_mask=mask, position_ids=positions).logits
            for_batch = ops.taken()
            model(ids[:1])
            assert for_batch == ops.taken()
            assert for_batch["select_blocks"] == for_batch["block_sparse_attention"] == 2
            for own, real, out in zip(alone, mask.bool(), batch, strict=True):
                Budget(model(own).logits[0].double(), dtype, error).check(out[real])
        finally:
            detach(model)
            model.float()


# Inductor recommends TF32 where nobody asked for it, and begins its own graphs with an empty one.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@pytest.mark.parametrize("implementation", [None, "static"])
def test_greedy_text_at_a_full_selection_is_the_dense_one(model, implementation):
    """With a static cache generate compiles the model by itself."""
    tokens = torch.randint(0, 128, (1, 300), generator=torch.Generator().manual_seed(3)).cuda()
    inputs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if implementation:
        inputs["cache_implementation"] = implementation
    expected = model.generate(tokens, **inputs)
    attach(model, new_gates(model), "top_k:1.0", min_tokens=0)
    try:
        assert torch.equal(model.generate(tokens, **inputs), expected)
    finally:
        detach(model)


def test_a_cache_filled_densely_goes_on_in_pieces(model):
    """Cached keys are rotated back on the device; everything read is dense attention."""
    tokens = torch.randint(0, 128, (2, 640), generator=torch.Generator().manual_seed(4)).cuda()
    gold = model.double()(tokens).logits.detach()
    model.float()
    attach(model, new_gates(model), "top_k:1.0", min_tokens=0)
    try:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(), dense(model):
            plain = model(tokens).logits
            model(tokens[:, :320], **cache_argument(model, cache))
        last = prefill(model, tokens[:, 320:], cache, piece_tokens=128).logits
        assert usage(model)["sparse"] == 2 * 3
    finally:
        detach(model)
    rows = last.shape[1]
    band = torch.finfo(torch.float32).eps * float(gold.abs().max())
    error = 2 * float((plain.double() - gold).abs().max()) + band
    Budget(gold[:, -rows:], torch.float32, error).check(last)


def test_layers_that_wait_on_the_cpu(model, tmp_path):
    """accelerate brings their weights when they are needed; gates stay on the GPU."""
    model.save_pretrained(tmp_path)
    places = {"model.layers.1": "cpu", "model.layers.0": 0, "model.embed_tokens": 0, "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": 0}
    # The fixture's own rotary frequencies have been through other dtypes.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0})
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    assert spread.model.layers[1].self_attn.q_proj.weight.is_meta
    tokens = torch.randint(0, 128, (1, 500), generator=torch.Generator().manual_seed(5)).cuda()
    with torch.inference_mode():
        gold, plain = model.double()(tokens).logits, model.float()(tokens).logits
    error = 2 * float((plain.double() - gold).abs().max())
    error += torch.finfo(torch.float32).eps * float(gold.abs().max())
    chosen = []
    for each in (model, spread):
        torch.manual_seed(0)
        seen = []
        gates = attach(
            each, new_gates(each), "top_k:0.3", min_tokens=0, observe=lambda *c, to=seen: to.append(c[2].bits)
        )
        with torch.inference_mode():
            each(tokens)
            chosen.append(torch.stack(seen))
            set_policy(each, "top_k:1.0")
            Budget(gold, torch.float32, error).check(each(tokens).logits)
        assert {p.device.type for n, p in gates.named_parameters() if "attn_gate" in n} == {"cuda"}
        detach(each)
    # Products of weights that lie elsewhere in memory may be summed in another order, and a block whose
    # score is within rounding of the last one taken may be left out then.
    assert (chosen[0] != chosen[1]).float().mean() < 0.01
