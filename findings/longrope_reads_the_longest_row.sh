#!/usr/bin/env bash
# A row of a padded batch gets other logits when a neighbour is longer: with RoPE of type longrope transformers picks
# short or long factors by the largest position of the whole batch, for all its rows.
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


rope = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
}
print("transformers", transformers.__version__)
model = tiny(max_position_embeddings=256, rope_parameters=rope)
found = {}
for length in (60, 80):
    row, neighbour = torch.randint(1, 64, (1, 50)), torch.randint(1, 64, (1, length))
    padded = torch.cat([row, torch.zeros(1, length - 50, dtype=torch.long)], 1)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 50:] = 0
    with torch.no_grad():
        alone = model(row).logits[0]
        batched = model(torch.cat([padded, neighbour]), attention_mask=mask).logits[0, :50]
    found[length] = float((alone - batched).abs().max())
    print(f"50 tokens beside {length}: logits of up to {float(alone.abs().max()):.1f} change by {found[length]:.2g}")
assert found[60] < 1e-3, "even a neighbour within the original length matters now"
assert found[80] > 1, "a longer neighbour no longer changes a row"
PYTHON
