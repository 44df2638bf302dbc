#!/usr/bin/env bash
# LongBench's score for code, as lm-evaluation-harness has it, compares the first line of an answer that holds none of
# "#", "//" and a backquote, to leave out comments. Floor division, web addresses and #include hold them too: then the
# very answer that is wanted scores 0, and with more lines behind it, the next line is compared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm-eval==0.4.13 jieba==0.42.1 fuzzywuzzy==0.18.0 rouge==1.0.1
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks.longbench.metrics import get_code_sim_score

print("lm-eval", version("lm-eval"))
tasks = Path(lm_eval.__file__).parent / "tasks" / "longbench"
for task in ("lcc", "repobench-p"):
    assert "process_results: !function metrics.get_code_sim_with_score" in (tasks / f"{task}.yaml").read_text()
cases = [
    ("    half = total / 2", "", 1),
    ("    half = total // 2", "", 0),
    ('    String site = "https://example.org/";', "", 0),
    ("#include <stdio.h>", "", 0),
    ("    half = total // 2", "\n    return half", None),
]
for wanted, more, expected in cases:
    score = get_code_sim_score({"answers": [wanted]}, [wanted + more])["code_sim_score"]
    print(f"wanted {wanted!r}, answered the same{' and a line more' * bool(more)}: {score:.2f}")
    assert score == expected if expected is not None else 0 < score < 1, "such lines are compared now"
PYTHON
