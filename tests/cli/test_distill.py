"""``seerattention distill`` as a person types it."""

import json
import subprocess
import sys
import tomllib
from functools import partial

import pytest
from safetensors.torch import load_file

from seerattention.hosts.transformers import hub, load_gates


def test_it_prints_its_plan_shows_progress_and_writes_gates_that_load(distil, tmp_path):
    more = ("--steps", 4, "--set", "save_every=2", "--set", "policy=top_k:0.3")
    result, said = distil(tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "4 of 1 x 128 tokens read 512; the base is frozen" in said
    assert "positions taught up to 256 of the model's 256: in 70% of the steps there are gaps" in said
    assert "held out: the end of the text, not trained on" in said
    assert "left for distilling and the report" in said
    assert "step 4/4 loss" in said
    gates = load_gates(tmp_path / "out" / "gates")
    assert gates.policy == "top_k:0.3"
    assert gates.config.block_size == 16
    assert gates.reach == 256
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_dry_run_times_a_step_and_writes_nothing(distil, tmp_path):
    result, said = distil(tmp_path / "out", "--steps", 4, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "s for one step, about" in said
    assert not (tmp_path / "out").exists()


def test_the_time_in_the_plan_has_what_is_read_besides_the_steps(distil, tmp_path, monkeypatch):
    from seerattention.train.loop import Loop

    monkeypatch.setattr(Loop, "time_a_step", lambda self: 10.0)
    # A step reads 120 tokens, so does each pass over the one held-out window: one with the steps, and the
    # report's three. Needles need more tokens.
    distil = partial(distil, tmp_path / "out", "--steps", 4, "--dry-run", "--length", 120)
    _, said = distil()
    assert "10.00 s for one step, about 80 s in all" in said
    _, said = distil("--set", "report=false")
    assert "10.00 s for one step, about 50 s in all" in said
    assert "report none" in said
    _, said = distil("--set", "eval_every=1")
    assert "about 110 s in all" in said


def test_it_ends_with_a_report_on_heldout_text(distil, tmp_path):
    settings = ("packing=true", "grad_accum=2", "sequences=2", "eval_every=1", "patience=3")
    more = ("--length", 120, *(f"--set={one}" for one in settings))
    result, said = distil(tmp_path / "out", "--steps", 3, *more)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "gates" / "results.json").read_text())
    # 8 blocks: all three densities read the row's own block and the first, so there is one row of them.
    assert set(report["recall"]) == {"top_k:0.2"}
    assert report["heldout_tokens"] == 120
    assert report["dense"]["perplexity"] > 1
    assert report["top_k:0.2"]["density"] == pytest.approx(15 / 36)
    assert "top_k:0.05" not in report
    assert "report 1 windows and 0 needle documents, dense, top_k:0.2: 3 passes of 120 tokens" in said
    assert "recall shown at a density of 58.3%: recall_density 0.1 is fewer than 3 blocks of a row" in said
    asked = "top_k:0.05,sink_blocks=1 asks for 5.0% of a prompt of 8 blocks and reads 41.7%"
    assert said.count(f"too short {asked}") == said.count(f"too short: {asked}") == 1
    assert said.index("measured dense") < said.index("measured top_k:0.2")
    assert "a document of 120 is too short" in report["skipped"]
    assert "not measured: needles" in said
    assert "perplexity needles" not in said


def test_a_folder_with_brackets_is_named_as_it_is(distil, tmp_path):
    result, said = distil(tmp_path / "o[" / "b]", "--steps", 1, "--set", "report=false")
    assert result.exit_code == 0, result.output
    assert "o[/b]/gates" in said.replace(" ", "")


def test_gates_are_saved_before_they_are_measured_and_the_report_can_be_left_out(
    distil, tmp_path, monkeypatch
):
    from seerattention.measure import compare

    def fail(*args, **kwargs):
        raise ValueError("no memory left")

    monkeypatch.setattr(compare, "measured", fail)
    result, said = distil(tmp_path / "out", "--steps", 1)
    assert result.exit_code == 2
    assert "no memory left" in said
    assert load_gates(tmp_path / "out" / "gates").config.block_size == 16
    result, _ = distil(tmp_path / "out", "--steps", 1, "--set", "report=false")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "gates" / "results.json").exists()


def test_gates_that_serve_several_layers(distil, tmp_path):
    result, said = distil(tmp_path / "out", "--steps", 1, "--set", "layers_per_gate=2")
    assert result.exit_code == 0, result.output
    assert "in 1 layers, whose choices 2 read" in said
    assert [index for index, _ in load_gates(tmp_path / "out" / "gates").items()] == [0]
    result, _ = distil(tmp_path / "two", "--set", "layers_per_gate=3", "--steps", 1)
    assert result.exit_code == 2
    assert "layers_per_gate must be a whole number from 1 to 2" in result.output


