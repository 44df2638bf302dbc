"""Ways to generate by attached models, line by line of the table of features."""

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, TextGenerationPipeline

from seerattention.hosts import transformers as host
from tests.hosts.transformers.features import assert_sparse, attached, decoding, generated, lines, prove


def generate_modes(tiny, tmp_path):
    """At a full selection the text is the dense model's (and see `test_attach_dense_equality.py`)."""
    model, ids = tiny.make(), tiny.tokens(2, 40)
    modes = ({}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_beams": 2})
    for how in modes:
        torch.manual_seed(3)
        expected = generated(model, ids, **how)
        tiny.attach_full(model)
        torch.manual_seed(3)
        assert torch.equal(generated(model, ids, **how), expected)
        host.detach(model)


def assisted(tiny, tmp_path):
    """Guessing changes the speed, never the text: also a sparse model's.

    As long as a guess is no longer than a block (these have 16 tokens): a longer one is a piece of a prompt.
    """
    # The first call takes the guess with the prompt, so that top_k may count one more block.
    model, draft, ids = (
        attached(tiny, "token_budget:32"),
        tiny.make(seed=0, num_hidden_layers=1),
        tiny.tokens(1, 80),
    )
    right = host.detach(attached(tiny))
    for each in (draft, right):
        each.generation_config.num_assistant_tokens = 10
        each.generation_config.num_assistant_tokens_schedule = "constant"
    plain = generated(model, ids, max_new_tokens=40)
    steps = host.usage(model)["dense: decoding step"]
    assert torch.equal(generated(model, ids, max_new_tokens=40, prompt_lookup_num_tokens=5), plain)
    assert set(host.usage(model)) == {"sparse", "dense: decoding step"}
    assert torch.equal(generated(model, ids, max_new_tokens=40, assistant_model=draft), plain)
    # A draft that is right: fewer steps than tokens.
    before = host.usage(model)["dense: decoding step"]
    assert torch.equal(generated(model, ids, max_new_tokens=40, assistant_model=right), plain)
    assert host.usage(model)["dense: decoding step"] - before < steps
    host.set_policy(model, "top_k:1")
    dense = generated(tiny.make(), ids, max_new_tokens=40)
    assert torch.equal(generated(model, ids, max_new_tokens=40, assistant_model=draft), dense)


def pipeline(tiny, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[pad]" if i == 0 else str(i): i for i in range(tiny.vocab)}, "[pad]"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]")
    model, ids = attached(tiny), tiny.tokens(1, 64)
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    (out,) = pipe(tokenizer.decode(ids[0]), max_new_tokens=5, do_sample=False, return_tensors=True)
    assert out["generated_token_ids"] == generated(model, ids, max_new_tokens=5)[0].tolist()
    assert_sparse(model)


def continuous_batching(tiny, tmp_path):
    """`test_continuous_batching.py` compares what many requests choose."""
    model = attached(tiny)
    prompts = [tiny.tokens(1, length) for length in (64, 50)]
    expected = [generated(model, ids, max_new_tokens=3)[0, ids.shape[1] :].tolist() for ids in prompts]
    served = serve_batch(model, [ids[0].tolist() for ids in prompts])
    assert [list(out.generated_tokens) for out in served.values()] == expected
    assert_sparse(model)


def serve_batch(model, prompts, **options):
    config = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=256, **options)
    return model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=-1, do_sample=False),
        continuous_batching_config=config,
        progress_bar=False,
    )


def batches_in_graphs(tiny, tmp_path):
    serve_batch(attached(tiny), [[3, 4, 5]], use_cuda_graph=True)


def batches_of_steps(tiny, tmp_path):
    serve_batch(decoding(tiny), [[3, 4, 5]])


def batches_with_longrope(tiny, tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    serve_batch(attached(tiny, rope_parameters=dynamic), [[3, 4, 5]])


def output_attentions(tiny, tmp_path):
    attached(tiny)(tiny.tokens(1, 20), output_attentions=True)


KIND = "generate"
CHECKS = {
    "greedy, sampling, beams": generate_modes,
    "assisted: draft model, prompt lookup": assisted,
    "pipeline": pipeline,
    "continuous batching": continuous_batching,
    "continuous batching in CUDA graphs, compiled or asynchronous": batches_in_graphs,
    "continuous batching with a policy for decoding": batches_of_steps,
    "continuous batching with RoPE of type dynamic or longrope": batches_with_longrope,
    "output_attentions": output_attentions,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
