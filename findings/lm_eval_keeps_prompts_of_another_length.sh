#!/usr/bin/env bash
# lm-evaluation-harness' cache_requests keeps prompts by the task's name and not by its metadata: a task asked for
# longer prompts, as RULER is by max_seq_lengths, gets the short ones of before, and reports the new length.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm-eval==0.4.13
cd "$folder"
HF_HOME=$folder/home HF_HUB_OFFLINE=1 LM_HARNESS_CACHE_PATH=$folder/requests venv/bin/python - <<'PYTHON'
from pathlib import Path

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Listens(LM):
    tokenizer_name = "none"

    def generate_until(self, requests, **more):
        self.words = {len(request.args[0].split()) for request in requests}
        return ["" for _ in requests]

    def loglikelihood(self, requests, **more):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


Path("prompts.py").write_text(
    """import datasets


def make(words, **others):
    rows = [{"question": " ".join(["word"] * words), "answer": "none"} for _ in range(4)]
    return {"test": datasets.Dataset.from_list(rows)}
"""
)
Path("task.yaml").write_text(
    """task: tiny
custom_dataset: !function prompts.make
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["."]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
)
print("lm-eval", lm_eval.__version__)
got = {}
for words in (10, 1000):
    tasks, model = TaskManager(include_path=".", include_defaults=False, metadata={"words": words}), Listens()
    more = {"tasks": ["tiny"], "task_manager": tasks, "cache_requests": True, "bootstrap_iters": 0}
    said = lm_eval.simple_evaluate(model, **more)["configs"]["tiny"]["metadata"]["words"]
    got[words] = model.words
    print(f"asked for prompts of {words} words; the results say {said}, the model got prompts of {model.words}")
assert got == {10: {10}, 1000: {10}}, "prompts are kept by length now"
PYTHON
