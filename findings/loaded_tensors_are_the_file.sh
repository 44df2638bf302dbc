#!/usr/bin/env bash
# Tensors of safetensors' load_file are the file itself, mapped: another checkpoint of the same size written over it
# in place, as rsync --inplace does, changes weights that were loaded before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
venv/bin/python - <<'PYTHON'
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

print("safetensors", safetensors.__version__)
save_file({"w": torch.zeros(100_000)}, "first")
save_file({"w": torch.ones(100_000)}, "second")
loaded = load_file("first")["w"]
before = float(loaded[:50_000].sum())
with open("first", "r+b") as file:
    file.write(Path("second").read_bytes())
after = float(loaded[:50_000].sum())
print(f"the loaded tensor's sum before and after other bytes were written into its file: {before:.0f}, {after:.0f}")
assert (before, after) == (0, 50_000), "loaded tensors are copies now"
PYTHON
