"""Published gates that cannot be read are refused in one sentence, and code in them is never run."""

import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch

from seerattention.hosts import transformers as host
from tests.hosts.transformers.published import KEY, decode, prefill, weights_of, write


def edit(folder, change):
    """Change the weights of a folder in place."""
    weights = torch.load(folder / "attn_gate_weights.pth", weights_only=True)
    change(weights)
    torch.save(weights, folder / "attn_gate_weights.pth")


def refusal(folder, kind=ValueError):
    with pytest.raises(kind) as error:
        host.load_gates(folder)
    message = str(error.value)
    assert "\n" not in message
    assert ". " not in message.replace("e.g. ", "")
    return message


BOTH = pytest.mark.parametrize(
    ("config", "name"),
    [(prefill(), "mask_linear_k"), (decode(), "attngate_knorm")],
    ids=["prefill", "decode"],
)


@BOTH
def test_missing_key(tmp_path, config, name):
    folder = write(tmp_path / "gates", config)
    edit(folder, lambda w: w.pop(KEY.format(1, name)))
    assert f"has 1 missing gate keys, the first is {KEY.format(1, name)}; " in refusal(folder)


@BOTH
def test_extra_key(tmp_path, config, name):
    folder = write(tmp_path / "gates", config)
    edit(folder, lambda w: w.update({KEY.format(2, name): w[KEY.format(1, name)]}))
    assert f"has 1 extra gate keys, the first is {KEY.format(2, name)}; " in refusal(folder)


@BOTH
def test_misshapen_key(tmp_path, config, name):
    folder = write(tmp_path / "gates", config)
    edit(folder, lambda w: w.update({KEY.format(0, name): torch.zeros(2, 3)}))
    message = refusal(folder)
    assert f"{KEY.format(0, name)} in " in message
    assert " is [2, 3], its configuration needs [" in message


def test_queries_merged_in_another_layout_are_misshapen(tmp_path):
    folder, key = write(tmp_path / "gates", decode()), KEY.format(0, "attngate_linear_q")
    edit(folder, lambda w: w.update({key: w[key].flatten(1, 2)}))
    assert "is [2, 32, 16], its configuration needs [2, 2, 16, 16]" in refusal(folder)


def test_a_gate_too_large_for_memory_is_refused_before_it_is_made(tmp_path):
    for name, size, said in (
        ("seerattn_gate_hidden_size", 2**16, "gate keys"),
        ("seerattn_gate_hidden_size", 2**40, "gate_dim must be at most 65,536"),
        ("num_hidden_layers", 10**9, "gates are for 1 to 1,000 layers"),
    ):
        folder = write(tmp_path / f"{name} {size}", prefill() | {name: size}, weights_of(prefill()))
        assert said in refusal(folder)


def test_settings_that_the_weights_contradict(tmp_path):
    weights = weights_of(prefill("forced"))
    folder = write(tmp_path / "gates", prefill(seerattn_gate_block_size=64), weights)
    assert "2 extra gate keys" in refusal(folder)
    folder = write(tmp_path / "gates", decode() | {"seerattn_use_qk_norm": False}, weights_of(decode()))
    assert "4 extra gate keys" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"seerattn_gate_block_size": 48},
            "seerattn_gate_block_size is 48, published gates have one of 16, 32",
        ),
        ({"seerattn_gate_block_size": 0}, "seerattn_gate_block_size is 0"),
        ({"seerattn_gate_block_size": "wide"}, "seerattn_gate_block_size is 'wide'"),
        ({"seerattn_gate_block_size": ...}, "it lacks 'seerattn_gate_block_size'"),
        ({"seerattn_gate_hidden_size": ...}, "it lacks 'seerattn_gate_hidden_size'"),
        ({"seerattn_gate_hidden_size": 15}, "even gate_dim, got 15"),
        ({"seerattn_gate_hidden_size": "wide"}, "gate_dim must be a whole number >= 1, got 'wide'"),
        ({"base_model": ...}, "it lacks 'base_model'"),
        ({"base_model": 3}, "base_model must be the name of a model, got 3"),
        ({"base_model": ""}, "base_model must be the name of a model"),
        ({"model_type": ...}, "it lacks 'model_type'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number >= 1, got 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a whole number >= 1, got '4'"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"rope_theta": ..., "rope_parameters": [1]}, "no attribute 'get'"),
        ({"seerattn_sparsity_method": "best"}, "seerattn_sparsity_method is 'best', not threshold, nz_ratio"),
        ({"seerattn_threshold": 2.0}, "threshold must be in [0, 1), got 2.0"),
        ({"seerattn_threshold": None}, "float() argument"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, changes, words):
    config = {k: v for k, v in (prefill() | changes).items() if v is not ...}
    message = refusal(write(tmp_path / "gates", config, weights_of(prefill())))
    assert message.startswith("the settings of the published gates in ")
    assert words in message
    assert message.endswith("; download the gates again")


