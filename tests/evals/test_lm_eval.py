"""lm-evaluation-harness with attached gates: a real run on local data by its own command line."""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from seerattention.evals import lm_eval, tasks
from seerattention.evals.lm_eval import SeerAttentionLM
from seerattention.evals.tasks import Source, generate
from seerattention.hosts.transformers import attach, detach, new_gates, save_calibration, save_gates
from seerattention.measure import bundled
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import hidden_states, next_token_losses
from seerattention.policies import Calibrated, Calibration

POLICY = "top_k:0.2,sink_blocks=1"
NEW_TOKENS = 6
TASKS = {
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "needles": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def teacher():
    return bundled.load_teacher()


@pytest.fixture(scope="module")
def documents(teacher):
    """Samples of both tasks, of different lengths so that batches are padded."""
    tokenizer = teacher[1]
    source = Source(tokenizer, [bundled.text_tokens(tokenizer)[1]])
    needle = tasks.create("needle", needles=2)
    rows = {"likelihood": [], "needles": []}
    for seed, length in enumerate((513, 705, 321)):
        text = tokenizer.decode(source.haystack[1000 * seed : 1000 * seed + length])
        # lm-eval leaves the last token out, which would be one less in its block but for whole ones before.
        assert len(tokenizer.encode(text)) == length
        context, *words = text.rsplit(" ", 12)
        rows["likelihood"].append({"context": context, "continuation": " " + " ".join(words)})
        # Up to where the first answer begins.
        document = needle.make(source, length, seed).document
        context = tokenizer.decode(document.tokens[: document.query_positions[0] + 1])
        rows["needles"].append({"context": context, "continuation": document.values[0]})
    return rows


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory):
    """Tasks as lm-eval reads them."""
    path = tmp_path_factory.mktemp("tasks")
    for name, rows in documents.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(path / f"{name}.jsonl")}, "cache_dir": str(path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(task | TASKS[name]))
    return path


@pytest.fixture(scope="module")
def expected(teacher, documents):
    """Log-likelihoods and answers of this project's own evaluation, dense and sparse, and the density."""
    model, tokenizer = teacher
    found = {}
    for name in ("dense", "sparse"):
        watch = Watch()
        if name == "sparse":
            attach(model, bundled.load_teacher_gates(), POLICY, min_tokens=0, observe=watch)
        likelihoods, answers = [], []
        for row in documents["likelihood"]:
            whole = np.array(tokenizer.encode(row["context"] + row["continuation"]))
            count = len(whole) - len(tokenizer.encode(row["context"]))
            likelihoods.append(-float(next_token_losses(model, whole)[-count:].double().sum()))
        watch.reset()
        for row in documents["likelihood"]:
            hidden_states(model, np.array(tokenizer.encode(row["context"] + row["continuation"])[:-1]))
        for row in documents["needles"]:
            tokens, _, _ = generate(model, np.array(tokenizer.encode(row["context"])), NEW_TOKENS)
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0].strip())
        found[name] = likelihoods, answers, watch.density
        if name == "sparse":
            detach(model)
    return found


