#!/usr/bin/env bash
# torch.save(model.state_dict()) after accelerate.cpu_offload writes a file with every name and no weight, without a
# warning: the state dict's tensors are on the meta device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import os
import warnings

import accelerate
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, **more,
    )
    return LlamaForCausalLM(config).eval()


print("torch", torch.__version__, "accelerate", accelerate.__version__)
model = tiny()
torch.save(model.state_dict(), "before.pt")
accelerate.cpu_offload(model, execution_device="cpu")
with warnings.catch_warnings():
    warnings.simplefilter("error")
    torch.save(model.state_dict(), "after.pt")
sizes = [os.path.getsize(name) for name in ("before.pt", "after.pt")]
devices = {str(tensor.device) for tensor in torch.load("after.pt").values()}
with torch.no_grad():
    works = bool(torch.isfinite(model(torch.randint(0, 64, (1, 8))).logits).all())
print(f"the model still computes: {works}; saved before: {sizes[0]:,} bytes, after: {sizes[1]:,}; tensors on {devices}")
assert works and devices == {"meta"} and sizes[1] < sizes[0] / 2, "offloaded models save their weights now"
PYTHON
