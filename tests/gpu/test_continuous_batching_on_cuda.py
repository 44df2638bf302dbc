"""Continuous batching of an attached model on a CUDA device: requests choose what they would alone."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from seerattention.engine import layer as engine
from seerattention.hosts.transformers import attach, detach, new_gates, usage

pytestmark = pytest.mark.gpu

LENGTHS = (3000, 777, 65, 1500, 64, 10)
NEW_TOKENS = 8


@pytest.fixture
def model():
    """A small model whose prompts read 4 blocks of every row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
    )
    model = LlamaForCausalLM(config).to("cuda").eval()
    model.generation_config.eos_token_id = None
    model.read = {}

    def observe(layer, call, selection):
        ((new, keys),) = call.lengths
        mask = selection.to_mask()[0]
        for row in range(mask.shape[1]):
            at = (keys - new) // 64 + row
            model.read[layer, call.prompt_tokens or keys, at] = mask[:, row, : at + 1].tolist()

    attach(model, new_gates(model), "token_budget:256,sink_blocks=1", min_tokens=0, observe=observe)
    yield model
    detach(model)


def serve(model, prompts, **options):
    outs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, do_sample=False),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, **options),
        progress_bar=False,
    )
    assert [out.error for out in outs.values()] == [None] * len(prompts)
    return [list(out.generated_tokens) for out in outs.values()]


@pytest.mark.parametrize("batch", [8192, 500], ids=["whole", "pieces"])
def test_requests_choose_as_alone(model, batch):
    prompts = [torch.randint(3, 128, (length,)).tolist() for length in LENGTHS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    rows = model.read.copy()
    model.read.clear()
    assert serve(model, prompts, max_batch_tokens=batch, allow_block_sharing=False) == expected
    assert model.read == rows
    assert set(usage(model)) == {"sparse", "dense: decoding step"}


def test_kernels_read_where_a_request_lies(model, monkeypatch):
    """Queries, keys and values are slices of those of the batch; copies give the same, to the bit."""
    model.bfloat16()
    select, attend, calls = engine.select_blocks, engine.block_sparse_attention, []

    def selecting(q, *rest, **options):
        selection = select(q, *rest, **options)
        assert torch.equal(selection.to_mask(), select(q.contiguous(), *rest, **options).to_mask())
        return selection

    def attending(q, k, v, selection, **options):
        out = attend(q, k, v, selection, **options)
        assert torch.equal(out, attend(*(x.contiguous() for x in (q, k, v)), selection, **options))
        calls.append(q.shape[2])
        return out

    monkeypatch.setattr(engine, "select_blocks", selecting)
    monkeypatch.setattr(engine, "block_sparse_attention", attending)
    prompts = [torch.randint(3, 128, (length,)).tolist() for length in LENGTHS]
    serve(model, prompts, max_batch_tokens=2048, allow_block_sharing=False)
    assert sum(calls) == 2 * sum(LENGTHS)


@pytest.mark.parametrize("asked", [{"use_cuda_graph": True}, {"q_padding_interval_size": 64}], ids=str)
def test_graphs_are_refused(model, asked):
    """The second one asks for graphs without saying so."""
    with pytest.raises(NotImplementedError, match="use_cuda_graph: in continuous batching"):
        serve(model, [[3, 4, 5]], max_batch_tokens=500, **asked)


def test_no_other_attention_is_taken(model):
    """By default transformers looks for flash kernels on a GPU."""
    before = model.config._attn_implementation
    serve(model, [[3, 4, 5]], max_batch_tokens=500)
    assert model.config._attn_implementation == before
