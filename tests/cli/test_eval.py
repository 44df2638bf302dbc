"""``seerattention eval`` as a person types it."""

import json
import re

import pytest
from typer.testing import CliRunner

from seerattention import cli

CONFIG = """
out = "{out}"
lengths = [512]
densities = [0.3]
samples = 2
[model]
device = "cpu"
[methods.gates]
gates = "bundled"
[tasks.needle]
needles = 2
[tasks.perplexity]
samples = 1
"""


def invoke(*arguments):
    return CliRunner().invoke(cli.app(), ["eval", *map(str, arguments)])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(out=tmp_path / "out"))
    return path


def test_a_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path):
    result = invoke(config, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "samples  6 in 4 cells; 0 are there, 6 to be made" in result.output
    assert "gates: top_k:{density},sink_blocks=1 at densities 0.3" in result.output
    assert "task     needle: 2 samples at 512 tokens" in result.output
    # 8 blocks: the first and the own one are more than the one that 30 % come to.
    short = "top_k:0.3,sink_blocks=1 asks for 30.0% of a prompt of 8 blocks and reads 41.7%"
    assert short in " ".join(result.output.split())
    assert re.search(r"time     about \d+ s, if every method takes as long as dense", result.output)
    assert not (tmp_path / "out").exists()


def test_a_run_prints_tables_with_dense_first_and_goes_on_where_it_was(config, tmp_path):
    result = invoke(config)
    assert result.exit_code == 0, result.output
    assert "needle 512 dense: 100.0%" in result.output
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [(r["task"], r["method"]) for r in map(json.loads, lines)] == [
        ("needle", "dense"), ("needle", "dense"), ("needle", "gates"), ("needle", "gates"),
        ("perplexity", "dense"), ("perplexity", "gates"),
    ]  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["dense", "gates"] * 2
    assert summary["rows"][0]["score"] == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| dense | all | 100.0% | 2 | 100.0% | 34.2% to 100.0% |" in text
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write(lines[0][:50])
    again = invoke(config)
    assert again.exit_code == 0, again.output
    assert "samples  6 in 4 cells; 6 are there, 0 to be made" in again.output
    assert "line 7:" in again.output
    assert "its sample is made again" in again.output
    assert (tmp_path / "out" / "samples.jsonl").read_text().splitlines() == lines


def test_errors_are_one_sentence_and_come_before_any_work(config, tmp_path):
    for old, new, words in (
        ("[tasks.needle]", "[tasks.needel]", ["unknown task 'needel'", "variable_tracking"]),
        ("[methods.gates]", "[methods.oracel]\n[methods.gates]", ["unknown method 'oracel'", "oracle_mass"]),
        ("lengths = [512]", "lengths = [65536]", ["past the model's limit: 65536", "takes 32768"]),
        ('device = "cpu"', 'device = "abacus"', ["'abacus' is not a device"]),
        ("[model]", 'text = ["no.txt"]\n[model]\nname = "nowhere"', ["there is no file no.txt"]),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(config.read_text().replace(old, new))
        result = invoke(path)
        assert result.exit_code == 2, result.output
        message = " ".join(result.output.split())
        assert message.count("error:") == 1
        assert "Traceback" not in message
        for word in words:
            assert word in message
        assert not (tmp_path / "out" / "samples.jsonl").exists()
    (tmp_path / "in the way" / "summary.json").mkdir(parents=True)
    result = invoke(config, "--out", tmp_path / "in the way")
    assert result.exit_code == 2
    assert "it is a folder" in " ".join(result.output.split())
    assert [path.name for path in (tmp_path / "in the way").iterdir()] == ["summary.json"]
    (tmp_path / "file").write_text("")
    assert invoke(config, "--out", tmp_path / "file" / "out").exit_code == 2


def test_help_names_units_and_defaults():
    text = " ".join(invoke("--help").output.split())
    for words in (
        "samples = 50 (per cell)",
        "tokens of prompt and answer",
        "fractions of the causally",
        "Table model: name = ",
        "Tables methods.NAME: gates = ",
        "Tables tasks.NAME: task = ",
        "--dry-run",
    ):
        assert words in text


def test_a_paragraph_of_the_help_has_no_short_line_but_its_last():
    lines = [line.strip() for line in invoke("--help").output.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("lengths = "))
    paragraph = lines[start : lines.index("", start)]
    width = max(map(len, paragraph))
    assert all(len(line) > width - 20 for line in paragraph[:-1]), paragraph
