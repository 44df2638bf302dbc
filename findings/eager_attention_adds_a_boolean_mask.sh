#!/usr/bin/env bash
# A 4-D boolean attention mask, True where a token may look, is obeyed by transformers' sdpa attention; its eager
# attention adds it to the scores, so that nothing is masked and tokens see those behind them, without a word.
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
ids = torch.randint(0, 64, (1, 12))
causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
off = {}
for kind in ("sdpa", "eager"):
    model = tiny()
    model.set_attn_implementation(kind)
    with torch.no_grad():
        plain, masked = model(ids).logits, model(ids, attention_mask=causal).logits
        changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 64], 1)
        early = (model(changed, attention_mask=causal).logits - masked)[:, 0]
    off[kind] = float((plain - masked).abs().max())
    print(f"{kind}: a causal mask of booleans changes logits of up to {float(plain.abs().max()):.1f} by {off[kind]:.2g};")
    print(f"    another last token changes the first token's logits by {float(early.abs().max()):.2g}")
assert off["sdpa"] < 1e-4, "sdpa no longer obeys the mask"
assert off["eager"] > 0.1 and float(early.abs().max()) > 0.01, "eager attention obeys boolean masks now"
PYTHON