def run(monkeypatch, folder, out, *more):
    """Run the command line, and return its results file and its samples by task."""
    arguments = ["--model", "seerattention", "--tasks", "likelihood,needles", "--include_path", folder]
    arguments += ["--output_path", out, "--log_samples", "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *map(str, arguments)])
    # Reading lm-eval's own 14,000 task files would take longer than all the rest.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    lm_eval.main()
    (results,) = out.rglob("results_*.json")
    samples = {
        name: [
            json.loads(line) for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        ]
        for name in TASKS
    }
    return json.loads(results.read_text()), samples


@pytest.mark.parametrize(
    ("name", "arguments", "more"),
    [
        ("dense", "gates=none", ("--batch_size", 1)),
        ("sparse", f"gates=bundled,policy='{POLICY}'", ("--batch_size", 3)),
    ],
)
def test_a_run_agrees_with_this_projects_own(
    name, arguments, more, folder, documents, expected, tmp_path, monkeypatch
):
    results, samples = run(
        monkeypatch, folder, tmp_path, "--model_args", f"pretrained=bundled,dtype=float32,{arguments}", *more
    )
    likelihoods, answers, density = expected[name]
    assert [row["doc"] for row in samples["likelihood"]] == documents["likelihood"]
    found = [float(row["filtered_resps"][0][0]) for row in samples["likelihood"]]
    # Sums of some fifteen logarithms in single precision, padded or not.
    assert found == pytest.approx(likelihoods, abs=1e-3)
    assert [row["filtered_resps"][0].strip() for row in samples["needles"]] == answers
    if name == "dense":
        assert [row["continuation"] for row in documents["needles"]] == answers
    config = results["config"]
    assert config["policy"] == ("dense" if name == "dense" else POLICY)
    assert config["density"] == pytest.approx(density)
    assert (density == 1) == (name == "dense")


@pytest.fixture(scope="module")
def other_gates(teacher, tmp_path_factory):
    """Gates for a model of the same shape and other weights, without a policy."""
    other = LlamaForCausalLM(teacher[0].config)
    folder = tmp_path_factory.mktemp("gates") / "other"
    save_gates(new_gates(other), folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": ""}, "model_args must name the model: pretrained=<folder or hub id>"),
        ({"gates": ""}, "name the gates: gates=<folder or hub id>, or gates=none for dense attention"),
        ({"gates": "no/such/folder"}, "no/such/folder"),
        ({"gates": "none", "density": 0.1}, "gates=none is dense attention, which has no policy or density"),
        ({"policy": "top_q:0.1"}, "unknown policy 'top_q:0.1'; write one of calibrated, threshold:<value>"),
        (
            {"policy": "calibrated"},
            "the policy calibrated needs gates that were calibrated",
        ),
        ({"policy": "threshold:1e-3", "density": 0.1}, "give policy or density, not both"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": "few"}, "density in policy 'top_k:few,sink_blocks=1' must be a number, got 'few'"),
        ({"batch_size": "auto"}, "batch_size must be a number with the model seerattention, got 'auto'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_the_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr(lm_eval.HFLM, "__init__", lambda *a, **k: pytest.fail("loaded the model"))
    given = {"pretrained": "bundled", "gates": "bundled", **arguments}
    with pytest.raises((ValueError, OSError), match=message):
        SeerAttentionLM(**given)


def test_gates_of_another_model_or_without_a_policy_are_refused(other_gates):
    given = {"pretrained": "bundled", "gates": str(other_gates), "device": "cpu"}
    with pytest.raises(ValueError, match="saved without a policy; give density="):
        SeerAttentionLM(**given)
    with pytest.raises(ValueError, match=r"these gates were made for .*distil gates for this one"):
        SeerAttentionLM(**given, density=0.1)


def test_policies_are_chosen_by_name_or_saved_with_the_gates(documents, tmp_path):
    gates = bundled.load_teacher_gates()
    save_gates(gates, tmp_path / "gates")
    laws = {layer: (((-30.0, 0.0, 0.0),) * 3 + ((0.0, 0.0, 0.0),) * 3) for layer, _ in gates.items()}
    half = Calibration("recall", 0.9, 4096, (64, 64), 0.0, None, laws)
    save_calibration(tmp_path / "gates", Calibrated(half))
    given = {"gates": str(tmp_path / "gates"), "device": "cpu", "dtype": "float32"}
    lm = SeerAttentionLM("bundled", **given)
    tokens = lm.tok_encode(documents["likelihood"][0]["context"])[:385]
    found = {}
    for policy in (None, "calibrated", "threshold:0.9999"):
        if policy is not None:
            detach(lm.model)
            lm = SeerAttentionLM(
                lm.model, gates=str(tmp_path / "gates"), policy=policy, tokenizer=lm.tokenizer
            )
        lm._loglikelihood_tokens([(None, tokens[:-1], tokens[-1:])], disable_tqdm=True)
        info = lm.get_model_info()
        assert info["attention_calls"] == {"sparse": 8}
        found[info["policy"]] = info["density"]
    # Of six rows of blocks: three heads read all, three their own; no share is as good as all but alone.
    own = 6 / 21
    assert found == pytest.approx({"calibrated": (1 + own) / 2, "threshold:0.9999": own})


def test_an_answer_does_not_depend_on_its_batch_or_on_how_often_it_is_asked(documents):
    """Choices of one token share a run; rows of a batch have as many tokens as they have."""
    lm = SeerAttentionLM("bundled", gates="bundled", density=0.2, device="cpu", batch_size=4, dtype="float32")
    contexts = [lm.tok_encode(row["context"]) for row in documents["likelihood"][::2]]
    requests = [(None, context, choice) for context in contexts for choice in ([17], [40], [9, 11, 40])]
    together = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for request, (likelihood, greedy) in zip(requests, together, strict=True):
        (alone,) = lm._loglikelihood_tokens([request], disable_tqdm=True, override_bs=1)
        assert likelihood == pytest.approx(alone[0], abs=1e-3)
        assert greedy == alone[1]
