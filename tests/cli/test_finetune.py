"""``seerattention finetune`` as a person types it."""

import json
import tomllib

import pytest
import torch
from transformers import AutoModelForCausalLM

from seerattention.hosts.transformers import attach, load_gates


@pytest.fixture
def finetune(base, text, invoke):
    def run(out, *settings, gates=None):
        new = ("gate.block_size=16", "gate.q_sub_block=8", "gate.k_sub_block=8")
        start = ("--gates", gates) if gates else [f"--set={one}" for one in new]
        more = [one if str(one).startswith("--") else f"--set={one}" for one in settings]
        options = ("--text", text, "--out", out, "--set", "length=128", "--steps", 2, *start, *more)
        return invoke("finetune", base, *options)

    return run


def test_a_run_prints_its_plan_extends_the_context_and_leaves_a_model_and_its_gates(finetune, tmp_path):
    more = ("length=512", "rope_type=yarn", "rope_factor=4", "density=[0.2, 0.5]", "lr=1e-3")
    more = (*more, "warmup_gate_steps=2", "gradient_checkpointing=true")
    result, said = finetune(tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "RoPE yarn, reads 1,024 tokens" in said
    assert "2 of the gates alone, then 2 joint, of 1 x 512 tokens" in said
    assert "a density of 0.2 to 0.5, drawn per step, on backend" in said
    assert "all weights" in said
    assert "step 2/2 loss" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.rope_parameters["rope_type"] == "yarn"
    gates = load_gates(tmp_path / "out" / "gates")
    assert gates.policy == "top_k:0.2,sink_blocks=1"
    attach(model, gates)
    report = json.loads((tmp_path / "out" / "gates" / "results.json").read_text())
    rows = [name for name, row in report.items() if isinstance(row, dict) and row["perplexity"] > 1]
    assert rows == ["dense", "top_k:0.5", "top_k:0.2"]
    kept = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (kept["density"], kept["policy"], kept["rope_type"]) == ([0.2, 0.5], gates.policy, "yarn")
    again, said = finetune(tmp_path / "out", *more)
    assert again.exit_code == 0, again.output
    assert "continuing after step 2" in said


def test_distilled_gates_are_taken_and_a_dry_run_writes_nothing(finetune, base, tmp_path):
    first, _ = finetune(tmp_path / "out", "gates_only=true")
    assert first.exit_code == 0, first.output
    result, said = finetune(tmp_path / "dry", "--dry-run", gates=tmp_path / "out" / "gates")
    assert result.exit_code == 0, result.output
    assert "s for one step, about" in said
    assert not (tmp_path / "dry").exists()
    # Gates alone were trained, so the model is the one before.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    before = AutoModelForCausalLM.from_pretrained(base)
    assert all(map(torch.equal, saved.state_dict().values(), before.state_dict().values()))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["density=much"], ["density must be of type float | tuple[float, float], got 'much'"]),
        (["density=[0.5, 0.1]"], ["density must be one or two ascending numbers in (0, 1]"]),
        (["rope_factor=4"], ["rope_factor 4 needs rope_type"]),
        (["length=512"], ["the model reads 256 tokens", "rope_type yarn and rope_factor 2"]),
        (
            ["length=1024", "rope_type=yarn", "rope_factor=2"],
            [
                "yarn with factor 2 reaches 2 x 256 = 512 tokens, fewer than the 1,024",
                "a factor of 4 or more",
            ],
        ),
        (["lora=4", "gates_only=true"], ["exclude each other"]),
        (["backend=hopper"], ["'hopper' cannot train through selected blocks", "reference"]),
        (["backend=gather", "soft_gates=true"], ["soft gates put a bias into the logits"]),
        (["soft_gates=true", "gradient_checkpointing=true"], ["soft gates keep the maps of all layers"]),
        (["gates=x"], ["gates have their design"]),
        (["lr=inf"], ["lr must be finite and below 1e+37, got inf"]),
        (["gate.num_kv_heads=2"], ["num_kv_heads of gates is their model's"]),
        (["lr=1e30"], ["of the text, has loss", "it changed nothing", "there is no checkpoint yet"]),
    ],
)
def test_bad_options_end_in_one_sentence_and_save_nothing(finetune, tmp_path, more, words):
    result, said = finetune(tmp_path / "out", *more)
    assert result.exit_code == 2, said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "out" / "model").exists()


def test_what_is_in_the_way_of_the_gates_is_refused_before_the_training(finetune, tmp_path):
    (tmp_path / "out" / "gates").mkdir(parents=True)
    (tmp_path / "out" / "gates" / "thesis.tex").write_text("")
    result, said = finetune(tmp_path / "out")
    assert result.exit_code == 2
    assert "error:" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["gates"]
