#!/usr/bin/env bash
# accelerate's prepare with mixed_precision="bf16" wraps the forward of the outermost module: whatever calls an inner
# one, such as model.get_decoder(), computes in float32 without notice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import accelerate
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, **more,
    )
    return LlamaForCausalLM(config).eval()


print("accelerate", accelerate.__version__)
seen = []
model = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny())
model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
ids = torch.randint(0, 64, (1, 8))
model(ids)
model.get_decoder()(ids)
print("products within model(ids):", seen[0], "- within model.get_decoder()(ids):", seen[1])
assert seen == [torch.bfloat16, torch.float32], "inner modules are prepared alike now"
PYTHON
