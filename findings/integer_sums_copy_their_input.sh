#!/usr/bin/env bash
# PyTorch adds up integers and booleans only after it has written all of them down as int64: the sum of a mask needs
# eight times the mask's memory. Words of 64 bits, the same bytes, are added up where they lie.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - 2> said <<'PYTHON' || { cat said; exit 1; }
import torch
from torch.profiler import ProfilerActivity, profile

print("torch", torch.__version__)
keys = torch.ones(8, 4096, 128, dtype=torch.int16)
for name, x in {
    "bool": keys.bool(), "int16": keys, "int32": keys.int(), "int16 as words of 64 bits": keys.view(torch.int64)
}.items():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        x.sum(-1)
    copied = sum(event.cpu_memory_usage for event in seen.events() if event.name == "aten::_to_copy")
    print(f"  {name}: {x.nbytes:,} bytes, and copies of {copied:,}")
    assert copied == (0 if x.dtype == torch.int64 else 8 * x.numel()), "sums are made in another way now"
PYTHON
