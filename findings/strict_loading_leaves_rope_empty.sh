#!/usr/bin/env bash
# A model that is made on the meta device, given memory by to_empty and loaded with strict=True reports that all keys
# matched, but its rotary frequencies are whatever was in memory: the buffer is not in the state dict.
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


print("torch", torch.__version__, "transformers", transformers.__version__)
model = tiny()
with torch.device("meta"):
    other = LlamaForCausalLM(model.config)
other.to_empty(device="cpu")
with torch.no_grad():
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.zero_()  # else it is what the memory held before, by chance
print(other.load_state_dict(model.state_dict(), strict=True))
right, got = (m.model.rotary_emb.inv_freq for m in (model, other.eval()))
ids = torch.randint(0, 64, (1, 40))
with torch.no_grad():
    off = float((model(ids).logits - other(ids).logits).abs().max())
print("inverse frequencies should be", right[:3].tolist(), "and are", got[:3].tolist())
print("logits differ by", off)
assert not torch.equal(right, got), "the frequencies are there now"
assert not off < 1e-3, "the logits are right now"
PYTHON
