"""``seerattention calibrate`` as a person types it."""

import importlib.util
import json
import re
import shutil
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from seerattention import cli
from seerattention.calibration import search
from seerattention.hosts.transformers import attach, detach, load_gates
from seerattention.hosts.transformers.checkpoint import CALIBRATION, CONFIG
from seerattention.measure import bundled


@pytest.fixture
def gates(tmp_path):
    """A copy of the bundled gates as distill writes them."""
    folder = tmp_path / "gates"
    shutil.copytree(bundled.GATES, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(bundled.TEXT.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    return path


def invoke(gates, text, *arguments):
    return CliRunner().invoke(cli.app(), ["calibrate", str(gates), "--text", str(text), *map(str, arguments)])


SMALL = ("--length", 1024, "--windows", 2)


def test_gates_are_calibrated_where_they_are_and_used_so_by_default(gates, text, tmp_path):
    picture = tmp_path / "trade-off.png"
    plot = ("--plot", picture) if importlib.util.find_spec("matplotlib") else ()
    result = invoke(gates, text, "--density", 0.4, *SMALL, *plot)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    said = re.search(r"calibrated,sink_blocks=1 reads ([\d.]+)% of the blocks at 1,024 tokens, keeps", words)
    assert said, words
    assert float(said[1]) == pytest.approx(40, rel=0.15)
    loaded = load_gates(gates)
    assert loaded.policy == "calibrated,sink_blocks=1"
    assert loaded.calibration.value == loaded.calibration.density == 0.4
    assert loaded.calibration.tokens == 1024
    assert (gates / "README.md").exists()
    assert not list(gates.glob(".writing*"))
    if plot:
        assert picture.read_bytes().startswith(b"\x89PNG")
    model, _ = bundled.load_teacher()
    detach(attach(model, loaded))


@pytest.mark.parametrize(("options", "count"), [((), 3), (("--retrieval", 0, "--repeats", 0), 0)])
def test_most_of_the_windows_fitted_to_ask_or_repeat(gates, text, options, count, monkeypatch):
    """Of four, two ask for what stands in them, and in one passages return."""
    seen, tokenizer = [], bundled.load_teacher()[1]
    monkeypatch.setattr(search, "calibrate", lambda *_, mix, **more: seen.append(mix) or sys.exit(3))
    assert invoke(gates, text, "--density", 0.4, *SMALL, *options).exit_code == 3
    windows = list(bundled.text_tokens(tokenizer)[1][:4096].reshape(4, 1024))
    changed = [not np.array_equal(*pair) for pair in zip(seen[0](windows), windows, strict=True)]
    assert changed == [True] * count + [False] * (4 - count)


def test_gates_for_decoding_are_refused_before_anything_is_read(gates, tmp_path):
    config = json.loads((gates / CONFIG).read_text())
    config["gate"]["phase"] = "decode"
    (gates / CONFIG).write_text(json.dumps(config))
    result = invoke(gates, tmp_path / "no-text", "--density", 0.4)
    assert result.exit_code == 2
    assert "taught for decoding alone" in " ".join(result.output.split())
    # So do the commands that show and evaluate gates.
    with pytest.raises(ValueError, match="give gates taught for prefill or for both"):
        bundled.named_gates(str(gates))


def test_a_copy_leaves_the_gates_alone(gates, text, tmp_path):
    before = (gates / CONFIG).read_text()
    result = invoke(gates, text, "--recall", 0.9, *SMALL, "--out", tmp_path / "copy")
    assert result.exit_code == 0, result.output
    assert (gates / CONFIG).read_text() == before
    assert not (gates / CALIBRATION).exists()
    assert load_gates(tmp_path / "copy").calibration.target == "recall"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give exactly one of density, recall and ppl_increase, got none"),
        (("--density", 0.1, "--recall", 0.9), "give exactly one of .*, got density, recall"),
        (("--density", 0.4, "--retrieval", 1), "shares of the sequences, .* at most 1; got 1.0 and 0.1"),
        (("--density", 1.5), "density must be between 0 and 1, got 1.5"),
        (("--max-ppl-increase", "much"), "--max-ppl-increase must be like 1% or 0.01, got 'much'"),
        (("--max-ppl-increase", "0%"), "ppl_increase must be between 0 and 1, got 0.0"),
        (("--density", 0.4), "the text has 5,[0-9]+ tokens, 4 windows of 8,192 need 32,768"),
        (("--density", 0.1, *SMALL), "density 10.0% is out of reach at 1,024 tokens: .* are 22.8% of all"),
        (("--density", 0.4, "--device", "tpu9", "--model", bundled.TEACHER), "'tpu9' is not a device"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(gates, text, options, message):
    before = {path.name: path.read_bytes() for path in gates.iterdir()}
    result = invoke(gates, text, *options)
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.output.split())), result.output
    assert {path.name: path.read_bytes() for path in gates.iterdir()} == before


def test_gates_of_another_model_are_refused(gates, text):
    config = json.loads((gates / CONFIG).read_text())
    config["base_model"]["fingerprint"] = "0" * 16
    (gates / CONFIG).write_text(json.dumps(config))
    result = invoke(gates, text, "--density", 0.4, *SMALL)
    assert result.exit_code == 2
    assert "these gates were made for seerattention/teacher, not for" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--text", "no.txt"), "there is no file no.txt"),
        (("--plot", "trade-off"), "a picture's name must end in .png, .svg, .pdf, got trade-off"),
        (("--out", "/dev/null"), "holds other files than gates"),
    ],
)
def test_what_can_be_seen_is_refused_before_the_model_is_loaded(gates, text, more, words):
    result = invoke(gates, text, "--density", 0.4, "--model", "nowhere", *more)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_copy_over_something_else_is_refused_before_the_model_is_loaded(gates, text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    result = invoke(gates, text, "--density", 0.4, "--model", "nowhere", "--out", tmp_path / "full")
    assert result.exit_code == 2
    assert "holds other files than gates (thesis.txt)" in " ".join(result.output.split())


@pytest.mark.parametrize(("text_form", "value"), [("1%", 0.01), ("0.02", 0.02), ("", None)])
def test_shares_are_read_with_and_without_percent(text_form, value):
    from seerattention.cli.calibrate import _share

    assert _share(text_form) == value
