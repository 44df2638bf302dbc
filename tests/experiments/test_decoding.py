"""The comparison of ways to decode, on a CPU, at a size that shows it runs; stopped, it continues."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

from experiments.decoding import run as experiment
from experiments.decoding import table
from seerattention import attach, baselines, detach
from seerattention.hosts.transformers import new_gates, save_gates
from seerattention.measure import bundled
from seerattention.measure.decoding import continued
from seerattention.measure.perplexity import next_token_losses

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

PROBLEMS = [
    {
        "question": f"How much is {n} and {n}?",
        "answer": f"It is {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}",
    }
    for n in range(1, 40)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the teacher, which gets a chat template, gates of both phases, and problems."""
    folder = tmp_path_factory.mktemp("decoding")
    model, tokenizer = bundled.load_teacher()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for out, one in (("gates", bundled.named_model(str(folder / "model"))[0]), ("teacher-gates", model)):
        save_gates(new_gates(one, phase="both"), folder / out, policy="top_k:0.3")
    (folder / "problems.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PROBLEMS))
    return folder


def run(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, given), "--device", "cpu"])
    experiment.main()


def test_a_stopped_comparison_continues(monkeypatch, tmp_path, folder, capsys) -> None:
    out = tmp_path / "found.json"
    command = [
        "perplexity", "--gates", folder / "teacher-gates", "--length", 512, "--samples", 2,
        "--budgets", 192, 256, "--out", out, "--methods",
    ]  # fmt: skip
    run(monkeypatch, *command, "quest", "--seconds", 0)
    assert "time is up; the same command goes on" in capsys.readouterr().out
    assert not out.exists()
    run(monkeypatch, *command, "quest")
    before = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["budget"]) for row in before] == [
        ("dense", None),
        ("quest", 192),
        ("quest", 256),
    ]
    run(monkeypatch, *command, "gates", "quest", "snapkv", "h2o")
    report = json.loads(out.read_text())
    assert report["rows"][:3] == before
    assert [(row["method"], row["budget"]) for row in report["rows"][3:]] == [
        (method, budget) for budget in (192, 256) for method in ("gates", "snapkv", "h2o")
    ]
    # All read the same, and of the dense row nothing was chosen.
    assert len({row["tokens_read"] for row in report["rows"] if row["budget"] == 192}) == 1
    assert report["rows"][0]["tokens_read"] == 0
    with pytest.raises(SystemExit, match="holds another measurement"):
        run(monkeypatch, *command, "quest", "--step", 31)

    picture = tmp_path / "quality.png"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["table.py", str(out), "--figure", str(picture)])
    table.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| SeerAttention", "| Quest", "| SnapKV (evicts)", "| H2O (evicts)"
    ]  # fmt: skip
    assert picture.stat().st_size > 10_000


def test_first_and_latest_blocks_are_those_of_the_scorer_that_ranks_by_recency(monkeypatch, folder) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "perplexity"])
    args = experiment.parsed()
    model, tokenizer = bundled.load_teacher()
    tokens, found = bundled.text_tokens(tokenizer)[1][None, :512], []
    with experiment.decoding(model, "streaming", 256, args) as reading:
        found.append(continued(model, tokens, 448).losses)
    assert reading.tokens == pytest.approx(224, abs=1)
    attach(model, baselines.create("streaming"), decode="token_budget:256", prefill="dense", min_tokens=0)
    try:
        found.append(continued(model, tokens, 448).losses)
    finally:
        detach(model)
    torch.testing.assert_close(*found)


