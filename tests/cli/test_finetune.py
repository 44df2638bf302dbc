"""``seerattention finetune`` as a person types it."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from seerattention import cli
from seerattention.hosts.transformers import attach, load_gates


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model of 256 tokens and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, 64, 2000)))
    return path


def finetune(base, text, out, *more):
    gate = '{"block_size": 16, "q_sub_block": 8, "k_sub_block": 8}'
    options = ("--text", text, "--out", out, "--length", 128, "--gate", gate, "--steps", 2, *more)
    result = CliRunner().invoke(cli.app(), [str(a) for a in ("finetune", base, *options)])
    return result, " ".join(result.output.split())


def test_a_run_prints_its_plan_extends_the_context_and_leaves_a_model_and_its_gates(base, text, tmp_path):
    more = ("--length", 512, "--rope-type", "yarn", "--rope-factor", 4, "--density", "0.2:0.5", "--lr", 1e-3)
    more = (*more, "--warmup-gate-steps", 2, "--gradient-checkpointing")
    result, said = finetune(base, text, tmp_path / "out", *more)
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
    assert list(report["perplexity"]) == ["dense", "top_k:0.5", "top_k:0.2"]
    again, said = finetune(base, text, tmp_path / "out", *more)
    assert again.exit_code == 0, again.output
    assert "continuing after step 2" in said


def test_distilled_gates_are_taken_and_a_dry_run_writes_nothing(base, text, tmp_path):
    first, _ = finetune(base, text, tmp_path / "out", "--gates-only")
    assert first.exit_code == 0, first.output
    more = ("--gates", tmp_path / "out" / "gates", "--dry-run")
    result, said = finetune(base, text, tmp_path / "dry", *more)
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
        (["--density", "much"], ["--density must be a number such as 0.1 or a range", "'much'"]),
        (["--density", "0.5:0.1"], ["density must be one or two ascending numbers in (0, 1]"]),
        (["--rope-factor", "4"], ["--rope-factor 4 needs --rope-type"]),
        (["--length", "512"], ["the model reads 256 tokens", "--rope-type yarn --rope-factor 2"]),
        (
            ["--length", "1024", "--rope-type", "yarn", "--rope-factor", "2"],
            [
                "yarn with factor 2 reaches 2 x 256 = 512 tokens, fewer than the 1,024",
                "a factor of 4 or more",
            ],
        ),
        (["--lora", "4", "--gates-only"], ["exclude each other"]),
        (["--backend", "hopper"], ["'hopper' cannot train through selected blocks", "reference"]),
        (["--backend", "gather", "--soft-gates"], ["soft gates put a bias into the logits"]),
        (["--soft-gates", "--gradient-checkpointing"], ["soft gates keep the maps of all layers"]),
        (["--lr", "1e30"], ["of the text, has loss", "it changed nothing", "there is no checkpoint yet"]),
    ],
)
def test_bad_options_end_in_one_sentence_and_save_nothing(base, text, tmp_path, more, words):
    result, said = finetune(base, text, tmp_path / "out", *more)
    assert result.exit_code == 2, said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "out" / "model").exists()


def test_what_is_in_the_way_of_the_gates_is_refused_before_the_training(base, text, tmp_path):
    (tmp_path / "out" / "gates").mkdir(parents=True)
    (tmp_path / "out" / "gates" / "thesis.tex").write_text("")
    result, said = finetune(base, text, tmp_path / "out")
    assert result.exit_code == 2
    assert "error:" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["gates"]
