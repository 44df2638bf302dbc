"""What experiments on gates share: a process for everything that has no result, questions, and results."""

import sys

import numpy as np
import pytest

from experiments import variants
from experiments.decode_gates import run as decode
from experiments.prefill_gates import run as prefill
from seerattention import baselines
from seerattention.evals import tasks
from seerattention.evals.tasks import Source
from seerattention.files import write_json
from seerattention.gate_config import GateConfig, design_of
from seerattention.measure import bundled
from seerattention.train import DistillConfig

BOTH = pytest.mark.parametrize("experiment", [decode, prefill], ids=["decode", "prefill"])


@BOTH
def test_every_name_can_be_asked_for(experiment, tmp_path):
    own = experiment.EXPERIMENT
    names = [*own.variants, *own.scorers]
    args = experiment.parsed(["--out", str(tmp_path), "--only", *names])
    assert own.names(args) == own.names(experiment.parsed(["--out", str(tmp_path)])) == names
    for name, variant in own.variants.items():
        shape = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
        config = GateConfig.from_dict(design_of({**shape, **variant.gate}))
        assert 0 < variants.cost(config) < 1, name
        assert variant.config(100).steps in (100, 250), name
    for name in own.scorers:
        assert name == "dense" or baselines.create(name, block_size=[16, 16])


@BOTH
def test_further_seeds_are_taught_and_kept_beside_the_first(experiment, tmp_path):
    own, given = experiment.EXPERIMENT, ["--out", str(tmp_path), "--seeds", "3", "--only"]
    untaught = next(name for name, variant in experiment.VARIANTS.items() if not variant.taught)
    args = experiment.parsed([*given, "default", untaught, "quest"])
    assert own.names(args) == ["default", "default-seed2", "default-seed3", untaught, "quest"]
    assert own.variant(args, "default") == (own.variants["default"], 1)
    assert own.variant(args, "default-seed3") == (own.variants["default"], 3)
    # Whatever was asked for, everything that is there is collected, in one order.
    for name in ("default-seed10", "default-seed2", "default", "quest", "of another run"):
        write_json(tmp_path / "results" / f"{name}.json", {"name": name})
    rows = variants.collected(args, own)["rows"]
    assert [row["name"] for row in rows] == ["quest", "default", "default-seed2", "default-seed10"]


@BOTH
def test_what_has_no_result_gets_a_process_and_what_fails_is_told(experiment, tmp_path, monkeypatch, capsys):
    started, running = [], []

    class Process:
        """One that ends when it is looked at for the second time; of quest, without a result."""

        def __init__(self, command, stdout, stderr):
            assert command[:3] == [sys.executable, "-m", experiment.EXPERIMENT.module]
            assert command[-2] == "--one"
            self.name, self.looks, self.returncode = command[-1], 0, None
            started.append(self.name)
            running.append(self)
            assert len(running) <= 2
            stdout.write(b"said before it failed\n")

        def poll(self):
            self.looks += 1
            if self.looks == 2:
                running.remove(self)
                self.returncode = int(self.name == "quest")
                if not self.returncode:
                    write_json(variants.result_of(args, self.name), {"name": self.name})
            return self.returncode

    monkeypatch.setattr(variants.subprocess, "Popen", Process)
    monkeypatch.setattr(variants.time, "sleep", lambda seconds: None)
    given = ["--out", str(tmp_path), "--processes", "2", "--only", "default", "dense", "quest", "meanpool"]
    args = experiment.parsed(given)
    (tmp_path / "results").mkdir()
    variants.teach(args, experiment.EXPERIMENT)
    assert started == ["default", "dense", "quest", "meanpool"]
    assert "quest failed:\nsaid before it failed" in capsys.readouterr().out
    # The same command goes on with what is missing.
    started.clear()
    variants.teach(args, experiment.EXPERIMENT)
    assert started == ["quest"]


def test_what_a_variant_does_not_name_is_what_distill_does():
    assert variants.Variant().config(7) == DistillConfig(steps=7)
    config = prefill.VARIANTS["former default"].config(7)
    assert config == DistillConfig(steps=7, objective="sharp_kl", target="max", lr=3e-3)
    assert prefill.VARIANTS["for 500 steps"].config(8) == DistillConfig(steps=20)
    assert prefill.PUBLISHED["shares"] is False


def test_of_several_numbers_the_first_digit_is_no_part_of_what_is_foreseen():
    _, tokenizer = bundled.load_teacher()
    source = Source(tokenizer, [bundled.text_tokens(tokenizer)[1]])
    sample = tasks.create("niah_multivalue", values=2).make(source, 1024, 0)
    # In the text's order, which is not the sample's.
    assert sample.places[0] > sample.places[1]
    prompt, answer, counts = variants.question(source, sample)
    assert np.array_equal(prompt, sample.prompt)
    numbers = [sample.expected[1], sample.expected[0]]
    assert tokenizer.decode(answer.tolist()) == f" {numbers[0]} and {numbers[1]}"
    assert tokenizer.decode(answer[counts].tolist()) == numbers[0][1:] + numbers[1]
    single = tasks.create("niah_single").make(source, 1024, 0)
    _, answer, counts = variants.question(source, single)
    assert tokenizer.decode(answer[counts].tolist()) == single.expected[0]


def test_books_that_are_shorter_than_a_window_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("The sea was calm.")
    args = prefill.parsed(["--out", str(tmp_path / "out"), "--heldout", str(tmp_path / "short.txt")])
    with pytest.raises(ValueError, match="no book of --heldout has 8192 tokens"):
        variants.tokens_of(args, "heldout")


def test_further_windows_of_long_books_follow_the_first_of_all(tmp_path):
    _, tokenizer = bundled.load_teacher()
    text = bundled.TEXT.read_text(encoding="utf-8")
    # Tokens for one window, for three, and for none.
    for i, part in enumerate((text[:3000], text[50_000:57_000], text[90_000:90_500])):
        (tmp_path / f"{i}.txt").write_text(part, encoding="utf-8")
    (tmp_path / "out").mkdir()
    sources = [str(tmp_path / f"{i}.txt") for i in range(3)]
    given = ["--out", str(tmp_path / "out"), "--eval-lengths", "512", "--heldout", *sources]
    variants.tokens_of(prefill.parsed([*given, "--windows", "3"]), "heldout")
    found = variants.windows_of(prefill.parsed(given))
    books = [tokenizer.encode(part, add_special_tokens=False) for part in (text[:3000], text[50_000:57_000])]
    assert 512 < len(books[0]) < 1024 < 1536 < len(books[1])
    expected = [books[0][:512], books[1][:512], books[1][512:1024]]
    assert [window.tolist() for window in found] == expected


def test_the_cost_of_choosing_counts_projections_where_there_are_any():
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "q_sub_block": 8, "k_sub_block": 4}
    config = GateConfig(**shape, gate_dim=32)
    tokens = 4096
    products = tokens / 8 * tokens / 4 * 32 / 2
    pools = 3 * 64 * 32 * (tokens / 8 + tokens / 4 / 3)
    assert variants.cost(config, tokens) == pytest.approx((products + pools) / (tokens * tokens * 64))
    config = GateConfig(**shape, gate_dim=32, per_kv_head=True)
    merged = products / 3 + pools
    assert variants.cost(config, tokens) == pytest.approx(merged / (tokens * tokens * 64))
    # Without one for queries keys are projected for every query head.
    config = GateConfig(**shape, q_pool=("avg",), q_proj=False)
    products, pools = 2 * products, 3 * 64 * 64 * tokens / 4
    assert variants.cost(config, tokens) == pytest.approx((products + pools) / (tokens * tokens * 64))
