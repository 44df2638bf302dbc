#!/usr/bin/env bash
# lm-evaluation-harness counts an answer to BABILong as right where the wanted word occurs anywhere in it, within other
# words too: "none" is right for "one", "I do not know" for "no", and a list of all rooms for any room. BABILong's own
# metric for its rooms wants the one answer alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm-eval==0.4.13 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks.babilong.common_utils import process_results

print("lm-eval", version("lm-eval"))
tasks = Path(lm_eval.__file__).parent / "tasks" / "babilong"
assert "process_results: !function common_utils.process_results" in (tasks / "_babilong_common_yaml").read_text()
rooms = "The bathroom, the bedroom, the garden, the hallway, the kitchen or the office."
cases = [
    ("qa7", "How many objects is Mary carrying?", "one", "none", 1),
    ("qa6", "Is Mary in the office?", "no", "I do not know.", 1),
    ("qa1", "Where is Mary?", "garden", rooms, 1),
    ("qa1", "Where is Mary?", "garden", "The hallway.", 0),
]
for task, question, wanted, answer, expected in cases:
    assert "include: _babilong_common_yaml" in (tasks / f"babilong_{task}.yaml").read_text()
    score = process_results({"question": question, "target": wanted}, [answer])["acc"]
    print(f"{task}: {question} wanted {wanted!r}, answered {answer!r}: accuracy {score:.0f}")
    assert score == expected, "answers are compared otherwise now"
PYTHON
