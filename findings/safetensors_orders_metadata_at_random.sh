#!/usr/bin/env bash
# The same tensors and the same metadata saved by safetensors do not give the same bytes: entries of the metadata
# stand in a random order, so that a file's hash says nothing about its content.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import hashlib

import safetensors
import torch
from safetensors.torch import save

print("safetensors", safetensors.__version__)
tensors, metadata = {"w": torch.arange(4.0)}, {key: key for key in "abcdefgh"}
for about in ({"format": "pt"}, metadata):
    hashes = {hashlib.sha256(save(tensors, metadata=about)).hexdigest() for _ in range(20)}
    print(f"20 times saved with {len(about)} entries of metadata: {len(hashes)} different files")
assert len(hashes) > 10, "files are reproducible now"
PYTHON
