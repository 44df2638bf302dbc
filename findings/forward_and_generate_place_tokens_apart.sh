#!/usr/bin/env bash
# With a mask that has a hole, as batches of chats in several turns have, the same tokens and the same mask mean two
# things to transformers: forward counts positions over the hole, generate leaves it out.
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
model, ids, off = tiny(), torch.randint(3, 64, (1, 12)), {}
more = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
for name, hole in (("padding on the left", slice(0, 3)), ("a hole", slice(4, 7))):
    mask = torch.ones_like(ids)
    mask[0, hole] = 0
    with torch.no_grad():
        called = model(ids, attention_mask=mask).logits[:, -1]
        generated = model.generate(ids, attention_mask=mask, pad_token_id=0, **more).logits[0]
    off[name] = float((called - generated).abs().max())
    print(f"{name}: logits of up to {float(called.abs().max()):.1f} of the next token differ by {off[name]:.2g}")
assert off["padding on the left"] < 1e-3, "left padding alone matters now"
assert off["a hole"] > 0.5, "forward and generate agree now"
PYTHON