def test_answers_behind_dense_and_sparse_prompts(monkeypatch, tmp_path, folder, capsys) -> None:
    out, gates = tmp_path / "found.json", ("--gates", folder / "teacher-gates")
    command = ["needles", *gates, "--length", 768, "--samples", 2, "--budgets", 256, "--out", out]
    run(monkeypatch, *command, "--methods", "gates", "oracle_mass", "snapkv")
    run(monkeypatch, *command, "--methods", "gates", "snapkv", "--prompt", "top_k:0.5")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["prompt"], row["method"]) for row in rows] == [
        ("dense", "dense"), ("dense", "gates"), ("dense", "oracle_mass"), ("dense", "snapkv"),
        ("top_k:0.5", "dense"), ("top_k:0.5", "gates"),
    ]  # fmt: skip
    # The teacher finds them, and so does who knows where attention goes; what was evicted unasked is gone.
    assert rows[0]["share"] > 0.8
    assert rows[2]["share"] > 0.8
    assert rows[3]["share"] < 0.5
    assert "Prompts by `top_k:0.5`" in table.table(json.loads(out.read_text()))


def test_what_dense_attention_cannot_do_is_asked_of_no_other(monkeypatch, tmp_path, folder) -> None:
    out = tmp_path / "found.json"
    command = [
        "tasks", "--model", folder / "model", "--gates", folder / "gates", "--length", 512, "--samples", 2,
        "--budgets", 256, "--answer", 4, "--tasks", "niah_single", "--methods", "quest", "--out", out,
    ]  # fmt: skip
    run(monkeypatch, *command)
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["dense"]
    assert "dense attention finds 0.0%, so nothing else was asked" in table.table(report)
    monkeypatch.setattr(experiment, "SKIP_BELOW", 0.0)
    run(monkeypatch, *command)
    report = json.loads(out.read_text())
    assert [row["method"] for row in report["rows"]] == ["dense", "quest"]
    assert "| Quest | 0.0%" in table.table(report)


def test_problems_behind_solved_ones(monkeypatch, tmp_path, folder) -> None:
    out = tmp_path / "found.json"
    run(
        monkeypatch, "problems", "--model", folder / "model", "--gates", folder / "gates",
        "--problems", folder / "problems.jsonl", "--length", 320, "--samples", 3, "--budgets", 192, 1024,
        "--answer", 6, "--methods", "gates", "--out", out,
    )  # fmt: skip
    report = json.loads(out.read_text())
    dense, gates, everything = report["rows"]
    part = experiment.Problems(experiment.parsed())
    for loss, (prompt, solution) in zip(dense["losses"], part.samples, strict=True):
        assert len(prompt) == 320
        whole = next_token_losses(part.model, np.concatenate([prompt, solution]))
        assert loss == pytest.approx(float(whole[319:].mean()), abs=1e-4)
        assert part.tokenizer.decode(prompt[-12:].tolist()).endswith("?</><assistant>")
    assert dense["agreement"] == everything["agreement"] == [1.0, 1.0, 1.0]
    assert everything["losses"] == pytest.approx(dense["losses"], abs=1e-4)
    assert everything["lengths"] == dense["lengths"]
    assert 0 < sum(gates["agreement"]) < 3
    assert gates["losses"] != pytest.approx(dense["losses"], abs=1e-2)
    assert "| SeerAttention | 192 |" in table.table(report)


def test_what_cannot_choose_in_decoding_is_refused_before_any_work(monkeypatch, tmp_path, folder) -> None:
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit, match=r"error: .*token_budget:32.* is less than a block"):
        run(monkeypatch, "needles", "--gates", folder / "teacher-gates", "--budgets", 256, 32, "--out", out)
    # What decodes alone is taken for that, and for nothing else.
    save_gates(new_gates(bundled.load_teacher()[0], phase="decode"), tmp_path / "decode")
    assert experiment.scorer_of("gates", Namespace(gates=tmp_path / "decode")).config.phase == "decode"
    with pytest.raises(SystemExit, match=r"error: .*taught for decoding alone"):
        run(monkeypatch, "needles", "--gates", tmp_path / "decode", "--prompt", "top_k:0.2", "--out", out)
    assert not out.exists()


def test_problems_are_asked_for_with_their_file(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "problems")
    assert "problems needs --problems" in capsys.readouterr().err
