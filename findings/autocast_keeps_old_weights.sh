#!/usr/bin/env bash
# Within one autocast block, a weight that changes is not seen: autocast casts a parameter that requires a gradient
# once and goes on with the copy. A frozen parameter's change is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

print("torch", torch.__version__)
changes = {}
for learns in (True, False):
    layer, x = torch.nn.Linear(8, 8, bias=False).requires_grad_(learns), torch.ones(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with torch.no_grad():
            layer.weight.zero_()
        changes[learns] = float((layer(x) - before).abs().max().detach())
    outside = float(layer(x).abs().max().detach())
    what = "that learns" if learns else "that is frozen"
    print(f"a weight {what} set to zero: the output changes by {changes[learns]:.2g}; after the block it is {outside}")
assert changes[True] == 0, "autocast sees new weights now"
assert changes[False] > 0, "frozen weights are kept too now"
PYTHON
