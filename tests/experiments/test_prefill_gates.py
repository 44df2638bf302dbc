"""The experiment on gates for prefill, at a size that shows it runs: stopped, it goes on."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from experiments import variants
from experiments.prefill_gates import run as experiment
from experiments.prefill_gates.table import table
from seerattention import baselines
from seerattention.files import read_json
from seerattention.hosts.transformers import load_gates
from seerattention.measure import bundled
from seerattention.measure.compare import attached
from seerattention.measure.perplexity import next_token_losses

MODULE = "experiments.prefill_gates.run"


@pytest.fixture
def arguments(tmp_path):
    """A model of one layer with random weights, books for it, and a run of two steps."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bundled.TEACHER, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    bundled.load_teacher()[1].save_pretrained(tmp_path / "model")
    text = bundled.TEXT.read_text(encoding="utf-8")
    for i, name in enumerate(("text", "heldout")):
        (tmp_path / name).mkdir()
        for j in range(2):
            part = text[40_000 * i + 20_000 * j :][:10_000]
            (tmp_path / name / f"{j}.txt").write_text(part, encoding="utf-8")
    return (
        *("--out", tmp_path / "out", "--model", tmp_path / "model", "--device", "cpu", "--steps", 2),
        *(
            "--length",
            512,
            "--eval-lengths",
            640,
            320,
            "--windows",
            2,
            "--densities",
            0.5,
            0.25,
            "--asked",
            0.25,
        ),
        *("--block", 16, "--questions", 2, "--seeds", 2),
        *("--text", tmp_path / "text", "--heldout", tmp_path / "heldout"),
    )


