"""Bases that are adapted, quantised, spread, saved or compiled, line by line of the table of features."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompileConfig

from seerattention.hosts import transformers as host
from tests.hosts.transformers.features import POLICY, adapted, attached, generated, lines, prove, spread
from tests.hosts.transformers.ranks import load, together


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


def split_heads(tiny, tmp_path):
    host.attach(spread(tiny, 4), tiny.gates_for(tiny.make()), POLICY)


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


KIND = "base"
CHECKS = {
    "LoRA, before or after attaching": lora,
    "prefix tuning": prefix_tuning,
    "4-bit (bitsandbytes)": four_bits,
    "8-bit (bitsandbytes)": eight_bits,
    "device_map with layers on the disk": offloaded,
    "offloaded by Accelerate after attaching": offloaded_later,
    "save_pretrained": saved_whole,
    "tensor parallelism": tensor_parallel,
    "tensor parallelism over processes that do not divide the heads": split_heads,
    "torch.compile": compiled,
    "torch.compile(fullgraph=True)": fullgraph,
}


@lines(KIND)
def test_the_line_is_true(tiny, tmp_path, feature):
    prove(feature, CHECKS, tiny, tmp_path)