def test_gate_types_that_cannot_be_used(tmp_path):
    weights = weights_of(prefill())
    message = refusal(write(tmp_path / "a", prefill() | {"seerattn_gate_type": "Qbest_Kavg"}, weights))
    assert "unknown gate type 'Qbest_Kavg'" in message
    config = decode() | {"seerattn_q_head_pooling_type": "Qavgproj"}
    message = refusal(write(tmp_path / "b", config, weights_of(decode())))
    assert "seerattn_q_head_pooling_type is 'Qavgproj', this version reads Qproj alone" in message


def test_missing_weights(tmp_path):
    folder = write(tmp_path / "gates", prefill())
    (folder / "attn_gate_weights.pth").unlink()
    message = refusal(folder, FileNotFoundError)
    assert message.endswith("holds published settings but no attn_gate_weights.pth; download the gates again")


@pytest.mark.parametrize("kept", [0, 4, 100, 1000, -10])
def test_truncated_weights(tmp_path, kept):
    folder = write(tmp_path / "gates", prefill())
    file = folder / "attn_gate_weights.pth"
    file.write_bytes(file.read_bytes()[:kept])
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize("text", [b"version https://git-lfs.github.com/spec/v1\nsize 1\n", b"<html>", b"PK"])
def test_files_that_are_something_else(tmp_path, text):
    folder = write(tmp_path / "gates", prefill())
    (folder / "attn_gate_weights.pth").write_bytes(text)
    assert "is damaged, compressed, or a bare pickle" in refusal(folder)


def test_a_file_damaged_inside(tmp_path):
    folder = write(tmp_path / "gates", prefill())
    file = folder / "attn_gate_weights.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes(50) + whole[250:])
    refusal(folder)


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:`torch.jit")
def test_a_program_of_torchscript(tmp_path):
    folder = write(tmp_path / "gates", prefill())
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "attn_gate_weights.pth")
    assert "is damaged or of another kind" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({3: torch.zeros(1)}, "holds a dict, not tensors by name"),
        ({KEY.format(0, "mask_linear_k"): "x"}, "is str, not a plain tensor of float32 or bfloat16"),
        ({KEY.format(0, "mask_linear_k"): torch.zeros(1, dtype=torch.int64)}, "is torch.int64, not a plain"),
        ({KEY.format(0, "mask_linear_k"): torch.zeros(1, dtype=torch.float16)}, "is torch.float16, not a"),
        ({KEY.format(0, "mask_linear_k"): torch.eye(2).to_sparse()}, "not a plain tensor"),
        ({}, "2 missing gate keys"),
    ],
)
def test_files_of_other_things_than_weights(tmp_path, content, words):
    assert words in refusal(write(tmp_path / "gates", prefill(), content))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("beside_weights", [False, True])
@pytest.mark.parametrize("how", ["touch", "system", "eval", "exec"])
def test_code_in_the_file_is_refused_and_never_run(tmp_path, how, beside_weights, bare):
    trace = tmp_path / "executed"
    bomb = {
        "touch": Bomb(Path.touch, trace),
        "system": Bomb(os.system, f"{sys.executable} -c \"open('{trace}', 'w')\""),
        "eval": Bomb(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Bomb(exec, f"open({str(trace)!r}, 'w').close()"),
    }[how]
    content = {**weights_of(prefill()), "z": bomb} if beside_weights else bomb
    folder = write(tmp_path / "gates", prefill())
    file = folder / "attn_gate_weights.pth"
    if bare:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    for _ in range(2):
        message = refusal(folder)
        assert "not executed" in message
        assert "safetensors" in message
    assert not trace.exists()
    if how == "touch" and not bare:
        # The file is a real one: read without care, it runs.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(file, weights_only=False)
        assert trace.exists()
