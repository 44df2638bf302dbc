#!/usr/bin/env bash
# Two models made of one configuration object share it: set_attn_implementation on the first changes which attention
# function the second one runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

calls = []


def counted(module, *args, **kwargs):
    calls.append(module)
    return sdpa_attention_forward(module, *args, **kwargs)



def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, **more,
    )
    return LlamaForCausalLM(config).eval()


print("transformers", transformers.__version__)
AttentionInterface.register("counted", counted)
first = tiny()
second = LlamaForCausalLM(first.config).eval()
first.set_attn_implementation("counted")
with torch.no_grad():
    second(torch.randint(0, 64, (1, 8)))
print("set on the first model; the second one's attention was called", len(calls), "times")
assert len(calls) == 2 and calls[0] is second.model.layers[0].self_attn, "models have their own attention now"
PYTHON
