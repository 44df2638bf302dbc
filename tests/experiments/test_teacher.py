"""The teacher's recipe from books to gates, at a size for a CPU: stopped half-way, it continues."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattention.hosts.transformers import load_gates
from seerattention.measure import bundled

RECIPE = """
seed = 1
[tokenizer]
vocab_size = 300
characters_per_book = 100000
[model]
model_type = "qwen3"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 1024
rope_theta = 1e6
[data]
digits = 3
[optimizer]
betas = [0.9, 0.95]
weight_decay = 0.1
clip = 1.0
warmup = 0.02
floor = 0.1
[[stage]]
length = 512
tokens = 8192
batch = 2048
sequences = 2
lr = 2e-3
needles = 0.4
repeats = 0.3
expect = 0.0
[[stage]]
length = 768
tokens = 3072
batch = 1536
sequences = 2
lr = 1e-3
needles = 0.4
repeats = 0.3
expect = {expect}
[evaluate]
lengths = [768]
documents = 1
text_tokens = 1024
[gates]
steps = 3
lr = 1e-3
tokens = 1536
lengths = [512, 768]
needles = 0.5
repeats = 0.2
policy = "top_k:0.1,sink_blocks=1"
documents = 1
text_tokens = 1024
"""


@pytest.fixture
def run(run_script):
    """Run one of the experiment's modules and return what it printed."""
    return lambda name, *arguments: run_script(f"experiments.teacher.{name}", *arguments)


@pytest.fixture
def recipe(tmp_path):
    """Arguments of a run: books, held-out books, recipe and device."""
    words = bundled.TEXT.read_text(encoding="utf-8")
    for name, part in (("books", words[:150_000]), ("heldout", words[150_000:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(part)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("{expect}", "0.0"))
    pairs = {"--books": "books", "--heldout": "heldout", "--recipe": "recipe.toml"}
    given = [x for option, name in pairs.items() for x in (option, tmp_path / name)]
    return [*given, "--device", "cpu"]


@pytest.fixture
def train(run, recipe, tmp_path):
    """Train into a folder of the name given, and return what was printed."""
    options = (*recipe, "--no-compile", "--tokenizer", tmp_path / "tokenizer", "--check-every")
    return lambda name, *more: run("train", *options, "--out", tmp_path / name, *more)


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_from_books_to_gates(train, run, recipe, tmp_path):
    train("straight")
    assert "time is up" in train("stopped", "--max-seconds", "0")
    assert len(metrics(tmp_path, "stopped")) == 1
    train("stopped")
    assert metrics(tmp_path, "stopped") == metrics(tmp_path, "straight")

    teacher = tmp_path / "straight" / "teacher"
    model = AutoModelForCausalLM.from_pretrained(teacher)
    assert len(AutoTokenizer.from_pretrained(teacher)) == 300 == model.config.vocab_size
    assert [row["tokens"] for row in json.loads((teacher / "results.json").read_text())["lengths"]] == [768]
    assert "| 768 |" in (teacher / "README.md").read_text()

    run("gates", "--teacher", teacher, *recipe, "--out", tmp_path / "gates")
    assert load_gates(tmp_path / "gates" / "gates").policy == "top_k:0.1,sink_blocks=1"
    rows = json.loads((tmp_path / "gates" / "gates" / "results.json").read_text())
    assert rows[0]["method"] == "dense"


def test_a_stage_that_learned_nothing_stops_the_run(train, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("{expect}", "0.5"))
    with pytest.raises(SystemExit, match="stage 2 ends with 0% of the needles found, the recipe expects 50%"):
        train("out")
    assert not (tmp_path / "out" / "teacher").exists()
