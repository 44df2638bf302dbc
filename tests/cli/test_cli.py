"""The command line as a person types it: exit codes, one clear sentence, nothing left behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from seerattention import cli
from seerattention.hosts.transformers import load_gates


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
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


def invoke(*arguments):
    return CliRunner().invoke(cli.app(), [str(a) for a in arguments])


def distil(base, text, out, *more):
    gate = '{"block_size": 16, "q_sub_block": 8, "k_sub_block": 8}'
    return invoke("distill", base, "--text", text, "--out", out, "--length", 128, "--gate", gate, *more)


def test_distill_prints_its_plan_shows_progress_and_writes_gates_that_load(base, text, tmp_path):
    result = distil(base, text, tmp_path / "out", "--steps", 4, "--save-every", 2, "--policy", "top_k:0.3")
    assert result.exit_code == 0, result.output
    plan = " ".join(result.output.split())
    assert "tokens; 4 steps of 1 x 128 read 512" in plan
    assert "frozen" in plan
    assert "step 4/4 loss" in plan
    gates = load_gates(tmp_path / "out" / "gates")
    assert gates.policy == "top_k:0.3"
    assert gates.config.block_size == 16
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_distill_dry_run_times_a_step_and_writes_nothing(base, text, tmp_path):
    result = distil(base, text, tmp_path / "out", "--steps", 4, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "s for one step, about" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_distill_ends_with_a_report_on_heldout_text(base, text, tmp_path):
    more = ("--packing", "--grad-accum", 2, "--sequences", 2, "--eval-every", 1, "--early-stop", 3)
    result = distil(base, text, tmp_path / "out", "--steps", 3, *more)
    assert result.exit_code == 0, result.output
    assert "held out: the end of the text, not trained on" in " ".join(result.output.split())
    report = json.loads((tmp_path / "out" / "gates" / "results.json").read_text())
    assert set(report["recall"]) == {"0.2", "0.1", "0.05"}
    assert report["heldout_tokens"] == 128
    assert report["dense"]["perplexity"] > 1
    assert "perplexity" in report["top_k:0.05"]
    assert "a document of 128 is too short" in report["skipped"]


def test_distill_runs_under_a_launcher_and_only_one_process_prints(base, text, tmp_path):
    gate = '{"block_size": 16, "q_sub_block": 8, "k_sub_block": 8}'
    options = ("--text", text, "--out", tmp_path / "out", "--length", 128, "--gate", gate)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    more = ("-m", "seerattention.cli", "distill", base, *options, "--sequences", 2, "--steps", 2)
    command = [sys.executable, *map(str, (*launch, *more, "--device", "cpu"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("base model") == 1
    assert load_gates(tmp_path / "out" / "gates").config.block_size == 16


def test_distill_run_again_continues(base, text, tmp_path):
    out = tmp_path / "out"
    assert distil(base, text, out, "--steps", 2).exit_code == 0
    again = distil(base, text, out, "--steps", 2)
    assert again.exit_code == 0
    assert "continuing after step 2" in again.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--policy", "top_q:0.1"], ["unknown policy 'top_q:0.1'", "top_k:<density>"]),
        (["--policy", "top_k:1.5"], ["density must be in (0, 1], got 1.5"]),
        (["--gate", "[1]"], ["--gate must be a JSON object", "[1]"]),
        (["--gate", '{"blocksize": 16}'], ["unknown gate settings ['blocksize']", "block_size"]),
        (["--steps", "0"], ["steps must be a whole number >= 1, got 0"]),
        (["--length", "99999"], ["the text has", "fewer than one sequence of 99999"]),
        (["--length", "63"], ["--length 63 is below 4 blocks, 64 tokens"]),
        (["--grad-accum", "2"], ["1 sequences per step cannot be split evenly"]),
        (["--dataset", "x/y"], ["either --text or --dataset"]),
        (["--dtype", "int8"], ["--dtype must be one of", "'int8'"]),
        (["--device", "abacus"], ["--device 'abacus' is not a device"]),
    ],
)
def test_bad_options_end_in_one_sentence_before_any_work(base, text, tmp_path, more, words):
    result = distil(base, text, tmp_path / "out", *more)
    assert result.exit_code == 2
    message = " ".join(result.output.split())
    assert message.count("error:") == 1
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out" / "gates").exists()


def test_an_output_that_cannot_be_written_is_refused(base, text, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (
        distil(base, text, tmp_path / "file" / "out", "--steps", 1),
        invoke("demo", "--out", tmp_path / "file" / "out"),
        invoke("bench", "prefill", "--out", tmp_path / "file" / "out.json"),
    ):
        assert command.exit_code == 2, command.output
        assert "error:" in command.output
        assert str(tmp_path / "file") in command.output.replace("\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_family_without_a_file_is_refused_by_name(text, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)).save_pretrained(tmp_path / "m")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(tmp_path / "m")
    result = distil(tmp_path / "m", text, tmp_path / "out", "--length", 1)
    assert result.exit_code == 2
    assert "'gpt2'" in result.output
    assert "llama, mistral, olmo2, olmo3, phi3, qwen2, qwen3" in " ".join(result.output.split())


def test_info_lists_backends_with_reasons_and_explains_a_model(base):
    result = invoke("info")
    assert result.exit_code == 0
    for name in ("gather", "reference", "chunked", "llama", "top_k:<density>", "meanpool"):
        assert name in result.output
    explained = invoke("info", base)
    assert "layers 0-1: sparse prefill, dense decoding" in explained.output
    table = invoke("info", "--markdown").output
    assert "| `block_sparse_attention` | `gather` | yes | yes |" in table


def test_info_gives_a_backends_reason_why_not(monkeypatch):
    from seerattention.cli.info import support
    from seerattention.ops.block_sparse_attention import BACKENDS

    monkeypatch.setattr(BACKENDS["flex"], "unsupported", lambda *a, **k: ["no compiler"])
    assert "[yellow]" not in invoke("info").output
    assert "no: no compiler" in " ".join(invoke("info").output.split())
    assert {reason for s in support() if s.backend == "flex" for reason in s.reasons} == {"no compiler"}


def test_the_installed_script_answers():
    script = f"{sys.prefix}/bin/seerattention"
    result = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for name in cli.commands():
        assert name in result.stdout
    unknown = invoke("fly")
    assert unknown.exit_code == 2
    assert "fly" in unknown.stderr
