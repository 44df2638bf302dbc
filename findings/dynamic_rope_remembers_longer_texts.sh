#!/usr/bin/env bash
# What a model with RoPE of type dynamic answers depends on what it was asked before: the frequencies of the longest
# text stay in the module for every later text that is longer than the original length.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, **more,
    )
    return LlamaForCausalLM(config).eval()


print("transformers", transformers.__version__)
rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
model = tiny(max_position_embeddings=64, rope_parameters=rope)
longer, text, short = (torch.randint(0, 64, (1, n)) for n in (240, 100, 60))
with torch.no_grad():
    fresh = model(text).logits
    model(longer)
    after = float((model(text).logits - fresh).abs().max())
    model(short)
    reset = float((model(text).logits - fresh).abs().max())
print(f"100 tokens after 240 others: logits of up to {float(fresh.abs().max()):.1f} change by {after:.2g}")
print(f"and once 60 tokens, fewer than the original 64, were read: by {reset:.2g}")
assert after > 1, "a longer text no longer changes a later one"
assert reset < 1e-3, "a short text no longer resets the frequencies"
PYTHON
