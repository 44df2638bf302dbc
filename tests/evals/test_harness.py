"""An evaluation: killed and resumed, corrupt lines, faults by name, and the numbers of its summary."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seerattention.evals import tasks
from seerattention.evals.config import read_config
from seerattention.evals.harness import Evaluation, load_model, prompt_faults
from seerattention.evals.records import Record, RecordFile
from seerattention.evals.summary import cells, markdown, summary_rows, write_summary
from seerattention.evals.tasks import Sample, Source
from seerattention.hosts.transformers import new_gates, save_gates
from seerattention.measure import bundled
from seerattention.measure.intervals import mean_interval, newcombe, wilson
from seerattention.measure.observe import Watch

CONFIG = """
lengths = [1024]
densities = [0.5, 0.2]
samples = 3
[model]
name = "{model}"
device = "cpu"
[methods.mine]
gates = "{gates}"
[methods.meanpool]
[methods.narrow]
baseline = "streaming"
policy = "token_budget:128"
block_size = [32, 32]
[tasks.needle]
[tasks.vt]
task = "variable_tracking"
samples = 2
[tasks.perplexity]
parts = 4
"""

#: Rows: dense, two of each of two methods, one without a density; for three tasks.
ROWS, SAMPLES = 6, 6 * (3 + 2 + 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model with the bundled teacher's tokenizer, and gates for it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(bundled.TEACHER).save_pretrained(folder / "model")
    gates = new_gates(LlamaForCausalLM.from_pretrained(folder / "model"))
    save_gates(gates, folder / "gates", policy="top_k:0.3")
    return folder


def write_config(base: Path, folder: Path) -> Path:
    text = CONFIG.format(model=base / "model", gates=base / "gates")
    (folder / "config.toml").write_text(f'out = "{folder / "out"}"\n{text}')
    return folder / "config.toml"


@pytest.fixture
def config(base, tmp_path) -> Path:
    return write_config(base, tmp_path)


@pytest.fixture(scope="module")
def complete(base, tmp_path_factory) -> tuple[Evaluation, RecordFile]:
    """An evaluation that ran to its end, not to be written to."""
    evaluation = evaluate(write_config(base, tmp_path_factory.mktemp("complete")))
    return evaluation, finish(evaluation)


def evaluate(path: Path, **changes) -> Evaluation:
    settings = replace(read_config(path), **changes)
    return Evaluation(settings, *load_model(settings))


def finish(evaluation: Evaluation) -> RecordFile:
    with RecordFile(evaluation.config.out) as file:
        evaluation.run(file, lambda cell, record: None)
    return file


def same(record: Record) -> Record:
    return replace(record, prefill_s=0.0, seconds=0.0)


#: The command, killed as soon as five samples are written.
KILLED = """
import os, signal
from seerattention import cli
from seerattention.evals.records import RecordFile

append = RecordFile.append

def append_and_die(self, record):
    append(self, record)
    if len(self.records) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

