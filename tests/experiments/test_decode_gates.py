"""The experiment on gates for decoding, at a size that shows it runs: what is finished is kept."""

import json

import numpy as np
import pytest

from experiments.decode_gates import run as experiment
from seerattention.gate_config import GateConfig
from seerattention.hosts.transformers import load_gates

MODULE = "experiments.decode_gates.run"


@pytest.fixture
def arguments(tmp_path):
    words = "the sea was calm and the ship lay still at anchor under a low grey sky. ".split()
    for name, count in (("text", 3), ("heldout", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            book = " ".join(np.random.default_rng(i).choice(words, 1500))
            (tmp_path / name / f"{i}.txt").write_text(book)
    return (
        *("--out", tmp_path / "out", "--device", "cpu", "--steps", 2, "--length", 1024, "--windows", 1),
        *("--budgets", 32, 128, "--block", 16, "--questions", 1),
    )


def test_gates_are_taught_and_measured_beside_others(run_script, arguments, tmp_path):
    text = ("--text", tmp_path / "text", "--heldout", tmp_path / "heldout")
    names = ["dense", "oracle_mass", "default", "not taught", "published", "both"]
    run_script(MODULE, *arguments, *text, "--one", names[0])
    for name in names[1:]:
        run_script(MODULE, *arguments, "--one", name)
    # Everything has its result: nothing is done again.
    said = run_script(MODULE, *arguments, "--only", *names)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == names
    assert list(rows["dense"]["losses"]) == ["0"]
    for row in rows.values():
        assert set(row["found"]) == set(experiment.TASKS)
        assert all(len(losses) == 1 for losses in row["losses"].values())
    del rows["dense"]
    for row in rows.values():
        assert set(row["losses"]) == {"512", "2048"}
        assert 0 < row["recall"]["32"] < row["recall"]["128"] <= 1
        assert row["recall"]["128"] <= rows["oracle_mass"]["recall"]["128"]
        assert row["name"] in said
    assert set(rows["both"]["perplexity"]) == {"0.2", "0.1"}
    assert "taught" not in rows["not taught"]
    assert rows["default"]["gate"]["k_sub_block"] == 1
    assert rows["published"]["taught"]["decode_recall"] > 0
    gates = load_gates(tmp_path / "out" / "gates" / "published" / "gates")
    assert (gates.config.phase, gates.config.dim, gates.config.k_sub) == ("decode", 64, 16)


def test_a_folder_of_other_settings_and_text_that_is_missing_are_refused(run_script, arguments, tmp_path):
    with pytest.raises(SystemExit, match="has no tokens yet; give --text and --heldout"):
        run_script(MODULE, *arguments)
    with pytest.raises(SystemExit, match="holds a run of other settings"):
        run_script(MODULE, *arguments, "--seed", 5)


def test_what_is_read_per_step_is_a_share_of_the_cached_keys():
    config = GateConfig(8, 2, 128, **experiment.VARIANTS["k8, 32"].gate)
    assert experiment.read_share(config) == pytest.approx(32 / (128 * 8))
