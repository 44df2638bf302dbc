"""Gates for a model of your own: distil, save, load, use. By default a minute on the bundled model.

python examples/own_gates.py --model Qwen/Qwen3-0.6B --text book.txt --steps 200 --length 8192
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattention import attach, load_gates, new_gates, save_gates
from seerattention.hosts.transformers import dense
from seerattention.measure.bundled import TEACHER, TEXT
from seerattention.measure.perplexity import perplexity
from seerattention.train import DistillConfig, Distiller, TextWindows, read_tokens

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(TEACHER), help="hub id or folder")
parser.add_argument("--text", type=Path, nargs="+", default=[TEXT], help=".txt or .jsonl files")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--length", type=int, default=4096, help="tokens per step")
parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "own-gates")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
tokens = read_tokens(args.text, AutoTokenizer.from_pretrained(args.model))
training, held_out = tokens[: -args.length], tokens[-args.length :]

# The model is frozen: each gate learns its layer's attention map, layer by layer as the text goes through.
torch.manual_seed(0)
gates = new_gates(model, block_size=64)
batches = TextWindows(training, args.length)
for step in Distiller(model, gates, batches, DistillConfig(steps=args.steps)).run():
    print(f"step {step.step}: loss {step.loss:.3f}, recall of a tenth of the blocks {step.recall:.0%}")
save_gates(gates, args.out, policy="top_k:0.1,sink_blocks=1")

attach(model, load_gates(args.out), min_tokens=0)
sparse = perplexity(model, held_out, window=args.length, windows=1)
with dense(model):
    before = perplexity(model, held_out, window=args.length, windows=1)
print(f"perplexity of text not trained on: dense {before:.2f}, reading a tenth of the blocks {sparse:.2f}")
print(f"the gates are in {args.out}")
