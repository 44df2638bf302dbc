#!/usr/bin/env bash
# Greedy generation with prompt lookup writes what greedy generation writes, unless the beginning of the prompt is in
# the KV cache already: then it writes something else, without a warning. Greedy alone goes on from the same cache rightly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).double().eval()
prompt, found = torch.randint(3, 64, (1, 40)), {}
for lookup in (None, 4):
    for cached in (0, 30):
        cache = DynamicCache(config=model.config)
        if cached:
            with torch.no_grad():
                model(prompt[:, :cached], cache=cache, use_cache=True)
        told = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(prompt, cache=cache, prompt_lookup_num_tokens=lookup, **told)
        found[lookup, cached] = out[0, 40:].tolist()
        print(f"prompt lookup {lookup or 'off'}, {cached} of 40 tokens cached:", *found[lookup, cached])
assert found[None, 0] == found[None, 30] == found[4, 0], "greedy generation itself has changed"
assert found[4, 30] != found[None, 0], "a filled cache changes nothing now"
PYTHON
