#!/usr/bin/env bash
# Under bfloat16 autocast an attention function of transformers gets queries and keys in float32 and values in
# bfloat16, since rotating promotes them; the KV cache then keeps keys at twice the size of values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

seen = []


def look(module, query, key, value, *args, **kwargs):
    seen.append((query.dtype, key.dtype, value.dtype))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)



def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, **more,
    )
    return LlamaForCausalLM(config).eval()


print("torch", torch.__version__, "transformers", transformers.__version__)
AttentionInterface.register("look", look)
model, cache = tiny(), DynamicCache()
model.set_attn_implementation("look")
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    model(torch.randint(0, 64, (1, 8)), cache=cache)
kept = cache.layers[0].keys.dtype, cache.layers[0].values.dtype
print("query, key, value:", *seen[0])
print("in the cache, keys and values:", *kept)
assert seen[0] == (torch.float32, torch.float32, torch.bfloat16), "attention gets other precisions now"
assert kept == (torch.float32, torch.bfloat16), "the cache keeps other precisions now"
PYTHON
