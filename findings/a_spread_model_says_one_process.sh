#!/usr/bin/env bash
# A model that transformers 5.16.0 spreads over two processes by tensor parallelism holds half of every layer's heads
# in each, and its `tp_size`, by which code asks whether it is spread, is None; 5.15.0 and 5.17.0 say 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat > spread.py <<'PYTHON'
import sys

import torch
import transformers
from torch import distributed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

distributed.init_process_group("gloo")
rank = distributed.get_rank()
if rank == 0:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained("model")
distributed.barrier()
model = AutoModelForCausalLM.from_pretrained("model", distributed_config=DistributedConfig(tp_size=2)).eval()
weight = model.model.layers[0].self_attn.q_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
with torch.no_grad():
    model(torch.arange(8)[None])
if rank == 0:
    print(f"transformers {transformers.__version__}: tp_size {model.tp_size}, {len(local)} of q_proj's 32 rows here")
    assert len(local) == 16, "the model is not spread"
    expected = None if sys.argv[1] == "None" else int(sys.argv[1])
    assert model.tp_size == expected, f"tp_size is {model.tp_size} now"
distributed.barrier()
distributed.destroy_process_group()
PYTHON
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
for pair in 5.15.0:2 5.16.0:None 5.17.0:2; do
  venv/bin/pip install --quiet --disable-pip-version-check "transformers==${pair%:*}"
  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/torchrun --standalone --nproc-per-node 2 spread.py "${pair#*:}" 2>&1 | grep -v -i "warn\|Loading\|Writing" || exit 1
done