def test_a_run_is_repeated_from_the_settings_in_its_folder(distil, invoke, text, tmp_path):
    (tmp_path / "own.toml").write_text('lr = 1e-2\nobjective = "kl"\n[gate]\nk_pool = ["max", "avg"]\n')
    sets = ("--set", "objective=sharp_kl", "--set", "target=mass")
    more = ("--config", tmp_path / "own.toml", *sets, "--steps", 2)
    assert distil(tmp_path / "one", *more)[0].exit_code == 0
    kept = tomllib.loads((tmp_path / "one" / "config.toml").read_text())
    assert kept["text"] == [str(text)]
    assert (kept["steps"], kept["length"], kept["lr"], kept["objective"]) == (2, 128, 1e-2, "sharp_kl")
    assert kept["target"] == "mass"
    assert json.loads((tmp_path / "one" / "run.json").read_text())["config"]["target"] == "mass"
    assert (kept["gate"]["block_size"], kept["gate"]["k_pool"]) == (16, ["max", "avg"])
    result, said = invoke("distill", "--config", tmp_path / "one" / "config.toml", "--out", tmp_path / "two")
    assert result.exit_code == 0, said
    one, two = (load_file(tmp_path / name / "gates" / "gates.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(bool((one[name] == two[name]).all()) for name in one)
    assert tomllib.loads((tmp_path / "two" / "config.toml").read_text()) == kept


def test_it_goes_on_where_it_was_and_refuses_other_settings_by_name(distil, tmp_path):
    out = tmp_path / "out"
    assert distil(out, "--steps", 2)[0].exit_code == 0
    again, said = distil(out, "--steps", 2)
    assert again.exit_code == 0
    assert "continuing after step 2" in said
    kept = (out / "config.toml").read_text()
    other, said = distil(out, "--steps", 2, "--set", "lr=1", "--set", "gate.qk_norm=true")
    assert other.exit_code == 2
    assert "is of another run, config.lr, gate.qk_norm differ" in said
    assert (out / "config.toml").read_text() == kept


def test_it_runs_under_a_launcher_and_only_one_process_prints(base, text, tmp_path):
    settings = ("gate.block_size=16", "gate.q_sub_block=8", "gate.k_sub_block=8", "sequences=2")
    options = ("--text", text, "--out", tmp_path / "out", "--length", 128, "--steps", 2, "--device", "cpu")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    more = ("-m", "seerattention.cli", "distill", base, *options, *(f"--set={one}" for one in settings))
    command = [sys.executable, *map(str, (*launch, *more))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("base model") == 1
    assert load_gates(tmp_path / "out" / "gates").config.block_size == 16


def test_pushed_gates_have_a_card_and_no_login_is_told_before_any_work(distil, tmp_path, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def whoami(self):
            if not pushed.get("login"):
                raise hub.LocalTokenNotFoundError("no token")

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            pushed[repo_id] = {p.name: p.read_bytes() for p in folder_path.iterdir()}
            return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}"})

    monkeypatch.setattr(hub, "HfApi", Api)
    more = ("--steps", 1, "--push-to-hub", "me/gates")
    result, said = distil(tmp_path / "out", *more)
    assert result.exit_code == 2
    assert "hf auth login" in said
    assert not (tmp_path / "out").exists()
    pushed["login"] = True
    result, said = distil(tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "https://huggingface.co/me/gates" in said
    card = pushed["me/gates"]["README.md"].decode()
    assert "| objective | choice_kl |" in card
    assert "| target | mass |" in card
    assert "| top_k:0.2 |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "policy=top_q:0.1"], ["unknown policy 'top_q:0.1'", "top_k:<density>"]),
        (["--set", "policy=top_k:1.5"], ["density must be in (0, 1], got 1.5"]),
        (["--set", "gate=[1]"], ["gate must be of type table, got [1]"]),
        (["--set", "gate.blocksize=16"], ["unknown gate settings ['blocksize']", "block_size"]),
        (["--set", "sequence=2"], ["unknown 'sequence' (did you mean sequences?)", "patience"]),
        (["--set", "lr"], ["a setting must be key=value", "'lr'"]),
        (["--set", "lr=fast"], ["lr must be of type float | None, got 'fast'"]),
        (["--config", "no.toml"], ["there is no file no.toml"]),
        (["--steps", "0"], ["steps must be a whole number >= 1, got 0"]),
        (["--length", "99999"], ["the text has", "fewer than one sequence of 99999"]),
        (["--length", "63"], ["length 63 is below 4 blocks, 64 tokens"]),
        (["--set", "grad_accum=2"], ["1 sequences per step cannot be split evenly"]),
        (["--set", "dataset=x/y"], ["either text or dataset"]),
        (["--set", "dtype=int8"], ["dtype must be one of", "'int8'"]),
        (["--device", "abacus"], ["device 'abacus' is not a device"]),
        (["--push-to-hub", "gates"], ["repo_id must be owner/name, got 'gates'"]),
    ],
)
def test_bad_options_end_in_one_sentence_before_any_work(distil, tmp_path, more, words):
    result, said = distil(tmp_path / "out", *more)
    assert result.exit_code == 2
    assert said.count("error:") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "out" / "gates").exists()


def test_what_is_given_as_a_folder_and_is_none_is_refused_before_any_work_and_a_link_is_followed(
    distil, tmp_path
):
    (tmp_path / "file").write_text("mine")
    for out in ("/dev/null", tmp_path / "file", tmp_path / "file" / "x"):
        result, said = distil(out, "--steps", 1)
        assert result.exit_code == 2
        assert "choose a folder that can be written" in said
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out").symlink_to(tmp_path / "far")
    assert distil(tmp_path / "out", "--steps", 1)[0].exit_code == 0
    assert (tmp_path / "out").is_symlink()
    assert load_gates(tmp_path / "far" / "gates").config.block_size == 16


def test_what_a_killed_run_left_in_the_gates_is_no_file_of_anybodys(distil, tmp_path):
    (tmp_path / "out" / "gates" / ".writing-x").mkdir(parents=True)
    (tmp_path / "out" / ".writing-y").mkdir()
    result, said = distil(tmp_path / "out", "--steps", 1)
    assert result.exit_code == 0, said
    assert not list(tmp_path.rglob(".writing*"))


def test_a_run_without_a_model_says_so(invoke, text, tmp_path):
    result, said = invoke("distill", "--text", text, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "the setting model is missing" in said


def test_a_family_without_a_file_is_refused_by_name(invoke, text, save_tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    result, said = invoke("distill", tmp_path / "m", "--text", text, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "'gpt2'" in said
    assert "llama, mistral, olmo2, olmo3, phi3, qwen2, qwen3" in said


def test_the_help_lists_every_setting_with_its_default(invoke):
    result, said = invoke("distill", "--help")
    assert "New gates for decoding alone have defaults of their own" in said
    assert result.exit_code == 0
    for words in (
        "lr Peak learning rate, it follows a cosine to zero; default 1e-3, and 3e-3",
        "patience 0 Measurements",
        "gate.block_size 64 Tokens per block",
        "gate.shares true A pair's score",
    ):
        assert words in said


def test_a_phase_is_a_setting_of_the_gates_and_decides_what_is_saved_and_measured(distil, tmp_path):
    result, said = distil(tmp_path / "one", "--steps", 2, "--phase", "decode")
    assert result.exit_code == 0, said
    gates = load_gates(tmp_path / "one" / "gates")
    assert (gates.config.phase, gates.config.per_kv_head) == ("decode", True)
    assert (gates.policy, gates.decode_policy) == (None, "token_budget:2048,sink_blocks=1")
    assert tomllib.loads((tmp_path / "one" / "config.toml").read_text())["gate"]["phase"] == "decode"
    assert "decoding 0." in said
    assert "recall 0." not in said
    report = json.loads((tmp_path / "one" / "gates" / "results.json").read_text())
    assert set(report["decode_recall"]) == {"top_k:0.2"}
    assert "dense" not in report
    assert "of sparse prefill, and these gates choose while decoding" in report["skipped"]

    both = ("--set", "gate.phase=both", "--set", "decode_policy=threshold:0.01")
    result, said = distil(tmp_path / "two", "--steps", 2, *both)
    assert result.exit_code == 0, said
    gates = load_gates(tmp_path / "two" / "gates")
    assert gates.config.phase == "both"
    assert (gates.policy, gates.decode_policy) == (
        "top_k:0.1,sink_blocks=1,dense_last_rows=2", "threshold:0.01",
    )  # fmt: skip
    report = json.loads((tmp_path / "two" / "gates" / "results.json").read_text())
    assert set(report["recall"]) == set(report["decode_recall"])
    assert report["dense"]["perplexity"] > 1
    assert "recall in decoding" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--set", "gate.phase=never"), "phase must be one of 'prefill', 'decode', 'both', got 'never'"),
        (("--phase", "both", "--set", "decode_policy=top_k:0.1"), "top_k:0.1 is a share of a whole prompt"),
        (("--phase", "decode", "--set", "decode_policy=token_budget:8"), "less than a block of 16 tokens"),
    ],
)
def test_phases_and_policies_that_make_no_sense_are_refused_before_any_work(distil, tmp_path, more, words):
    result, said = distil(tmp_path / "out", "--steps", 2, *more)
    assert result.exit_code == 2
    assert words in said
    assert not (tmp_path / "out").exists()
