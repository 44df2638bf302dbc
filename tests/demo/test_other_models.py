"""The demo on another model than the bundled one: its gates, its limit, and the words that it understands."""

import importlib
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from seerattention import cli
from seerattention.demo import run as module
from seerattention.demo.run import LARGER, Plan, methods
from seerattention.hosts.transformers import new_gates, save_gates
from seerattention.measure import bundled

command = importlib.import_module("seerattention.cli.demo")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The command with two steps of distillation: its exit code, its output in one line and its folder."""
    monkeypatch.setattr(command, "FEWEST_STEPS", 2)
    monkeypatch.setattr(command, "MOST_STEPS", 2)

    def run(*arguments):
        result = CliRunner().invoke(cli.app(), ["demo", "--out", str(tmp_path / "out"), *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split()), tmp_path / "out"

    return run


def saved(folder, positions, layers=2):
    """A tiny random model with the teacher's tokenizer, as a folder."""
    torch.manual_seed(0)
    _, tokenizer = bundled.load_teacher()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=positions,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_folder_is_compared_in_the_words_that_it_understands(demo, monkeypatch):
    """The bundled teacher, as a folder that is anybody's: its own words are found out."""
    plan = Plan(tokens=1024, live_tokens=512, windows=1, documents=1, recall_rows=4, lengths=(256, 512, 1024))
    monkeypatch.setattr(module, "LARGER", plan)
    arguments = "--model", bundled.TEACHER, "--gates", bundled.GATES, "--longest", 512
    code, said, out = demo(*arguments)
    assert code == 0, said
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == str(bundled.TEACHER)
    assert report["wording"] == "the bundled teacher's words"
    assert "it finds most in the bundled teacher's words" in said
    assert report["questions"] == 8
    assert "8 needle questions in 1 documents" in said
    assert "steps of 512 tokens" in said
    rows = {row["method"]: row for row in report["rows"]}
    assert rows["dense"]["needle"] >= 7 / 8
    assert "SeerAttention, live gates" in rows
    assert [row["tokens"] for row in report["lengths"]] == [256, 512]


def test_a_models_limit_and_questions_that_it_cannot_answer(demo, tmp_path):
    """Nothing is past the model's positions, and what dense attention cannot do is left out."""
    model = saved(tmp_path / "model", positions=3000)
    save_gates(new_gates(model, block_size=128), tmp_path / "gates")
    code, said, out = demo("--model", tmp_path / "model", "--gates", tmp_path / "gates")
    assert code == 0, said
    assert "a context of 3,000 tokens" in said
    assert "at 2,048 tokens: perplexity over 1 window measured dense" in said
    assert "not measured: needles: this model does not answer such questions at 2,048 tokens" in said
    assert "needles: numbers found" not in said
    assert "last rows dense" not in said
    report = json.loads((out / "report.json").read_text())
    assert "wording" not in report
    assert report["questions"] == 0
    assert [row["tokens"] for row in report["lengths"]] == [2048]
    assert {row["tokens"] for row in report["rows"]} == {2048}
    assert not any("needle" in row for row in report["rows"])
    assert all(row["recall"] < 1 for row in report["rows"][1:])
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_within_a_models_positions():
    assert LARGER.within(None) == LARGER.within(8192) == LARGER
    cut = LARGER.within(3000)
    assert (cut.tokens, cut.live_tokens, cut.lengths) == (2048, 1024, (2048,))
    assert LARGER.within(4096).tokens == 4096


def test_all_methods_have_the_blocks_of_the_gates(tmp_path):
    gates = new_gates(saved(tmp_path / "model", positions=2048), block_size=128)
    dense, *sparse = methods(gates, None)
    assert dense.dense_last_tokens == 0
    assert len(sparse) == 7
    assert {method.dense_last_tokens for method in sparse} == {256}


def test_a_model_of_too_few_positions_is_refused(demo, tmp_path):
    saved(tmp_path / "model", positions=1024)
    code, said, _ = demo("--model", tmp_path / "model", "--gates", tmp_path / "gates")
    assert code == 2
    assert "the model has 1,024 positions, and the demo needs 2,048 or more; give another model" in said


def test_gates_of_another_model_are_refused_before_any_work(demo, tmp_path):
    saved(tmp_path / "model", positions=2048)
    code, said, out = demo("--model", tmp_path / "model", "--gates", bundled.GATES)
    assert code == 2
    assert "these gates were made for seerattention/teacher, not for" in said
    assert "Needle questions" not in said
    assert not (out / "report.json").exists()


def test_what_is_missing_is_named(demo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said, _ = demo("--model", "some/model")
    assert (code, "give the gates of some/model by --gates" in said) == (2, True)
    code, said, _ = demo("--model", "smollm2")
    assert code == 2
    assert "there is no recipes/smollm2/gates here; run this in a clone of the repository" in said
    (tmp_path / "recipes" / "smollm2" / "gates").mkdir(parents=True)
    for more in (), ("--gates", bundled.GATES):
        code, said, _ = demo("--model", "smollm2", *more)
        assert code == 2
        assert "there is no runs/smollm2 here; make it" in said
        assert "`pip install gguf` and `python recipes/smollm2/make_model.py`" in said


def test_smollm2_is_what_the_recipe_makes_with_its_gates(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in "runs/smollm2", "recipes/smollm2/gates":
        (tmp_path / folder).mkdir(parents=True)
    assert command._named("smollm2", "") == ("runs/smollm2", "recipes/smollm2/gates")
    assert command._named("smollm2", "mine") == ("runs/smollm2", "mine")
