"""Gates are checked against a model of which vLLM has the configuration, and a folder the weights."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from seerattention.hosts.transformers import BaseInfo, new_gates, save_gates
from seerattention.hosts.vllm import choice
from seerattention.hosts.vllm.choice import skeleton
from seerattention.hosts.vllm.settings import Settings
from seerattention.measure import bundled


def config(page=128, processes=1, folder=bundled.TEACHER, stages=1, **changes):
    text = AutoConfig.from_pretrained(bundled.TEACHER, **changes)
    model = SimpleNamespace(hf_text_config=text, model=str(folder), dtype=torch.float32)
    each = 8 // stages
    model.get_layers_start_end_indices = lambda p: (
        p.rank // processes * each,
        (p.rank // processes + 1) * each,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(block_size=page),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=processes, pipeline_parallel_size=stages, rank=0
        ),
        device_config=SimpleNamespace(device_type="cpu"),
    )


def choice_of(given, settings):
    return choice.choice_of(given, settings, check_base=settings.check_base)


def test_a_skeleton_is_known_by_its_weights():
    model = skeleton(config().model_config, weights=True)
    assert BaseInfo.of(model).fingerprint == BaseInfo.of(bundled.load_teacher()[0]).fingerprint
    assert model.model.embed_tokens.weight.is_meta
    assert not model.model.rotary_emb.inv_freq.is_meta


def test_without_weights_it_is_known_by_its_name(tmp_path):
    assert BaseInfo.of(skeleton(config(folder=tmp_path).model_config, weights=True)).fingerprint == ""
    with pytest.raises(ValueError, match="nothing but the name is known"):
        choice_of(config(folder=tmp_path), Settings(str(bundled.GATES), "top_k:0.1"))
    choice_of(config(folder=tmp_path), Settings(str(bundled.GATES), "top_k:0.1", check_base=False))


def test_what_is_chosen():
    found = choice_of(config(), Settings(str(bundled.GATES), "top_k:0.1", min_tokens=7))
    assert sorted(found.prefill.scorers) == list(range(8))
    assert str(found.prefill.policy) == "top_k:0.1"
    assert found.decode.policy is None
    assert found.min_tokens == 7
    assert not any(
        weight.requires_grad for gate in found.prefill.scorers.values() for weight in gate.parameters()
    )


def test_gates_that_serve_several_layers(tmp_path):
    gates = new_gates(bundled.load_teacher()[0], layers_per_gate=2)
    save_gates(gates, tmp_path / "gates", policy="top_k:0.1")
    found = choice_of(config(), Settings(str(tmp_path / "gates"))).prefill
    assert sorted(found.scorers) == [0, 2, 4, 6]
    assert found.shared == {1: 0, 3: 2, 5: 4, 7: 6}
    for stages in (2, 4):
        choice_of(config(stages=stages, processes=2), Settings(str(tmp_path / "gates")))
    with pytest.raises(
        NotImplementedError, match="begins a process with layer 1, which reads what a layer of"
    ):
        choice_of(config(stages=8), Settings(str(tmp_path / "gates")))


def test_pages_that_hold_no_whole_blocks():
    with pytest.raises(NotImplementedError, match="pages of 96 tokens"):
        choice_of(config(96), Settings(str(bundled.GATES), "top_k:0.1"))
    choice_of(config(96), Settings(str(bundled.GATES), "top_k:0.1", summaries="made"))


def test_processes_that_split_a_group(tmp_path):
    model = bundled.load_teacher()[0]
    save_gates(new_gates(model, per_kv_head=True), tmp_path / "gates")
    settings = Settings(str(tmp_path / "gates"), "top_k:0.1")
    heads = model.config.num_key_value_heads
    choice_of(config(processes=heads), settings)
    with pytest.raises(NotImplementedError, match=f"score once per KV head, of which there are {heads}"):
        choice_of(config(processes=2 * heads), settings)


def test_other_towers_have_layers_too(tmp_path):
    """As those of pictures, whose layers are numbered alike."""
    weights = load_file(bundled.TEACHER / "model.safetensors")
    theirs = {f"language_model.{name}": value for name, value in weights.items()}
    for name in list(weights):
        if "layers.0.self_attn" in name:
            tail = name[name.index("layers.0") :]
            for tower in ("vision_tower.vision_model.encoder.", "model.mtp_", "model.visual."):
                theirs[tower + tail] = torch.randn(3, 3)
    save_file(theirs, tmp_path / "model.safetensors")
    model = skeleton(config(folder=tmp_path).model_config, weights=True)
    assert BaseInfo.of(model).fingerprint == BaseInfo.of(bundled.load_teacher()[0]).fingerprint


def test_no_policy_and_none_to_have(tmp_path):
    save_gates(new_gates(bundled.load_teacher()[0]), tmp_path / "gates")
    with pytest.raises(ValueError, match="saved without a policy for prompts"):
        choice_of(config(), Settings(str(tmp_path / "gates")))
    with pytest.raises(ValueError, match="nothing is left to choose"):
        choice_of(config(), Settings(str(tmp_path / "gates"), "dense"))


def test_a_backend_that_does_not_run_here():
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        choice_of(config(), Settings(str(bundled.GATES), "top_k:0.1", backend="triton"))
