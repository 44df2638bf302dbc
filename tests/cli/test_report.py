"""``seerattention report`` as a person types it."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from seerattention import cli
from seerattention.hosts.transformers import save_gates
from seerattention.measure import bundled
from seerattention.policies import Calibrated, Calibration


def invoke(*arguments):
    return CliRunner().invoke(cli.app(), ["report", *map(str, arguments)])


def data_of(path):
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The bundled gates with thresholds of their own, which are their default policy."""
    gates = bundled.load_teacher_gates()
    laws = dict.fromkeys(range(8), ((-4.0, 0.0, 0.0),) * 6)
    gates.calibration = Calibration("recall", 0.95, 8192, (64, 64), -0.5, None, laws)
    folder = tmp_path_factory.mktemp("gates") / "gates"
    save_gates(gates, folder, policy=Calibrated(gates.calibration, sink_blocks=1))
    return folder


def test_without_anything_the_bundled_gates_are_explored(tmp_path):
    out = tmp_path / "new" / "page.html"
    result = invoke("--tokens", 1024, "--layers", "5,1", "--density", 0.25, "--out", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"page\.html: 0\.\d MB; open it in a browser", result.output)
    data = data_of(out)
    assert data["results"] is None
    explorer = data["explorer"]
    assert (explorer["model"], explorer["tokens"], explorer["layers"]) == (bundled.TEACHER_NAME, 1024, [1, 5])
    assert [p["label"] for p in explorer["policies"]] == [
        "top-k, 10% of the blocks, saved with the gates",
        "top-k, 25% of the blocks",
    ]
    assert "".join(explorer["blocks"]).count("The number of the ") == 8
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_a_calibrated_policy_comes_first(calibrated, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(bundled.TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    out = tmp_path / "page.html"
    result = invoke("--gates", calibrated, "--text", text, "--tokens", 200, "--out", out)
    assert result.exit_code == 0, result.output
    explorer = data_of(out)["explorer"]
    assert explorer["policies"][0] == {
        "name": "calibrated,sink_blocks=1",
        "label": "calibrated: recall 95.0%, on 8,192 tokens, saved with the gates",
    }
    assert len(explorer["policies"]) == 4
    assert (explorer["text"], len(explorer["blocks"])) == ("text.txt", 4)


def test_bad_input_ends_in_one_sentence_and_leaves_nothing(calibrated, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, **shape)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(bundled.TEACHER).save_pretrained(tmp_path / "model")
    for name, file in (("empty", ""), ("killed", "samples.jsonl"), ("broken", "summary.json")):
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).write_text('{"rows": [{"task": "needle"}]}')
    (tmp_path / "short.txt").write_text("A text of a few words.")
    out = tmp_path / "made" / "page.html"
    for arguments, words in (
        (["--eval", tmp_path / "empty"], "holds no results (no summary.json); give the folder that"),
        (
            ["--eval", tmp_path / "killed"],
            "holds samples but no summary.json: the evaluation still runs, or was killed; wait for it, or",
        ),
        (["--eval", tmp_path / "broken"], "is not the summary of an evaluation (KeyError: 'length'); run"),
        (["--eval", tmp_path / "empty", "--density", 0.1], "are for the explorer; give --gates too"),
        (["--gates", tmp_path / "empty"], "config.json"),
        (["--gates", "bundled", "--model", tmp_path / "model", "--tokens", 512], "these gates were made for"),
        (["--text", tmp_path / "short.txt"], "--tokens asks for 4,096; give more text or fewer"),
        (["--tokens", 40_000], "--tokens 40,000 is past the model's limit of 32,768; give fewer"),
        (["--tokens", 100], "is too short, ask for at least 266"),
        (["--layers", "3,9", "--tokens", 1024], "no gates in layers [9]; these gates are for layers [0, 1"),
        (["--layers", "all"], "--layers must be like 0,7,15, got 'all'"),
        (["--density", 1.5], "1.5"),
        (["--tokens", 32_768, "--layers", "0,1,2,3,4,5,6,7"], "give fewer layers or fewer tokens"),
    ):
        result = invoke(*arguments, "--out", out)
        assert result.exit_code == 2, result.output
        message = " ".join(result.output.split())
        assert message.count("error:") == 1, message
        assert words in message
        assert not out.parent.exists()
    result = invoke("--out", tmp_path)
    assert result.exit_code == 2
    assert "is a folder; give --out a file, such as" in " ".join(result.output.split())
