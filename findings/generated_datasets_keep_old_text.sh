#!/usr/bin/env bash
# Dataset.from_generator returns the rows of the first time for ever: they are cached by the generator's code, so that
# a text file which it reads may change without effect, and training goes on with the old text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$folder"
HF_HOME=$folder/home HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
from pathlib import Path

import datasets
from datasets import Dataset

datasets.disable_progress_bars()


def rows():
    for line in Path("text.txt").read_text().splitlines():
        yield {"text": line}


print("datasets", datasets.__version__)
Path("text.txt").write_text("old\n")
first = Dataset.from_generator(rows)["text"][:]
Path("text.txt").write_text("new\nnew too\n")
second = Dataset.from_generator(rows)["text"][:]
print("the file had ['old'] and got", first, "- then it had ['new', 'new too'] and got", second)
assert first == second == ["old"], "the text is read again now"
PYTHON
