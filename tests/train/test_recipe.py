"""A run from its settings, and the settings in its folder."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seerattention.hosts.transformers import load_gates, save_gates
from seerattention.settings import build, read
from seerattention.train import Distillation, Finetuning

SMALL = {"block_size": 16, "q_sub_block": 8, "k_sub_block": 16}


@pytest.fixture(scope="module")
def told(tiny, tmp_path_factory):
    """Settings of a run on a tiny model of 97 words."""
    folder = tmp_path_factory.mktemp("base")
    tiny.make().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, 97, 1000)))
    return {"model": str(folder), "text": str(text), "length": 128, "steps": 2, "gate": SMALL, "seed": 3}


@pytest.mark.parametrize("kind", [Distillation, Finetuning])
def test_the_kept_settings_make_the_same_run(kind, told, tmp_path):
    recipe = build(kind, told)
    assert recipe.seed == recipe.source.seed == 3
    list(recipe.start(tmp_path / "one").trainer.run())
    kept = read(tmp_path / "one" / "config.toml")
    # All that the model does not give; a block of one summary is one of its own tokens, as TOML has no null.
    assert {**kept["gate"], **SMALL} == kept["gate"]
    assert {"k_pool", "gate_dim", "rope"} < kept["gate"].keys()
    assert not {"num_heads", "head_dim"} & kept["gate"].keys()
    list(build(kind, kept).start(tmp_path / "two").trainer.run())
    first, second = (
        list(build(kind, kept).start(tmp_path / n).trainer.gates.parameters()) for n in ("one", "two")
    )
    assert all(map(torch.equal, first, second))


def test_a_run_starts_from_gates_which_have_their_design(told, tiny, tmp_path):
    gates = tiny.gates_of(tiny.make(), init="random")
    save_gates(gates, tmp_path / "gates")
    given = {name: value for name, value in told.items() if name != "gate"} | {
        "gates": str(tmp_path / "gates")
    }
    run = build(Distillation, given).start(tmp_path / "out")
    assert all(map(torch.equal, run.trainer.gates.parameters(), load_gates(tmp_path / "gates").parameters()))
    assert "gate" not in read(tmp_path / "out" / "config.toml")
    with pytest.raises(ValueError, match="gates have their design; leave gate out"):
        build(Distillation, {**given, "gate": SMALL}).start(None)


@pytest.mark.parametrize("kind", [Distillation, Finetuning])
def test_a_run_goes_on_with_the_gates_that_it_began_with(kind, told, tiny, tmp_path):
    list(build(kind, told).start(tmp_path / "out").trainer.run())
    kept = (tmp_path / "out" / "config.toml").read_bytes()
    save_gates(tiny.gates_of(tiny.make(), **SMALL), tmp_path / "gates")
    given = {name: value for name, value in told.items() if name != "gate"}
    with pytest.raises(ValueError, match=r"starts from new gates, not from .*; go on with the same"):
        build(kind, given | {"gates": str(tmp_path / "gates")}).start(tmp_path / "out")
    assert (tmp_path / "out" / "config.toml").read_bytes() == kept


@pytest.mark.parametrize("kind", [Distillation, Finetuning])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text": "no.txt"}, "there is no file no.txt"),
        ({"heldout": "no.txt"}, "there is no file no.txt"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"seed": 2**64}, "seed must be a whole number >= 0"),
        ({"sequences": 0}, "sequences must be a whole number >= 1, got 0"),
        ({"lr": float("inf")}, "lr must be finite"),
    ],
)
def test_what_can_be_seen_is_refused_before_the_model_is_loaded(kind, told, settings, words):
    with pytest.raises((ValueError, OSError), match=words):
        build(kind, {**told, "model": "nowhere", **settings}).start(None)


@pytest.mark.parametrize(
    ("reach", "words"),
    [(64, "is below the length of the sequences, 128"), (512, "past the model's limit of 256")],
)
def test_a_reach_that_cannot_be_had_is_refused_before_weights_and_text_are_read(
    told, monkeypatch, reach, words
):
    from seerattention.hosts import transformers as host

    def fail(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(host, "load_base", fail)
    with pytest.raises(ValueError, match=words):
        build(Distillation, {**told, "reach": reach}).start(None)


def test_gaps_are_of_the_runs_seed_and_of_its_reach(told, tmp_path):
    run = build(Distillation, {**told, "reach": 200}).start(tmp_path / "out")
    assert (run.trainer.reach.tokens, run.trainer.seed) == (200, 3)
    assert read(tmp_path / "out" / "config.toml")["reach"] == 200
    assert build(Distillation, told).start(None).trainer.reach.tokens == 256


@pytest.mark.parametrize("name", ["gates", "model"])
def test_what_is_in_the_way_of_results_is_refused_before_the_model_is_loaded(told, tmp_path, name):
    recipe = build(Finetuning, {**told, "model": "nowhere"})
    (tmp_path / name).write_text("mine")
    with pytest.raises(OSError, match=name):
        recipe.start(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("kind", [Distillation, Finetuning])
def test_gates_have_the_shape_of_their_model(kind, told):
    with pytest.raises(ValueError, match="num_kv_heads of gates is their model's"):
        build(kind, {**told, "gate": {**SMALL, "num_kv_heads": 2}}).start(None)


def test_a_joint_runs_policy_is_at_its_least_density_and_no_folder_is_made_without_one(told, tmp_path):
    recipe = build(Finetuning, {**told, "density": [0.2, 0.5]})
    assert recipe.policy == "top_k:0.2,sink_blocks=1"
    run = recipe.start(None)
    assert run.trainer.time_a_step() > 0
    assert list(tmp_path.iterdir()) == []
    assert sum(run.trainer.memory(128).values()) > 16 * sum(p.numel() for p in run.trainer.model.parameters())


def test_shares_that_are_none_are_refused_before_anything_is_loaded(told):
    with pytest.raises(ValueError, match="are shares of the sequences"):
        build(Distillation, {**told, "retrieval": 1.5})


def test_a_run_of_earlier_settings_says_with_which_it_goes_on(told, tmp_path):
    told = {**told, "gate": {**SMALL, "phase": "decode"}}
    kept = {"retrieval": 0.0, "repeats": 0.0, "reach": 128, "objective": "kl", "target": "max"}
    list(build(Distillation, {**told, **kept}).start(tmp_path).trainer.run())
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    del state["config"]["target"], state["reach"], state["seed"]
    save_file(load_file(path), path, metadata={"state": json.dumps(state)})
    said = "go on with objective kl, target max, retrieval 0, repeats 0, a reach of the length"
    with pytest.raises(ValueError, match=said):
        build(Distillation, told).start(tmp_path)
    with pytest.raises(ValueError, match=r"go on with lr 0\.003, give another output folder"):
        build(Distillation, {**told, **kept, "lr": 0.1}).start(tmp_path)
    assert build(Distillation, {**told, **kept, "steps": 3}).start(tmp_path).trainer.done == 2


def test_gates_of_one_summary_per_block_go_on_by_the_settings_in_their_folder(told, tmp_path):
    told = {**told, "gate": {**SMALL, "k_sub_block": None}}
    list(build(Distillation, told).start(tmp_path).trainer.run())
    for settings in (told, read(tmp_path / "config.toml")):
        assert build(Distillation, settings).start(tmp_path).trainer.done == 2