RecordFile.append = append_and_die
cli.main()
"""


def test_a_killed_run_resumes_without_repeating_or_losing_samples(config, complete, tmp_path) -> None:
    out = tmp_path / "out"
    lines = out / "samples.jsonl"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "eval", str(config)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = lines.read_bytes()
    written = before.count(b"\n")
    assert written == 5
    # What a kill in the middle of a write leaves, and a line that a disk garbled.
    kept = before.splitlines(keepends=True)
    lines.write_bytes(b"".join([*kept[:2], b'{"of": 3}\n', *kept[3:]]) + kept[0][:80])
    evaluation = evaluate(config)
    with RecordFile(out) as file:
        assert len(file.corrupt) == 2
        assert ", line 3: not the fields of a sample" in file.corrupt[0]
        assert f", line {written + 1}: " in file.corrupt[1]
        assert evaluation.missing(file) == SAMPLES - written + 1
        made: list[Record] = []
        evaluation.run(file, lambda cell, record: made.append(record) if record else None)
    assert len(made) == SAMPLES - written + 1
    after = lines.read_bytes()
    # Everything that was whole is there, untouched and first; every sample is there once.
    assert after.startswith(b"".join([*kept[:2], *kept[3:]]))
    records = [Record(**json.loads(line)) for line in after.splitlines()]
    assert len({record.key for record in records}) == len(records) == SAMPLES
    # Two processes made what one would have made: samples follow from their seeds alone.
    for record in records:
        other = json.loads(json.dumps(same(complete[1].records[record.key]).__dict__))
        assert json.loads(json.dumps(same(record).__dict__)) == other
    # And once more there is nothing to do.
    assert finish(evaluation).path.read_bytes() == after


def test_records_have_what_a_reader_needs(complete) -> None:
    evaluation, file = complete
    rows = summary_rows(evaluation.cells, file.records)
    assert [(row["task"], row["method"], row["asked"]) for row in rows] == [
        (task, method, asked)
        for task in ("needle", "vt", "perplexity")
        for method, asked in (
            ("dense", None), ("mine", 0.5), ("mine", 0.2), ("meanpool", 0.5), ("meanpool", 0.2),
            ("narrow", None),
        )
    ]  # fmt: skip
    assert [row["samples"] for row in rows] == [3] * 6 + [2] * 6 + [3] * 6
    for record in file.records.values():
        assert record.faults == []
        assert (record.density == 1) == (record.method == "dense")
        assert record.tokens == 1024 - (30 if record.task == "vt" else 0)
        assert 0 < record.prefill_s <= record.seconds
        assert len(record.depths) == len(record.expected) == {"needle": 8, "vt": 5}.get(record.task, 0)
        assert len(record.by_position) == (4 if record.task == "perplexity" else 0)
        sample, _ = evaluation.sample(record.task, record.length, record.seed)
        assert list(sample.expected) == record.expected
    # Asking for less reads less, as measured; every method got the same samples.
    by = {(row["task"], row["method"], row["asked"]): row for row in rows}
    for task in ("needle", "vt", "perplexity"):
        assert by[task, "mine", 0.5]["density"] > by[task, "mine", 0.2]["density"] > 0.2
        assert by[task, "narrow", None]["density"] < 0.5
    # The random model says the same nonsense to the question of one seed only where it reads alike.
    assert {r.answer for r in file.records.values() if r.task == "vt"} != {""}


def test_the_density_is_the_one_a_slow_count_gives(complete) -> None:
    _, file = complete
    found = [r.density for r in file.records.values() if r.method == "narrow" and r.task == "perplexity"]
    # 32 rows; 128 tokens are 4 blocks of 32, the own block among them or on top: the scorer prefers the first
    # and the latest blocks, so it is among them.
    read = sum(min(row + 1, 4) for row in range(32)) / (32 * 33 / 2)
    assert found == [pytest.approx(read)] * 3


def test_results_of_other_settings_are_left_alone(config, complete) -> None:
    size = len(complete[1].records)
    out = read_config(config).out
    shutil.copytree(complete[0].config.out, out)
    more = evaluate(config, densities=[0.5, 0.3])
    with RecordFile(out) as file:
        # Two methods at a new density; everything else is there.
        assert more.missing(file) == 2 * (3 + 2 + 3)
    text = config.read_text().replace("parts = 4", "parts = 5")
    config.write_text(text)
    (config.parent / "other.txt").write_text(bundled.TEXT.read_text(encoding="utf-8")[1000:120_000])
    assert evaluate(config, text=[str(config.parent / "other.txt")]).missing(file) == SAMPLES
    other = evaluate(config)
    with RecordFile(out) as file:
        assert other.missing(file) == 6 * 3
        assert len(file.records) == size
    assert summary_rows(other.cells[:6], file.records)[0]["task"] == "needle"
    assert [r["task"] for r in summary_rows(other.cells, file.records)].count("perplexity") == 0


def test_what_dense_cannot_do_is_asked_of_nobody_else(config) -> None:
    text = config.read_text()
    # The random model finds no variable.
    config.write_text(text.replace("samples = 2", "samples = 2\nskip_below = 0.05"))
    evaluation = evaluate(config)
    with RecordFile(evaluation.config.out) as file:
        assert evaluation.missing(file) == SAMPLES
        evaluation.run(file, lambda cell, record: None)
        assert evaluation.missing(file) == 0
    assert len(file.records) == SAMPLES - 5 * 2
    rows = [row for row in write_summary(evaluation, file.records) if row["task"] == "vt"]
    assert [row["method"] for row in rows] == ["dense"]
    assert "Dense attention is below 5%" in (evaluation.config.out / "summary.md").read_text()
    config.write_text(text.replace("samples = 2", "samples = 2\nskip_below = 2"))
    with pytest.raises(ValueError, match=r"tasks.vt.skip_below must be a share from 0 to 1, got 2"):
        read_config(config)


def test_of_two_records_of_one_sample_the_first_counts(complete, tmp_path) -> None:
    first = complete[1].path.read_text().splitlines()[0]
    later = json.dumps({**json.loads(first), "score": 0.123})
    (tmp_path / "samples.jsonl").write_text(f"{first}\n{later}\n")
    with RecordFile(tmp_path) as file:
        assert [record.score for record in file.records.values()] == [json.loads(first)["score"]]
        assert file.corrupt == []


def with_bos(template: str | None = None) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"


@pytest.mark.parametrize(
    ("template", "faults"),
    [
        (None, []),
        ("{{ bos_token }}" + TURNS, []),
        ("{{ bos_token }}{{ bos_token }}" + TURNS, ["double BOS"]),
        ("{{ bos_token }}system{{ bos_token }}" + TURNS, []),
        ("{{ bos_token }}{{ bos_token }}system{{ bos_token }}" + TURNS, ["double BOS"]),
        (TURNS, ["no BOS"]),
    ],
)
def test_bos_must_be_there_once(template, faults) -> None:
    tokenizer = with_bos(template)
    text = np.array(tokenizer.encode("A day. A night. " * 500, add_special_tokens=False))
    source = Source(tokenizer, [text], chat=template is not None)
    task = tasks.create("niah_single")
    sample = task.make(source, 2000, 0)
    assert prompt_faults(source, task, sample, 2000) == faults
    more = replace(sample, prompt=np.concatenate([sample.prompt[:60], [0], sample.prompt[61:]]))
    assert prompt_faults(source, task, more, 2000) == (["no BOS"] if template == TURNS else ["double BOS"])
    prompt = tokenizer.decode(sample.prompt.tolist())
    if template:
        # The question is the user's; the answer is begun for the model.
        assert "mentioned in the provided text?]> The special magic number for" in prompt
        assert "[A special magic number is hidden" in prompt
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        Source(with_bos(), [text], chat=True)


def test_truncated_and_overlong_prompts_are_named() -> None:
    tokenizer = with_bos()
    text = np.array(tokenizer.encode("A day. A night. " * 500, add_special_tokens=False))

    class Cutting:
        """A tokenizer that keeps the first 60 tokens, as one set to truncate does."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, **options):
            return tokenizer.encode(text, **options)[:60]

    task = tasks.create("niah_single")
    cut = Source(Cutting(), [text])  # type: ignore[arg-type]
    assert prompt_faults(cut, task, task.make(cut, 2000, 0), 2000) == ["truncated prompt"]
    source = Source(tokenizer, [text])
    sample = task.make(source, 2000, 0)
    shorter = replace(sample, prompt=sample.prompt[:-500])
    lost = replace(sample, prompt=np.delete(sample.prompt, np.s_[sample.places[0] : sample.places[0] + 80]))
    assert prompt_faults(source, task, shorter, 2000) == ["truncated prompt"]
    assert prompt_faults(source, task, lost, 2000) == ["truncated prompt"]
    assert prompt_faults(source, task, sample, 1999) == ["prompt too long"]
    assert prompt_faults(source, task, Sample(text[:0:-1][:1999]), 2000) == ["no BOS"]


