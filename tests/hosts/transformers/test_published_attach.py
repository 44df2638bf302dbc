"""Published gates on a model: attached in one line, to their base model and no other, saved as ours."""

import pytest
import torch

from seerattention.hosts import transformers as host
from tests.hosts.transformers.published import DIM, DTYPES, decode, prefill, write


def named(model, name):
    model.config._name_or_path = name
    return model


@pytest.mark.parametrize("config", [prefill(), prefill("two-q-pools"), prefill("other-gate-dim")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_attach_in_one_line(tiny, tmp_path, config, dtype):
    model = named(tiny.make(), "someone/Tiny-Llama").to(dtype)
    ids = tiny.tokens(2, 70)
    dense = tiny.logits(model, ids)
    folder = write(tmp_path / "gates", config | {"seerattn_threshold": 0.3}, dtype=dtype)
    host.attach(model, host.load_gates(folder), min_tokens=0)
    assert not torch.equal(tiny.logits(model, ids), dense)
    assert host.usage(model) == {"sparse": 2}
    host.detach(model)
    assert torch.equal(tiny.logits(model, ids), dense)


@pytest.mark.parametrize(
    "name",
    [
        "someone/Tiny-Llama",
        "elsewhere/tiny-llama",
        "/data/models/Tiny-Llama/",
        "C:\\models\\Tiny-Llama",
        "/root/.cache/hub/models--someone--Tiny-Llama/snapshots/0123abcd",
        "",
    ],
)
def test_the_base_model_is_told_by_its_name(tiny, tmp_path, name):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    host.attach(named(tiny.make(), name), gates)


def test_another_base_model_is_refused(tiny, tmp_path):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    model = named(tiny.make(), "someone/Tiny-Llama-Chat")
    with pytest.raises(
        ValueError, match=r"made for someone/Tiny-Llama, not for someone/Tiny-Llama-Chat: its"
    ) as e:
        host.attach(model, gates)
    assert "its name is Tiny-Llama-Chat, not Tiny-Llama" in str(e.value)
    assert "check_base=False" in str(e.value)
    assert not host.attached(model)
    host.attach(model, gates, check_base=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "num_layers is 3, not 2"),
        ({"num_attention_heads": 8, "head_dim": DIM}, "num_heads is 8, not 4"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 4, not 2"),
        ({"head_dim": 32}, "head_dim is 32, not 16"),
    ],
)
@pytest.mark.parametrize("check_base", [True, False])
def test_another_shape_is_refused_whatever_the_name(tiny, tmp_path, changes, words, check_base):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    model = named(tiny.make(**changes), "someone/Tiny-Llama")
    with pytest.raises(ValueError, match=words):
        host.attach(model, gates, check_base=check_base)


def test_another_family_is_refused(tiny, tmp_path):
    gates = host.load_gates(write(tmp_path / "gates", prefill()))
    with pytest.raises(ValueError, match="model_type is qwen2, not llama"):
        host.attach(named(tiny.make("qwen2"), "someone/Tiny-Llama"), gates, check_base=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [prefill(), prefill("two-q-pools"), decode()])
def test_saved_in_our_layout_they_are_the_same(tiny, tmp_path, config, dtype):
    gates = host.load_gates(write(tmp_path / "published", config, dtype=dtype))
    host.save_gates(gates, tmp_path / "ours")
    back = host.load_gates(tmp_path / "ours")
    assert (back.config, back.base, back.policy) == (gates.config, gates.base, gates.policy)
    assert back.decode_policy == gates.decode_policy
    for key, value in gates.state_dict().items():
        assert back.state_dict()[key].dtype == dtype
        assert torch.equal(back.state_dict()[key], value)
    with pytest.raises(ValueError, match="its name is other, not Tiny-Llama"):
        host.attach(named(tiny.make(), "someone/other"), back)
