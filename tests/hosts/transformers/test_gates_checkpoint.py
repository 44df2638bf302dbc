"""Gates on disk: exact round trips, all-or-nothing writing, and one sentence for every damage."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from seerattention import files
from seerattention.hosts import transformers as host
from seerattention.hosts.transformers import checkpoint


@pytest.fixture
def gates(tiny):
    return tiny.gates_for(tiny.make())


@pytest.fixture
def saved(gates, tmp_path):
    host.save_gates(gates, tmp_path / "gates", policy="top_k:0.1,sink_blocks=1")
    return tmp_path / "gates"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "design", [{}, {"q_proj": False, "q_pool": ("avg",)}, {"qk_norm": True, "gate_dim": 8}]
)
def test_round_trip(tiny, kind, tmp_path, dtype, design):
    model, ids = tiny.make(kind), tiny.tokens(1, 70)
    gates = tiny.gates_for(model, **design).to(dtype)
    host.save_gates(gates, tmp_path / "gates", policy="top_k:0.8")
    back = host.load_gates(tmp_path / "gates")
    assert (back.config, back.base, back.policy) == (gates.config, gates.base, "top_k:0.8")
    assert list(back.state_dict()) == list(gates.state_dict())
    for key, value in gates.state_dict().items():
        assert back.state_dict()[key].dtype == dtype
        assert torch.equal(back.state_dict()[key], value)
    host.attach(model, gates, min_tokens=0, policy="top_k:0.8")
    expected = tiny.logits(model, ids)
    host.attach(model, back, min_tokens=0)
    assert torch.equal(tiny.logits(model, ids), expected)


def test_gates_go_over_to_scores_in_eight_bits_and_back(tiny, tmp_path):
    model, ids = tiny.make(), tiny.tokens(1, 200)
    gates = tiny.gates_for(model)
    host.attach(model, gates, min_tokens=0, policy="top_k:0.3")
    plain = tiny.logits(model, ids)
    assert gates.score_in("float8_e4m3fn") is gates
    rounded = tiny.logits(model, ids)
    assert not torch.equal(rounded, plain), "the same blocks are chosen; nothing would be tested"
    host.save_gates(gates, tmp_path / "gates")
    back = host.load_gates(tmp_path / "gates")
    assert back.config.score_dtype == "float8_e4m3fn"
    host.attach(model, back, min_tokens=0, policy="top_k:0.3")
    assert torch.equal(tiny.logits(model, ids), rounded)
    back.score_in(None)
    assert torch.equal(tiny.logits(model, ids), plain)
    with pytest.raises(ValueError, match="score_dtype must be 'float8_e4m3fn', or left out, got 'int8'"):
        back.score_in("int8")


def test_files_of_before_scores_in_eight_bits_have_none(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["gate"]["score_dtype"]
    (saved / "config.json").write_text(json.dumps(config))
    assert host.load_gates(saved).config.score_dtype is None


def test_a_policy_for_each_phase_is_saved(tiny, tmp_path):
    gates = tiny.gates_for(tiny.make(), phase="both")
    folder = tmp_path / "gates"
    host.save_gates(gates, folder, policy="top_k:0.5", decode_policy="token_budget:640,sink_blocks=1")
    back = host.load_gates(folder)
    assert (back.config.phase, back.policy) == ("both", "top_k:0.5")
    assert back.decode_policy == "token_budget:640,sink_blocks=1"
    host.save_gates(back, folder, policy="top_k:0.2")
    back = host.load_gates(folder)
    assert (back.policy, back.decode_policy) == ("top_k:0.2", "token_budget:640,sink_blocks=1")
    with pytest.raises(ValueError, match="is a share of a whole prompt"):
        host.save_gates(gates, tmp_path / "other", decode_policy="top_k:0.5")
    assert not (tmp_path / "other").exists()


def test_files_of_before_phases_are_for_prefill(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["decode_policy"], config["gate"]["phase"]
    (saved / "config.json").write_text(json.dumps(config))
    gates = host.load_gates(saved)
    assert (gates.config.phase, gates.decode_policy) == ("prefill", None)
    config["decode_policy"] = "top_k:0.1"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json is damaged .*is a share of a whole prompt"):
        host.load_gates(saved)


def test_gates_for_decoding_are_no_wider_than_a_head(tiny):
    gates = tiny.gates_for(tiny.make(head_dim=8), phase="decode")
    assert (gates.config.k_sub, gates.config.dim) == (1, 8)
    # Wider ones would turn other pairs of values than the model, and not begin as its products.
    weight = next(gate for _, gate in gates.items()).linear_k.weight
    torch.testing.assert_close(weight, torch.eye(8).expand_as(weight), atol=0.06, rtol=0)
    assert tiny.gates_for(tiny.make(head_dim=8), phase="decode", gate_dim=16).config.dim == 16


def test_gates_for_decoding_alone_have_a_design_of_their_own(tiny):
    model = tiny.make()
    config = host.new_gates(model, phase="decode").config
    assert (config.per_kv_head, config.q_sub_block, config.q_pool) == (True, 1, ("avg",))
    assert host.new_gates(model, phase="decode", k_sub_block=None).config.k_sub == config.block_size
    assert host.new_gates(model, phase="both").config == dataclasses.replace(
        host.new_gates(model).config, phase="both"
    )


def test_files_and_keys(saved):
    assert sorted(contents(saved)) == ["config.json", "gates.safetensors"]
    assert sorted(load_file(saved / "gates.safetensors")) == [
        f"model.layers.{i}.self_attn.attn_gate.linear_{x}.weight" for i in (0, 1) for x in "kq"
    ]
    assert host.load_gates(str(saved)).policy == "top_k:0.1,sink_blocks=1"


def test_saving_gates_while_attached_changes_nothing(tiny, gates, saved, tmp_path):
    model = tiny.make()
    host.attach(model, gates, "top_k:0.1")
    host.save_gates(gates, tmp_path / "again", policy="top_k:0.1,sink_blocks=1")
    assert contents(tmp_path / "again") == contents(saved)


def test_saving_again_replaces(gates, saved, tmp_path):
    with torch.no_grad():
        next(gates.parameters()).add_(1)
    host.save_gates(gates, saved)
    assert torch.equal(next(host.load_gates(saved).parameters()), next(gates.parameters()))
    assert [p.name for p in tmp_path.iterdir()] == ["gates"]


@pytest.mark.parametrize("step", ["save_file", "write_text", "replace"])
def test_failure_while_writing_leaves_the_old_folder(gates, saved, tmp_path, monkeypatch, step):
    before = contents(tmp_path)
    real = Path.replace

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def replace(self, target):
        return full() if self.name == "new" else real(self, target)

    # Where folders can be exchanged there is no second step that could fail.
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)
    if step == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(Path, step, full if step == "write_text" else replace)
    with torch.no_grad():
        next(gates.parameters()).add_(1)
    with pytest.raises(OSError, match="No space left"):
        host.save_gates(gates, saved)
    with pytest.raises(OSError, match="No space left"):
        host.save_gates(gates, tmp_path / "new gates")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["gates"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(gates, saved, tmp_path, value):
    before = contents(tmp_path)
    with torch.no_grad():
        gates.layers["1"].linear_k.weight[0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.attn_gate.linear_k.weight holds NaN or inf.*train"
    ):
        host.save_gates(gates, saved)
    with pytest.raises(ValueError, match="NaN or infinity"):
        host.save_gates(gates, tmp_path / "other")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_not_read(saved, value):
    weights = load_file(saved / "gates.safetensors")
    weights["model.layers.1.self_attn.attn_gate.linear_k.weight"][0, 0, 0] = value
    save_file(weights, saved / "gates.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.1.*linear_k.weight in .*gates.safetensors holds NaN or inf"
    ):
        host.load_gates(saved)


def test_unknown_policy_is_refused_before_writing(gates, tmp_path):
    with pytest.raises(ValueError, match="unknown policy 'best:3'; write one of"):
        host.save_gates(gates, tmp_path / "gates", policy="best:3")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(gates, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write .*/file/gates .*; choose a folder that can be written"):
        host.save_gates(gates, tmp_path / "file" / "gates")
    assert contents(tmp_path) == {"file": b"mine"}


def test_other_files_are_never_replaced(gates, saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("mine")
    before = contents(tmp_path)
    for name in ("file", "model"):
        with pytest.raises(
            FileExistsError, match=f"{name} holds other files .*; choose a new or empty folder"
        ):
            host.save_gates(gates, tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "gates.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}; give a folder written by save_gates"):
        host.load_gates(saved)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give a folder"):
        host.load_gates(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        host.load_gates(Path("runs/nothing"))


def edit_weights(folder, change):
    weights = load_file(folder / "gates.safetensors")
    change(weights)
    save_file(weights, folder / "gates.safetensors")


KEY = "model.layers.1.self_attn.attn_gate.linear_k.weight"


def test_missing_key(saved):
    edit_weights(saved, lambda w: w.pop(KEY))
    with pytest.raises(ValueError, match=f"1 missing gate keys, the first is {KEY}; save or download"):
        host.load_gates(saved)


def test_extra_key(saved):
    edit_weights(saved, lambda w: w.update({"model.layers.9.bias": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"1 extra gate keys, the first is model.layers.9.bias; save or"):
        host.load_gates(saved)


def test_misshapen_weight(saved):
    edit_weights(saved, lambda w: w.update({KEY: torch.zeros(2, 3, 4)}))
    with pytest.raises(ValueError, match=rf"{KEY} in .* is \[2, 3, 4\], .* needs \[2, 48, 16\]; save or"):
        host.load_gates(saved)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_truncated_weights(saved, kept):
    whole = (saved / "gates.safetensors").read_bytes()
    assert kept < len(whole)
    (saved / "gates.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"gates.safetensors is truncated or damaged .*; save or download"):
        host.load_gates(saved)


def edited(**changes):
    def edit(config):
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = config
            for parent in parents:
                place = place[parent]
            place[last] = value

    return edit


@pytest.mark.parametrize(
    "change",
    [
        edited(format=2),
        edited(gate=[1, 2]),
        edited(gate__colour="red"),
        edited(gate__num_heads=3),
        edited(gate__block_size="wide"),
        edited(base_model={}),
        edited(base_model__colour="red"),
        edited(layers=["first"]),
        edited(layers=None),
        edited(policy="best:3"),
        edited(policy=3),
        lambda config: config.pop("format"),
        lambda config: config.pop("gate"),
        lambda config: config.pop("policy"),
    ],
)
def test_damaged_config(saved, change):
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json is damaged \(.*\); save or download the gates again"):
        host.load_gates(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_config_that_is_not_json(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        host.load_gates(saved)


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickles_are_never_read(saved, tmp_path):
    trace = tmp_path / "executed"
    for name in ("attn_gate_weights.pth", "pytorch_model.bin"):
        (saved / name).write_bytes(pickle.dumps(Bomb(trace)))
    host.load_gates(saved)
    (saved / "gates.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match="truncated or damaged"):
        host.load_gates(saved)
    (saved / "gates.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no gates.safetensors"):
        host.load_gates(saved)
    assert not trace.exists()
    pickle.loads((saved / "pytorch_model.bin").read_bytes())
    assert trace.exists()


def test_hub_id(gates, saved, monkeypatch):
    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        return str(saved)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    back = host.load_gates("someone/some-gates")
    assert torch.equal(next(back.parameters()), next(gates.parameters()))
    wanted = ["gates.safetensors", "config.json", "calibration.json", "attn_gate_weights.pth"]
    assert asked == [("someone/some-gates", {"allow_patterns": wanted})]
    for local in (saved, str(saved)):
        host.load_gates(local)
    for local in ("./some/gates", "/some/gates", "a/b/c", "gates"):
        with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
            host.load_gates(local)
    assert len(asked) == 1


def test_hub_failure_is_one_sentence(monkeypatch):
    def fail(name, **kwargs):
        raise LocalEntryNotFoundError("Nothing cached and no network.\n\nand much more")

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError) as error:
        host.load_gates("someone/no-gates")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(
        "there is no folder someone/no-gates, and it cannot be had from the hub"
    )
    assert str(error.value).endswith("check the name")


def test_a_moved_folder_still_loads(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert host.load_gates(tmp_path / "elsewhere").policy == "top_k:0.1,sink_blocks=1"


def test_gates_that_may_not_be_read_are_not_called_missing(saved, public, unreadable):
    shutil.copytree(saved, public / "gates")
    for name in ("gates.safetensors", "config.json"):
        with unreadable(public / "gates" / name), pytest.raises(PermissionError, match=rf"denied.*{name}"):
            host.load_gates(public / "gates")


def test_how_far_gates_were_taught_is_saved_and_files_that_do_not_say_it_load(gates, saved):
    assert host.load_gates(saved).reach is None
    gates.reach = 4096
    host.save_gates(gates, saved, policy="top_k:0.1")
    assert host.load_gates(saved).reach == 4096
    config = json.loads((saved / "config.json").read_text())
    # The design, by which gates are told apart, has no part in it.
    assert "reach" not in config["gate"]
    del config["reach"]
    (saved / "config.json").write_text(json.dumps(config))
    assert host.load_gates(saved).reach is None
    (saved / "config.json").write_text(json.dumps(config | {"reach": "far"}))
    with pytest.raises(ValueError, match=r"is damaged \(ValueError: reach must be"):
        host.load_gates(saved)