def test_faults_of_answers_are_named_and_counted(config, monkeypatch) -> None:
    evaluation = evaluate(config)
    evaluation.model.generation_config.eos_token_id = list(range(8192))
    evaluation.model.lm_head.weight.data.fill_(float("nan"))

    @contextmanager
    def nothing(*arguments):
        yield Watch()

    monkeypatch.setattr(evaluation, "_attached", nothing)
    file = finish(evaluation)
    found = {(r.task, r.method == "dense"): r for r in file.records.values()}
    assert found["vt", True].faults == ["empty answer"]
    assert found["vt", False].faults == ["empty answer", "ran dense"]
    assert found["perplexity", True].faults == ["not finite"]
    assert found["perplexity", True].score is None
    rows = write_summary(evaluation, file.records)
    by = {(row["task"], row["method"]): row for row in rows}
    assert by["vt", "narrow"]["faults"] == {"empty answer": 2, "ran dense": 2}
    assert by["perplexity", "dense"]["score"] is None
    text = (evaluation.config.out / "summary.md").read_text()
    assert "not finite: 3" in text
    assert "empty answer: 2, ran dense: 2" in text
    json.loads((evaluation.config.out / "summary.json").read_text())


def test_what_cannot_work_is_refused_before_any_work(config, base) -> None:
    def refused(message, **changes):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate(config, **changes)

    settings = read_config(config)
    long = [replace(plan, lengths=[1024, 4096]) for plan in settings.plans]
    refused("length past the model's limit: 4096 tokens, the model takes 2048", plans=long)
    evaluate(config, plans=[replace(long[0], samples=1)], max_length=4096, methods=settings.methods[:1])
    many = [replace(settings.plans[2], samples=500)]
    refused("the text has 50 windows of 1024 tokens, window 51 was asked for", plans=many)
    refused("dtype must be one of auto, .*'int8'", dtype="int8")
    refused("'abacus' is not a device", device="abacus")
    refused("there is no file nowhere.txt", text=["nowhere.txt"])
    refused("these gates were made for", methods=[replace(settings.methods[1], of="bundled")])


