#!/usr/bin/env bash
# A causal model of transformers that is called with use_cache=False and without an attention mask takes every jump in
# position_ids for the start of another text, and what is behind it sees nothing before it. With a cache, which is the
# default, or with a mask of ones it sees everything. Training with skipped positions (PoSE) has such jumps in one text.
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

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
model = LlamaForCausalLM(config).double().eval()
ids = torch.randint(3, 64, (1, 16))
skips = torch.cat([torch.arange(8), torch.arange(1000, 1008)])[None]
calls = {
    "a cache": {},
    "no cache": {"use_cache": False},
    "no cache, a mask of ones": {"use_cache": False, "attention_mask": torch.ones_like(ids)},
}
with torch.no_grad():
    read = {name: model(ids, position_ids=skips, labels=ids, **more) for name, more in calls.items()}
    alone = model(ids[:, 8:], position_ids=skips[:, 8:], use_cache=False).logits
off = {name: float((one.logits - read["a cache"].logits).abs().max()) for name, one in read.items()}
for name, one in read.items():
    print(f"{name}: loss {float(one.loss):.3f}, logits differ from those with a cache by {off[name]:.2g}")
lost = float((read["no cache"].logits[:, 8:] - alone).abs().max())
print(f"no cache: behind the jump logits differ from those of that part alone by {lost:.2g}")
assert off["no cache, a mask of ones"] < 1e-9, "a mask of ones changes what is read"
assert off["no cache"] > 1 and lost < 1e-9, "a jump in positions no longer ends a text"
PYTHON
