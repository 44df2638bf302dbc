"""A prompt longer than memory allows at once, then several questions about it on one KV cache.

python examples/chunked_prefill.py --tokens 8192 --piece 2048
"""

import argparse
import copy

import torch
from transformers import DynamicCache

from seerattention import attach, prefill
from seerattention.hosts.transformers import cache_argument, usage
from seerattention.measure.bundled import load_teacher, load_teacher_gates, text_tokens

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096)
parser.add_argument("--piece", type=int, default=1024, help="tokens per piece")
args = parser.parse_args()

model, tokenizer = load_teacher()
attach(model, load_teacher_gates(), "top_k:0.1,sink_blocks=1,dense_last_rows=2", min_tokens=0)
_, text = text_tokens(tokenizer)
book = torch.from_numpy(text[: args.tokens].copy()).long()[None]

# The pieces read the blocks that the whole would, and activations take the memory of one piece.
cache = DynamicCache(config=model.config)
last = prefill(model, book, cache, piece_tokens=args.piece, logits_to_keep=1).logits
print(f"{cache.get_seq_length()} tokens cached; next: {tokenizer.decode(last[0, -1].argmax())!r}")

# A prefix is computed once: each question goes on from a copy of the cache, summaries of its blocks included.
for question in ("\n\nMrs. Wilkins said:", "\n\nThe garden was"):
    new = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
    kept = cache_argument(model, copy.deepcopy(cache))
    out = model.generate(torch.cat([book, new], 1), **kept, max_new_tokens=12, do_sample=False)
    print(f"{question.strip()} ...{tokenizer.decode(out[0, book.shape[1] + new.shape[1] :])!r}")

# A cache may be cut anywhere. Summaries of blocks that are still whole are kept, others are made again.
cache.crop(-300)
prefill(model, book[:, -300:], cache, logits_to_keep=1)
for how, count in usage(model).items():
    print(f"{count:6} layers {how}")