def test_a_run_that_was_stopped_goes_on(run_script, arguments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # Taught, and stopped before it is measured.
        patch.setattr("seerattention.measure.compare.measured", None)
        with pytest.raises(TypeError):
            run_script(MODULE, *arguments, "--one", "default")
    taught = (out / "gates" / "default" / variants.METRICS).read_text()
    assert len(taught.splitlines()) == 2
    names = ["dense", "xattention", "default", "default-seed2", "wide, not taught", "published"]
    for name in names[2:]:
        run_script(MODULE, *arguments, "--one", name)
    for name in names[:2]:
        run_script(MODULE, *arguments, "--one", name)
    assert (out / "gates" / "default" / variants.METRICS).read_text() == taught
    with pytest.raises(SystemExit, match="no process is called 'default-seed3'"):
        run_script(MODULE, *arguments, "--one", "default-seed3")
    # Everything has its result: nothing is done again.
    shown = run_script(MODULE, *arguments, "--only", *names[:3], names[4])
    found = read_json(out / "results.json")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == names
    assert table(found) in shown
    assert set(rows["dense"]["perplexity"]["640"]) == set(rows["dense"]["found"]["niah_single"]) == {"1"}
    for name in names[1:]:
        read = rows[name]["perplexity"]
        assert set(read) == {"640", "320"}
        for length in read:
            # Of as many blocks, whoever chose them.
            assert (
                read[length]["0.5"]["density"] == rows["xattention"]["perplexity"][length]["0.5"]["density"]
            )
            assert read[length]["0.25"]["density"] < read[length]["0.5"]["density"] < 0.6
        assert set(rows[name]["found"]) == set(experiment.TASKS)
        assert set(rows[name]["found"]["niah_multivalue"]) == {"0.25"}
    for name, way in (("xattention", "by share"), ("default", "calibrated"), ("published", "calibrated")):
        own = rows[name]["own"]
        assert own["way"] == way
        assert set(own["perplexity"]) == {"640", "320"}
        cell = own["perplexity"]["640"]["0.5"]
        assert cell["density"] == pytest.approx(0.5, rel=0.2)
        assert cell["losses"] != rows[name]["perplexity"]["640"]["0.5"]["losses"]
        assert set(own["found"]["niah_single"]) == {"0.25"}
        assert f"| {name}, {way} |" in shown or name == "published"
    assert "own" not in rows["dense"]
    assert "taught" not in rows["wide, not taught"]
    assert rows["default"]["taught"]["recall"] > 0
    first, second = (load_gates(out / "gates" / name / "gates") for name in ("default", "default-seed2"))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    gate = load_gates(out / "gates" / "published" / "gates").config
    assert (gate.dim, gate.q_pool, gate.q_proj, gate.k_sub) == (64, ("avg",), False, 16)


def test_losses_and_answers_are_those_of_a_sparse_prefill(arguments, tmp_path):
    args = experiment.parsed(list(map(str, arguments)))
    (tmp_path / "out").mkdir()
    for name in ("text", "heldout"):
        variants.tokens_of(args, name)
    model, tokenizer = bundled.named_model(str(tmp_path / "model"), dtype="float32", device="cpu")
    quest, policy = baselines.create("quest", block_size=[16, 16]), "top_k:0.25,sink_blocks=1"
    row = experiment.prepared(args, model, tokenizer)(quest)
    windows = variants.windows_of(args)
    some = variants.questions(args, tokenizer, experiment.TASKS, 640)["niah_multivalue"]
    with attached(model, quest, policy):
        # Of the shorter length a window holds two.
        pieces = [piece for window in windows for piece in np.split(window, 2)]
        expected = [float(next_token_losses(model, piece).mean()) for piece in pieces]
        likely = []
        for prompt, answer, counts in some:
            losses = next_token_losses(model, np.concatenate([prompt, answer]))[-len(answer) :]
            likely.append(-float(losses[torch.from_numpy(counts)].mean()))
    assert row["perplexity"]["320"]["0.25"]["losses"] == pytest.approx(expected, rel=1e-5)
    found = row["found"]["niah_multivalue"]["0.25"]
    assert found == {"share": 0.0, "likelihood": pytest.approx(sum(likely) / 2, rel=1e-5)}
    # What the model says itself is foreseen.
    prompt, answer, counts = some[0]
    with attached(model, quest, policy), torch.inference_mode():
        for i in range(len(answer)):
            ids = torch.from_numpy(np.concatenate([prompt, answer[:i], answer[i:]]))[None]
            answer[i] = model(ids).logits[0, len(prompt) + i - 1].argmax()
    said = variants.Question(prompt, answer, counts)
    assert experiment.foreseen(model, quest, policy, [said, some[1]])["share"] == 0.5


def test_numbers_are_asked_for_in_the_teachers_words(arguments, tmp_path):
    args = experiment.parsed([*map(str, arguments), "--documents", "1", "--questions", "0"])
    (tmp_path / "out").mkdir()
    for name in ("text", "heldout"):
        variants.tokens_of(args, name)
    model, tokenizer = bundled.named_model(str(tmp_path / "model"), dtype="float32", device="cpu")
    row = {"name": "dense", "variant": "dense", **experiment.prepared(args, model, tokenizer)(None)}
    assert row["found"] == {}
    assert all(0 <= row["perplexity"][length]["1"]["needles"] <= 1 for length in ("640", "320"))
    other = {**row, "name": "quest", "variant": "quest", "perplexity": {}}
    cell = {"density": 0.25, "losses": row["perplexity"]["640"]["1"]["losses"], "needles": 0.25}
    other["perplexity"] = {length: {"0.5": cell, "0.25": cell} for length in ("640", "320")}
    other["perplexity"]["320"] = {at: {**cell, "losses": [3.0] * 4} for at in ("0.5", "0.25")}
    row["perplexity"]["320"]["1"]["losses"] = [3.0] * 4
    settings = {"eval_lengths": [640, 320], "densities": [0.5, 0.25], "asked": [0.25]}
    made = table({"settings": settings, "rows": [row, other]}).splitlines()
    assert made[3] == made[8] == "| quest |  | +0.00% ± 0.00%, 25% | +0.00% ± 0.00%, 25% |"
    assert len(made) == 9


def result(name, losses, **more):
    """Return a row with two windows' losses at one length and density, and the answers of one task."""
    at = "1" if name == "dense" else "0.1"
    share = more.pop("share", 0.5)
    return {
        "name": name,
        "variant": name.partition("-seed")[0],
        "perplexity": {"4096": {at: {"density": 0.125, "losses": losses}}},
        "found": {"niah_single": {at: {"share": share, "likelihood": -1.25}}},
        **more,
    }


def test_the_table_says_what_results_say():
    rows = [
        result("dense", [2.0, 3.0], share=1.0),
        result("xattention", [2.0 + math.log(1.2), 3.0 + math.log(1.2)]),
        result("default", [2.0 + math.log(1.04), 3.0 + math.log(1.04)], cost=0.025),
        result("default-seed2", [2.0 + math.log(1.08), 3.0 + math.log(1.08)], cost=0.025, share=0.75),
    ]
    made = table(
        {"settings": {"eval_lengths": [4096], "densities": [0.1], "asked": [0.1]}, "rows": rows}
    ).splitlines()
    mean = math.sqrt(1.04 * 1.08) - 1
    assert made == [
        "| 4,096 tokens | cost at 32k | 10% |",
        "|---|---|---|",
        "| *blocks read, as measured* |  | 12.5% |",
        "| xattention |  | +20.00% ± 0.00%, 1.00 |",
        f"| default | 2.50% | {mean:+.2%} ± 0.00% (+4.00% to +8.00%), {mean / 0.2:.2f} |",
        "",
        "| found | niah_single, 10% |",
        "|---|---|",
        "| dense | 100%, -1.25 |",
        "| xattention | 50%, -1.25 |",
        "| default | 62% (50% to 75%), -1.25 |",
    ]
    # What a method reads in its own way is said, where it was measured.
    rows[1]["own"] = {"way": "by share", **result("", [2.0, 3.0]), "found": {"niah_single": {}}}
    rows[1]["own"]["perplexity"]["4096"]["0.1"]["density"] = 0.126
    made = table({"settings": {"eval_lengths": [4096], "densities": [0.1], "asked": [0.1]}, "rows": rows})
    assert "| xattention, by share |  | +0.00% ± 0.00%, 0.00, of 12.6% |" in made
    assert "| *blocks read, as measured* |  | 12.5% |" in made
    assert "| xattention, by share |  |" in made
    # Paired: what differs between windows, not the windows, makes the interval.
    rows[1:] = [result("quest", [2.1, 3.3])]
    cell = table(
        {"settings": {"eval_lengths": [4096], "densities": [0.1], "asked": [0.1]}, "rows": rows}
    ).splitlines()[3]
    half = (math.exp(0.2 + 12.7062 * 0.1) - math.exp(0.2 - 12.7062 * 0.1)) / 2
    assert cell == f"| quest |  | {math.expm1(0.2):+.2%} ± {half:.2%} |"