# The summary.


def record(cell, seed, score, **changes) -> Record:
    fields = {
        "of": cell.of, "method": cell.method.label, "policy": cell.policy, "task": cell.plan.label,
        "metric": "loss" if cell.plan.label == "perplexity" else "share", "length": cell.length, "tokens": 9,
        "density_asked": cell.asked, "density": 0.25, "seed": seed, "expected": [], "depths": [],
        "answer": "", "score": score, "prefill_s": 1.0 + seed, "seconds": 10.0 + seed, "faults": [],
        "by_position": [],
    }  # fmt: skip
    return Record(**{**fields, **changes})


def test_the_summary_is_computed_from_the_records(complete) -> None:
    evaluation, _ = complete
    by = {(c.plan.label, c.method.label, c.asked): c for c in evaluation.cells}
    dense, sparse = by["perplexity", "dense", None], by["perplexity", "mine", 0.2]
    needles, others = by["needle", "dense", None], by["needle", "meanpool", 0.5]
    made = [
        *(record(dense, s, x, by_position=[(1, 3, x), (3, 5, 2 * x)]) for s, x in enumerate((2.0, 3.0, 4.0))),
        *(record(sparse, s, x, density=d) for s, x, d in ((0, 2.1, 0.2), (1, 3.3, 0.3), (2, 4.2, 0.4))),
        *(record(needles, s, x) for s, x in enumerate((1.0, 1.0, 0.5))),
        *(record(others, s, x) for s, x in ((0, 0.0), (2, 0.5))),
    ]
    rows = summary_rows(evaluation.cells, {r.key: r for r in made})
    assert [(r["task"], r["method"]) for r in rows] == [
        ("needle", "dense"), ("needle", "meanpool"), ("perplexity", "dense"), ("perplexity", "mine"),
    ]  # fmt: skip
    share, fewer, loss, worse = rows
    assert share["score"] == pytest.approx(2.5 / 3)
    assert share["interval"] == wilson(2.5 / 3, 3)
    assert share["minus_dense"] is None
    assert (fewer["samples"], fewer["planned"]) == (2, 3)
    # Over the two samples that both have.
    assert fewer["minus_dense"] == pytest.approx(-0.5)
    assert fewer["minus_dense_interval"] == newcombe(0.25, 2, 0.75, 2)
    assert loss["score"] == pytest.approx(math.exp(3))
    assert loss["interval"] == tuple(math.exp(x) for x in mean_interval([2.0, 3.0, 4.0]))
    assert loss["by_position"] == [(1, 3, pytest.approx(math.exp(3))), (3, 5, pytest.approx(math.exp(6)))]
    assert worse["minus_dense"] == pytest.approx(0.2)
    assert worse["minus_dense_interval"] == pytest.approx(mean_interval([0.1, 0.3, 0.2]))
    assert worse["density"] == pytest.approx(0.3)
    assert (worse["prefill_s"], worse["seconds"]) == (2.0, 11.0)
    assert cells(fewer)[:5] == ["meanpool", "50%", "25.0%", "2 of 3", "25.0%"]
    about = {"model": "m", "date": "d", "dtype": "x", "text": "t"}
    about["versions"] = dict.fromkeys(("device", "threads", "torch", "transformers"), "v")  # type: ignore[assignment]
    text = markdown(rows, about)
    first = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| dense")]
    assert first == ["dense"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("[methods.meanpool]", "[methods.meenpool]"),
            "unknown method 'meenpool'; there are dense, flexprefill, .*xatt",
        ),
        (
            ("[tasks.needle]", "[tasks.needel]"),
            "unknown task 'needel'; there are common_words, .*variable_tracking",
        ),
        (("densities = [0.5, 0.2]", "densities = [1.5]"), r"densities must be in \(0, 1\], got 1.5"),
        (("densities = [0.5, 0.2]", ""), r"asks for \{density\} in its policy; give densities"),
        (("lengths = [1024]", "lengths = [0]"), "lengths must be a whole number >= 1, got 0"),
        (("lengths = [1024]", ""), "give lengths"),
        (("samples = 3", "samples = true"), "samples must be of type int, got True"),
        (
            ("samples = 3", "sample = 3"),
            r"unknown 'sample' \(did you mean samples\?\); it may have out, text",
        ),
        (("token_budget:128", "token_bugdet:128"), "unknown policy 'token_bugdet:128'; write one of"),
        (("block_size = [32, 32]", "blocksize = 3"), "has an option that streaming has not"),
        (('policy = "token_budget:128"', 'policy = "saved"'), 'only gates have a policy "saved"'),
        (("parts = 4", "part = 4"), "task 'perplexity' has no option 'part'; its options are parts"),
        (('device = "cpu"', "device = 0"), "model.device must be of type str, got 0"),
        (("[methods.meanpool]", "[methods.dense]\npolicy = 3"), "it has no settings"),
        (("samples = 3", "samples = ["), "is no TOML"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(config, change, message) -> None:
    text = config.read_text()
    assert change[0] in text
    config.write_text(text.replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        read_config(config)


def test_saved_policies_and_missing_tasks(config) -> None:
    text = config.read_text()
    config.write_text(text.replace("[methods.meanpool]", 'policy = "saved"\n[methods.meanpool]'))
    evaluation = evaluate(config)
    assert [c.policy for c in evaluation.cells if c.method.label == "mine"] == ["saved"] * 3
    config.write_text(text[: text.index("[tasks.needle]")])
    with pytest.raises(ValueError, match=r"give at least one \[tasks.<name>\]; there are common_words"):
        read_config(config)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_config(config.with_name("other.toml"))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes" / "eval").glob("*.toml")), ids=str
)
def test_the_examples_can_be_read(path) -> None:
    settings = read_config(path)
    assert settings.methods[0].kind == "dense"
    assert len(settings.plans) >= 2
