"""The README's table of what attached models can do: a check for every line, for each 'no' its reason."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TextGenerationPipeline,
)
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.distributed import DistributedConfig

from seerattention import baselines
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers.support import features
from seerattention.measure.maps import record_layers
from seerattention.train import Distiller
from tests.hosts.transformers.ranks import load, together

POLICY = "threshold:0.2"


def attached(tiny, policy=POLICY, **changes):
    model = tiny.make(**changes)
    return host.attach(model, tiny.gates_for(model), policy, min_tokens=0)


def generated(model, ids, cache=None, **inputs):
    if cache is not None:
        inputs |= host.cache_argument(model, cache)
    return model.generate(ids, **{"max_new_tokens": 12, "do_sample": False, **inputs})


def assert_sparse(model):
    assert host.usage(model)["sparse"] > 0


def pieces_of(tiny, model, cache, ids, sizes):
    return torch.cat([tiny.logits(model, part, cache=cache) for part in ids.split(sizes, 1)], 1)


def assert_pieces_like_one_shot(tiny, make_cache):
    model, gold, ids = attached(tiny), attached(tiny).double(), tiny.tokens(1, 96)
    got = pieces_of(tiny, model, make_cache(model), ids, (32, 48, 16))
    tiny.assert_as_close(got, tiny.logits(model, ids), tiny.logits(gold, ids))
    assert set(host.usage(model)) == {"sparse"}


def dynamic(tiny, tmp_path):
    assert_pieces_like_one_shot(tiny, lambda model: DynamicCache(config=model.config))


def static(tiny, tmp_path):
    assert_pieces_like_one_shot(tiny, lambda model: StaticCache(config=model.config, max_cache_len=128))


class EightBits(QuantizedLayer):
    """Gives keys back as it stored them, in steps of a 127th of their greatest value."""

    def _quantize(self, tensor, axis):
        step = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / step).round(), step

    def _dequantize(self, stored):
        return stored[0] * stored[1]


def quantised(tiny, tmp_path):
    """What rounded keys cost is what they cost dense attention."""
    ids, results = tiny.tokens(1, 96), []
    for model in (attached(tiny, "top_k:1"), tiny.make(), tiny.make().double()):
        cache = Cache(layers=[EightBits(nbits=8, residual_length=16) for _ in range(2)])
        results.append(pieces_of(tiny, model, cache, ids, (32, 48, 16)))
    sparse, dense, gold = results
    tiny.assert_as_close(sparse, dense, gold)
    assert not torch.equal(dense, tiny.logits(tiny.make(), ids))
    model = attached(tiny)
    cache = Cache(layers=[EightBits(nbits=8, residual_length=16) for _ in range(2)])
    assert pieces_of(tiny, model, cache, ids, (32, 48, 16)).isfinite().all()
    assert set(host.usage(model)) == {"sparse"}


def changed_cache(tiny, tmp_path):
    """`test_attach_cache.py` has every change; here one after the other."""
    model, gold = attached(tiny), attached(tiny).double()
    ids, end = tiny.tokens(2, 64), tiny.tokens(1, 32, seed=2)
    cache = DynamicCache(config=model.config)
    tiny.logits(model, torch.cat([ids, ids], 1), cache=cache)
    cache = copy.deepcopy(cache)
    cache.crop(-64)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    whole = torch.cat([ids[1:], end], 1)
    got = tiny.logits(model, end, cache=cache)
    tiny.assert_as_close(got, tiny.logits(model, whole)[:, 64:], tiny.logits(gold, whole)[:, 64:])
    assert set(host.usage(model)) == {"sparse"}


def filled_elsewhere(tiny, tmp_path):
    model = tiny.make()
    ids, cache = tiny.tokens(1, 96), DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :32], cache=cache)
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    tiny.logits(model, ids[:, 32:64], cache=cache)
    host.add_gates(model, "other", host.new_gates(model, block_size=32, init="random"))
    host.set_gates(model, "other")
    tiny.logits(model, ids[:, 64:], cache=cache)
    assert host.usage(model) == {"sparse": 4}


def longrope(tiny, tmp_path):
    model = tiny.make("phi3-longrope")
    ids, cache = tiny.tokens(1, 64), DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :32], cache=cache)
    host.attach(model, tiny.gates_for(model), POLICY, min_tokens=0)
    tiny.logits(model, ids[:, 32:], cache=cache)
    (how,) = host.usage(model)
    raise NotImplementedError(how)


def taken_out(tiny, tmp_path):
    model = attached(tiny)
    ids, cache = tiny.tokens(1, 64), DynamicCache(config=model.config)
    tiny.logits(model, ids[:, :32], cache=cache)
    before = host.usage(model)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    tiny.logits(model, ids[:, 32:], cache=cache)
    (how,) = set(host.usage(model)) - set(before)
    raise NotImplementedError(how)


def padding(tiny, tmp_path):
    model, ids = attached(tiny), tiny.tokens(1, 64)
    alone = tiny.logits(model, ids)
    for side in (slice(9, 73), slice(0, 64)):
        both, mask = tiny.tokens(2, 73, seed=3), torch.ones(2, 73, dtype=torch.long)
        both[1, side], mask[1] = ids[0], 0
        mask[1, side] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = tiny.logits(model, both, attention_mask=mask, position_ids=positions)
        tiny.assert_as_close(padded[1:, side], alone, alone.double())
    assert set(host.usage(model)) == {"sparse"}


def in_pieces(tiny, tmp_path):
    """`test_pieces.py` compares selections."""
    model, ids = attached(tiny), tiny.tokens(1, 96)
    plain = generated(model, ids)
    assert torch.equal(generated(model, ids, prefill_chunk_size=32), plain)
    cache = DynamicCache(config=model.config)
    first = host.prefill(model, ids, cache, piece_tokens=32).logits[:, -1:].argmax(-1)
    text = torch.cat([ids, first], 1)
    assert torch.equal(generated(model, text, cache=cache, max_new_tokens=11), plain)
    assert_sparse(model)


def several_turns(tiny, tmp_path):
    model, gold = attached(tiny), attached(tiny).double()
    first, second = tiny.tokens(1, 48), tiny.tokens(1, 40, seed=4)
    results = []
    for each in (model, gold):
        cache = DynamicCache(config=each.config)
        answer = generated(model, first, cache=DynamicCache(config=model.config))[:, 48:]
        for part in (first, *answer[:, :-1].split(1, 1)):
            tiny.logits(each, part, cache=cache)
        # The last decoded token comes with the next turn, as `generate` does it.
        turn = torch.cat([answer[:, -1:], second], 1)
        results.append(tiny.logits(each, turn, cache=cache))
    cache = DynamicCache(config=model.config)
    text = torch.cat([generated(model, first, cache=cache), second], 1)
    out = generated(
        model, text, cache=cache, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    tiny.assert_as_close(out.logits[0], results[0][:, -1], results[1][:, -1])
    assert_sparse(model)


def sliding_turns(tiny, tmp_path):
    """Padding at the end of a turn does no harm in that turn, but takes the place of tokens in the next."""
    model, gold, ids = (
        attached(tiny, kind="gemma2"),
        attached(tiny, kind="gemma2").double(),
        tiny.tokens(2, 96),
    )
    mask = torch.ones(2, 96, dtype=torch.long)
    mask[1, 50:64] = 0
    cache, alone, exact = (DynamicCache(config=model.config) for _ in range(3))
    for part in (slice(0, 32), slice(32, 64)):
        out = tiny.logits(model, ids[:, part], cache=cache, attention_mask=mask[:, : part.stop])
        part = slice(part.start, min(part.stop, 50))
        row = tiny.logits(model, ids[1:, part], cache=alone)
        tiny.assert_as_close(out[1:, : row.shape[1]], row, tiny.logits(gold, ids[1:, part], cache=exact))
    tiny.logits(model, ids[:, 64:], cache=cache, attention_mask=mask)


def packed(tiny, tmp_path):
    both = torch.cat([torch.arange(12), torch.arange(8)])[None]
    tiny.logits(attached(tiny), tiny.tokens(1, 20), position_ids=both)


def masks(tiny, tmp_path):
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    tiny.logits(attached(tiny), tiny.tokens(1, 20), attention_mask=mask)


def bidirectional(tiny, tmp_path):
    tiny.logits(attached(tiny), tiny.tokens(1, 20), is_causal=False)


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


def decoding(tiny, decode="token_budget:32", **options):
    """A model that decodes sparsely; `test_decode.py` and its neighbours compare what it gives."""
    model = tiny.make()
    gates = tiny.gates_for(model, phase="both")
    return host.attach(model, gates, prefill="dense", decode=decode, min_tokens=0, **options)


def steps(tiny, model, cache, mask=None):
    """Decode three tokens after 64; returns how."""
    ids, outs = tiny.tokens(2, 67), []
    before = host.usage(model)
    for begin, end in ((0, 64), (64, 65), (65, 67)):
        more = {} if mask is None else {"attention_mask": mask[:, :end]}
        outs.append(tiny.logits(model, ids[:, begin:end], cache=cache, **more))
    assert all(out.isfinite().all() for out in outs)
    after = host.usage(model)
    return {how for how in after if after[how] != before.get(how)} - {"dense: no policy for prefill"}


def static_steps(tiny, tmp_path):
    """`tests/gpu` replays graphs; the room of a cache does not change what a step gives."""
    model, ids, outs = decoding(tiny), tiny.tokens(1, 64), []
    for room in (80, 300):
        cache = StaticCache(config=model.config, max_cache_len=room)
        outs.append(generated(model, ids, cache))
    assert torch.equal(*outs)
    assert host.usage(model)["sparse: decoding step"] == 2 * 2 * 11


def padded_steps(tiny, tmp_path):
    model, mask = decoding(tiny), torch.ones(2, 67)
    mask[1, :20] = 0
    assert steps(tiny, model, DynamicCache(config=model.config), mask) == {"sparse: decoding step"}


def steps_after_padding(tiny, tmp_path):
    model, mask = decoding(tiny), torch.ones(2, 67)
    mask[1, 50:64] = 0
    assert steps(tiny, model, DynamicCache(config=model.config), mask) == {"dense: decoding step"}


def changed_steps(tiny, tmp_path):
    model, cache = decoding(tiny), DynamicCache(config=tiny.make().config)
    steps(tiny, model, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache = copy.deepcopy(cache)
    cache.crop(-20)
    tiny.logits(model, tiny.tokens(2, 1), cache=cache)
    assert set(host.usage(model)) == {"dense: no policy for prefill", "sparse: decoding step"}


def quantised_steps(tiny, tmp_path):
    model = decoding(tiny)
    cache = Cache(layers=[EightBits(nbits=8, residual_length=16) for _ in range(2)])
    assert steps(tiny, model, cache) == {"sparse: decoding step"}


def gates_for_decoding(tiny, tmp_path):
    model = tiny.make()
    for own in (tiny.gates_for(model, phase="decode"), baselines.create("quest", block_size=(16, 16))):
        options = {"prefill": "dense", "decode": "token_budget:32", "min_tokens": 0}
        host.attach(model, tiny.gates_for(model), decode_gates=own, **options)
        assert steps(tiny, model, DynamicCache(config=model.config)) == {"sparse: decoding step"}


def steps_with_a_gradient(tiny, tmp_path):
    model, cache, ids = decoding(tiny), DynamicCache(config=tiny.make().config), tiny.tokens(1, 65)
    tiny.logits(model, ids[:, :64], cache=cache)
    model(ids[:, 64:], **host.cache_argument(model, cache)).logits.sum().backward()
    assert host.usage(model)["dense: decoding step"] == 2


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def lora(tiny, tmp_path):
    """Gates read what the adapted projections give, whenever the adapter came."""
    ids = tiny.tokens(1, 80)
    first = adapted(attached(tiny, "top_k:0.8"))
    second = adapted(tiny.make())
    # The base is the one that the gates were made for.
    gates = tiny.gates_for(tiny.make())
    assert host.BaseInfo.of(second.get_base_model()) == gates.base
    assert host.attach(second, gates, "top_k:0.8", min_tokens=0) is second
    seen = []

    def look(call):
        seen.append(call)
        return call.dense()

    for model in (first, second):
        with host.intercept(model, look):
            tiny.logits(model, ids)
    third = adapted(tiny.make())
    layer, x = third.get_base_model().model.layers[0], third.get_input_embeddings()(ids)
    q = layer.self_attn.q_proj(layer.input_layernorm(x)).view(1, 80, 4, 16).transpose(1, 2)
    for call in (seen[0], seen[2]):
        assert torch.equal(call.q_nope, q)
    assert torch.equal(tiny.logits(first, ids), tiny.logits(second, ids))
    assert not torch.equal(tiny.logits(first, ids), tiny.logits(attached(tiny, "top_k:0.8"), ids))
    with first.disable_adapter():
        assert torch.equal(tiny.logits(first, ids), tiny.logits(attached(tiny, "top_k:0.8"), ids))
    host.detach(first)
    host.detach(second)
    assert torch.equal(tiny.logits(first, ids), tiny.logits(third, ids))


def prefix_tuning(tiny, tmp_path):
    from peft import PrefixTuningConfig, get_peft_model

    gates, model = tiny.gates_for(tiny.make()), tiny.make()
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    host.attach(tuned, gates, POLICY)


def bits(tiny, tmp_path, **how):
    model = tiny.make(hidden_size=128, intermediate_size=128)
    model.save_pretrained(tmp_path / "tiny-base")
    config = BitsAndBytesConfig(**how)
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "tiny-base", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    attention = small.model.layers[0].self_attn
    assert not isinstance(attention.q_proj.weight, torch.nn.Parameter) or (
        attention.q_proj.weight.dtype in (torch.uint8, torch.int8)
    )
    ids = tiny.tokens(1, 80)
    dense = tiny.logits(small, ids)
    checksum = host.base_checksum(small)
    # Gates made for the model in full precision, told by its name.
    model.config._name_or_path = "someone/tiny-base"
    gates = tiny.gates_for(model)
    host.attach(small, gates, "top_k:1", min_tokens=0)
    tiny.assert_as_close(tiny.logits(small, ids), dense, dense.double())
    host.set_policy(small, "top_k:0.8")
    assert not torch.equal(tiny.logits(small, ids), dense)
    assert host.usage(small) == {"sparse": 4}
    host.detach(small)
    assert torch.equal(tiny.logits(small, ids), dense)
    assert host.base_checksum(small) == checksum
    # Numbers again, but not those that the gates' fingerprint is of.
    host.attach(small.dequantize(), gates, "top_k:1", min_tokens=0)
    host.detach(small)
    small.config._name_or_path = "someone/else"
    with pytest.raises(ValueError, match="its name is else, not tiny-base"):
        host.attach(small, gates, "top_k:1")


def four_bits(tiny, tmp_path):
    bits(tiny, tmp_path, load_in_4bit=True)


def eight_bits(tiny, tmp_path):
    bits(tiny, tmp_path, load_in_8bit=True)


def offloaded(tiny, tmp_path):
    model, ids = tiny.make(num_hidden_layers=3), tiny.tokens(1, 80)
    gates = tiny.gates_for(model)
    model.save_pretrained(tmp_path / "base")
    places = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert spread.model.layers[1].self_attn.q_proj.weight.is_meta
    assert host.base_checksum(spread) == host.base_checksum(model)
    dense = tiny.logits(spread, ids)
    host.attach(model, gates, "top_k:0.8", min_tokens=0)
    host.attach(spread, tiny.gates_for(spread), "top_k:0.8", min_tokens=0)
    assert torch.equal(tiny.logits(spread, ids), tiny.logits(model, ids))
    assert host.usage(spread) == {"sparse": 3}
    host.detach(spread)
    assert torch.equal(tiny.logits(spread, ids), dense)


def saved_whole(tiny, tmp_path):
    model, ids = attached(tiny), tiny.tokens(1, 40)
    model.save_pretrained(tmp_path)
    read, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(told["unexpected_keys"]) == [n for n in sorted(model.state_dict()) if "attn_gate" in n]
    assert host.BaseInfo.of(read).fingerprint == host.BaseInfo.of(model).fingerprint
    assert torch.equal(tiny.logits(read, ids), tiny.logits(host.detach(model), ids))


def offloaded_later(tiny, tmp_path):
    import accelerate

    def disk(model):
        return accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")

    def cpu(model):
        return accelerate.cpu_offload(model, execution_device="cpu")

    ids, settings = tiny.tokens(1, 80), {"qk_norm": True}
    for offload in (disk, cpu):
        model = tiny.make()
        gates, others = tiny.gates_for(model, **settings), tiny.gates_for(model, init="random")
        host.attach(model, gates, POLICY, min_tokens=0)
        host.add_gates(model, "others", others)
        host.save_gates(model, tmp_path / "before")
        expected, checksum = tiny.logits(model, ids), host.base_checksum(model)
        offload(model)
        assert model.model.layers[1].self_attn.attn_gate.linear_k.weight.is_meta
        assert torch.equal(tiny.logits(model, ids), expected)
        assert host.base_checksum(model) == checksum
        host.save_gates(model, tmp_path / "after")
        before, after = ((tmp_path / name / "gates.safetensors").read_bytes() for name in ("before", "after"))
        assert after == before
        for name in ("others", "default"):
            host.set_gates(model, name)
            assert torch.equal(tiny.logits(model, ids), expected) == (name == "default")
        host.detach(model)
        host.attach(model, gates, POLICY, min_tokens=0)
        assert torch.equal(tiny.logits(model, ids), expected)
        assert set(host.usage(model)) == {"sparse"}


def tensor_parallel(tiny, tmp_path):
    """`test_tensor_parallel` does all else in processes."""
    tiny.make(vocab_size=96).save_pretrained(tmp_path / "model")
    assert together(2, tmp_path, heads_of_one, tmp_path / "model") == [2, 2]


def heads_of_one(folder):
    """How many heads the gates of one process have."""
    model = load(folder)
    host.attach(model, host.new_gates(model, block_size=16), POLICY)
    return model.model.layers[0].self_attn.attn_gate.config.num_heads


def spread(tiny, processes):
    """A model as transformers marks one that it spread; a test has one process."""
    model = tiny.make()
    model.config.distributed_config = DistributedConfig(tp_size=processes)
    model._device_mesh = "a mesh"
    return model


def split_heads(tiny, tmp_path):
    host.attach(spread(tiny, 4), tiny.gates_for(tiny.make()), POLICY)


def learning_from_parts(tiny, tmp_path):
    model, gates = spread(tiny, 2), tiny.gates_for(tiny.make())
    with pytest.raises(NotImplementedError, match="gates learn from all heads"):
        record_layers(model, gates, [], lambda *call: None)
    Distiller(model, gates, lambda step: tiny.tokens(2, 64).numpy())


def compiled(tiny, tmp_path):
    """Attaching, switching off and detaching are noticed by what was compiled before."""
    torch.compiler.reset()
    model, ids = tiny.make(), tiny.tokens(1, 80)
    fast, dense = torch.compile(model, backend="eager"), tiny.logits(model, ids)
    assert torch.equal(tiny.logits(fast, ids), dense)
    assert host.attach(fast, tiny.gates_for(model), "top_k:0.8", min_tokens=0) is fast
    sparse = tiny.logits(model, ids)
    assert torch.equal(tiny.logits(fast, ids), sparse)
    with host.dense(fast):
        assert torch.equal(tiny.logits(fast, ids), dense)
    assert torch.equal(tiny.logits(fast, ids), sparse)
    assert host.usage(model) == {"sparse": 6}
    plain = generated(model, ids, cache_implementation="static")
    how = CompileConfig(backend="eager", mode=None)
    # On a GPU generate compiles by itself.
    how._compile_all_devices = True
    assert torch.equal(generated(model, ids, cache_implementation="static", compile_config=how), plain)
    host.detach(fast)
    assert torch.equal(tiny.logits(fast, ids), dense)


def fullgraph(tiny, tmp_path):
    torch.compiler.reset()
    torch.compile(attached(tiny), backend="eager", fullgraph=True)(tiny.tokens(1, 20))


def gradients(tiny, tmp_path, checkpointing=False):
    """Adapters are trained through sparse attention; with everything read as through dense attention."""
    ids, found = tiny.tokens(1, 64), {}
    for policy in (None, "top_k:1", "top_k:0.8"):
        model = adapted(tiny.make())
        if policy:
            gates = tiny.gates_for(tiny.make())
            host.attach(model, gates, policy, min_tokens=0)
        if checkpointing:
            model.train()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        lora = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
        assert all(g is not None and g.isfinite().all() and g.any() for g in lora.values())
        found[policy] = torch.cat([g.flatten() for g in lora.values()])
    tiny.assert_as_close(found["top_k:1"], found[None], found[None].double())
    assert not torch.equal(found["top_k:0.8"], found[None])


def checkpointing(tiny, tmp_path):
    gradients(tiny, tmp_path, checkpointing=True)


def distributed(tiny, tmp_path):
    """One process is enough to see who waits for a gradient that never comes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def sharded(model):
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        return model

    def steps(model):
        """Three steps, of which the third shows what the first left."""
        for p in model.parameters():
            p.grad = None
        losses = []
        for _ in range(3):
            losses.append(model(ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
        return torch.stack(losses)

    ids, options = tiny.tokens(2, 64), {"policy": "top_k:0.5", "min_tokens": 0}
    expected = steps(host.attach(tiny.make(), tiny.gates_for(tiny.make()), **options))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        for wrap in (DistributedDataParallel, sharded):
            for wrapped_first in (False, True):
                model, gates = tiny.make(), tiny.gates_for(tiny.make())
                if wrapped_first:
                    model = host.attach(wrap(model), gates, **options)
                else:
                    model = wrap(host.attach(model, gates, **options))
                torch.testing.assert_close(steps(model), expected)
                assert host.attached(model)
                assert host.BaseInfo.of(model).num_layers == 2
                assert host.usage(model) == {"sparse": 6}
                assert not [n for n, p in model.named_parameters() if "attn_gate" in n and p.requires_grad]
                host.set_policy(model, "top_k:1")
                with host.dense(model):
                    steps(model)
                assert host.usage(model) == {"sparse": 6}
                assert host.detach(model) is model
                assert not host.attached(model)
                # Whoever teaches gates gets them as they came.
                assert all(p.requires_grad for p in gates.parameters())
                steps(model)
    finally:
        dist.destroy_process_group()


@contextmanager
def one_of_a_mesh(tmp_path):
    """Be the only process of a mesh."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def filled(tiny, tmp_path, model, then):
    """Give a prompt to a cache that processes share, and go on."""
    with one_of_a_mesh(tmp_path) as mesh:
        cache = host.ContextParallelCache(model, mesh)
        ids = tiny.tokens(2, 70)
        logits = host.prefill(model, ids, cache).logits
        return then(ids, cache), logits


def context_parallel(tiny, tmp_path):
    model = attached(tiny)
    host.set_policy(model, decode="token_budget:48")
    ids = tiny.tokens(2, 70)
    following = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **following)

    def generate(ids, cache):
        more = torch.cat([ids, expected[:, 70:71]], 1)
        return model.generate(more, max_new_tokens=19, do_sample=False, **host.cache_argument(model, cache))

    answer, logits = filled(tiny, tmp_path, model, generate)
    assert torch.equal(logits.argmax(-1), expected[:, 70:71])
    assert torch.equal(answer, expected)


def windows_shared(tiny, tmp_path):
    model = attached(tiny, kind="gemma2")
    filled(tiny, tmp_path, model, None)


def rope_shared(tiny, tmp_path):
    model = attached(tiny, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    filled(tiny, tmp_path, model, None)


def heads_shared_too(tiny, tmp_path):
    model = attached(tiny)
    # As transformers leaves one that it spread; tests of context parallelism spread one.
    model.config.distributed_config, model._device_mesh = SimpleNamespace(tp_size=2), object()
    filled(tiny, tmp_path, model, None)


def layers_shared_too(tiny, tmp_path):
    model = tiny.make()
    host.attach(model, tiny.gates_for(model, layers_per_gate=2), "top_k:0.5")
    filled(tiny, tmp_path, model, None)


def second_prompt(tiny, tmp_path):
    model = attached(tiny)
    filled(tiny, tmp_path, model, lambda ids, cache: host.prefill(model, ids, cache))


def beams_shared(tiny, tmp_path):
    model = attached(tiny)
    filled(
        tiny,
        tmp_path,
        model,
        lambda ids, cache: model.generate(
            torch.cat([ids, ids[:, :1]], 1),
            num_beams=2,
            max_new_tokens=4,
            do_sample=False,
            **host.cache_argument(model, cache),
        ),
    )


def gradient_shared(tiny, tmp_path):
    model = attached(tiny)
    filled(
        tiny,
        tmp_path,
        model,
        lambda ids, cache: model(ids[:, :1], **host.cache_argument(model, cache)),
    )


def dropout(tiny, tmp_path):
    attached(tiny, attention_dropout=0.1).train()(tiny.tokens(1, 64))


CHECKS = {
    ("cache", "dynamic"): dynamic,
    ("cache", "static"): static,
    ("cache", "quantised"): quantised,
    ("cache", "copied, cropped, reordered, rows selected"): changed_cache,
    ("cache", "filled before attaching, or by other gates"): filled_elsewhere,
    ("cache", "the same with RoPE of type dynamic or longrope"): longrope,
    ("cache", "keys taken out, as by compression: sparse from then on"): taken_out,
    ("prompt", "left or right padding"): padding,
    ("prompt", "in pieces"): in_pieces,
    ("prompt", "several turns on one cache"): several_turns,
    ("prompt", "the same, with sliding windows and padding between a row's tokens"): sliding_turns,
    ("prompt", "packed sequences"): packed,
    ("prompt", "4-D masks"): masks,
    ("prompt", "bidirectional attention, is_causal=False"): bidirectional,
    ("generate", "greedy, sampling, beams"): generate_modes,
    ("generate", "assisted: draft model, prompt lookup"): assisted,
    ("generate", "pipeline"): pipeline,
    ("generate", "continuous batching"): continuous_batching,
    ("generate", "continuous batching in CUDA graphs, compiled or asynchronous"): batches_in_graphs,
    ("generate", "continuous batching with a policy for decoding"): batches_of_steps,
    ("generate", "continuous batching with RoPE of type dynamic or longrope"): batches_with_longrope,
    ("generate", "output_attentions"): output_attentions,
    ("decoding", "static caches in CUDA graphs"): static_steps,
    ("decoding", "left padding"): padded_steps,
    ("decoding", "padding between a row's tokens"): steps_after_padding,
    ("decoding", "beams, caches that were changed"): changed_steps,
    ("decoding", "quantised and offloaded caches"): quantised_steps,
    ("decoding", "gates of its own"): gates_for_decoding,
    ("decoding", "with a gradient"): steps_with_a_gradient,
    ("base", "LoRA, before or after attaching"): lora,
    ("base", "prefix tuning"): prefix_tuning,
    ("base", "4-bit (bitsandbytes)"): four_bits,
    ("base", "8-bit (bitsandbytes)"): eight_bits,
    ("base", "device_map with layers on the disk"): offloaded,
    ("base", "offloaded by Accelerate after attaching"): offloaded_later,
    ("base", "save_pretrained"): saved_whole,
    ("base", "tensor parallelism"): tensor_parallel,
    ("base", "tensor parallelism over processes that do not divide the heads"): split_heads,
    ("base", "torch.compile"): compiled,
    ("base", "torch.compile(fullgraph=True)"): fullgraph,
    ("shared prompt", "context parallelism"): context_parallel,
    ("shared prompt", "sliding windows"): windows_shared,
    ("shared prompt", "RoPE of type dynamic or longrope"): rope_shared,
    ("shared prompt", "beside tensor parallelism"): heads_shared_too,
    ("shared prompt", "layers that share a choice"): layers_shared_too,
    ("shared prompt", "a second long prompt"): second_prompt,
    ("shared prompt", "caches that are copied, cropped or reordered, as by beams"): beams_shared,
    ("shared prompt", "with a gradient"): gradient_shared,
    ("training", "the model"): gradients,
    ("training", "activation checkpointing"): checkpointing,
    ("training", "DDP and FSDP2, before or after attaching"): distributed,
    ("training", "gates, and calibrating them, under tensor parallelism"): learning_from_parts,
    ("training", "attention dropout"): dropout,
}


def test_every_line_has_its_check():
    assert [(f.kind, f.name) for f in features()] == list(CHECKS)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
@pytest.mark.parametrize("feature", features(), ids=lambda f: f"{f.kind}: {f.name}")
def test_the_line_is_true(tiny, tmp_path, feature):
    check = CHECKS[feature.kind, feature.name]
    if feature.reason is None:
        check(tiny, tmp_path)
        return
    # Every refusal is of one of these kinds; torch's own, for whole graphs, is a RuntimeError.
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as refusal:
        check(tiny, tmp_path)
    assert feature.reason in str(refusal.value)
