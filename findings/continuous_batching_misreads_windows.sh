#!/usr/bin/env bash
# A model with a sliding window answers otherwise by generate_batch, transformers' continuous batching, than by generate:
# in 5.15.0, not in 5.16.0. Greedy, one request alone, prompt longer than the window.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/serve.py" <<'PYTHON'
import torch
import transformers
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
config = MistralConfig(vocab_size=256, num_key_value_heads=2, sliding_window=16, initializer_range=0.2, **shape)
model = MistralForCausalLM(config).eval()
prompt = torch.randint(3, 256, (60,)).tolist()
how = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
alone = model.generate(torch.tensor([prompt]), generation_config=how)[0, 60:].tolist()
(served,) = model.generate_batch([prompt], generation_config=how, progress_bar=False).values()
print("transformers", transformers.__version__)
print("  generate:      ", alone)
print("  generate_batch:", served.generated_tokens)
raise SystemExit(alone != served.generated_tokens)
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 psutil==7.2.2 transformers==5.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/serve.py" && { echo "5.15.0 reads windows right now"; exit 1; }
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.16.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/serve.py"
