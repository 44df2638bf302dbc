#!/usr/bin/env bash
# lm-evaluation-harness' use_cache keeps answers by the request alone: a second model with the same file is never
# asked and gets the first one's score, as dense and sparse attention would.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm-eval==0.4.13
cd "$folder"
HF_HOME=$folder/home HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Says(LM):
    tokenizer_name = "none"

    def __init__(self, word):
        super().__init__()
        self.word, self.asked = word, 0

    def generate_until(self, requests, **more):
        self.asked += len(requests)
        return [self.word for _ in requests]

    def loglikelihood(self, requests, **more):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


rows = [json.dumps({"question": f"question {i}", "answer": "right"}) for i in range(4)]
Path("rows.jsonl").write_text("\n".join(rows))
Path("task.yaml").write_text(
    """task: tiny
dataset_path: json
dataset_kwargs:
  data_files: rows.jsonl
test_split: train
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
tasks, found = TaskManager(include_path=".", include_defaults=False), {}
for word in ("right", "wrong"):
    model = Says(word)
    more = {"tasks": ["tiny"], "task_manager": tasks, "use_cache": "answers", "bootstrap_iters": 0}
    score = lm_eval.simple_evaluate(model, **more)["results"]["tiny"]["exact_match,none"]
    found[word] = model.asked, score
    print(f"a model that always says {word!r} was asked {model.asked} of 4 questions and scores {score}")
assert found == {"right": (4, 1.0), "wrong": (0, 1.0)}, "answers are kept by model now"
PYTHON
