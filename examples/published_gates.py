"""Prefill a long text with gates in the published format, and say what was read.

python examples/published_gates.py BASE_MODEL GATES book.txt
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattention import attach, load_gates
from seerattention.hosts.transformers import usage
from seerattention.measure.observe import Watch

parser = argparse.ArgumentParser()
parser.add_argument("model", help="base model, such as meta-llama/Llama-3.1-8B-Instruct")
parser.add_argument("gates", help="such as SeerAttention/SeerAttention-Llama-3.1-8B-AttnGates")
parser.add_argument("text", type=Path, help="a text file")
parser.add_argument(
    "--policy", help='default: the one in the settings, else "threshold:5e-4,dense_last_rows=2"'
)
parser.add_argument("--tokens", type=int, default=16384, help="how much of the text to read")
parser.add_argument("--new-tokens", type=int, default=50)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)

# The file is a pickle: only tensors are read, and one with anything else in it is refused unexecuted.
gates = load_gates(args.gates)
policy = args.policy or gates.policy or "threshold:5e-4,dense_last_rows=2"
watch = Watch()
attach(model, gates, policy, observe=watch)

ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[:, : args.tokens].to(device)
out = model.generate(ids, max_new_tokens=args.new_tokens, do_sample=False)
print(tokenizer.decode(out[0, ids.shape[1] :]))
print(f"{ids.shape[1]} tokens, policy {policy}, {watch.density:.1%} of the blocks read")
for how, count in usage(model).items():
    print(f"{count:6} {how}")
