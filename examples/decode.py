"""Prompt and answer sparse in one model, by one set of gates.

python examples/decode.py --tokens 4096 --budget 512
"""

import argparse

import torch

from seerattention import attach, detach
from seerattention.hosts.transformers import usage
from seerattention.measure.bundled import load_teacher, load_teacher_gates, text_tokens
from seerattention.measure.needle import NeedleTask

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
parser.add_argument("--budget", type=int, default=512, help="earlier tokens that each new one reads")
args = parser.parse_args()

model, tokenizer = load_teacher()
_, text = text_tokens(tokenizer)
document = NeedleTask(tokenizer, text).make(args.tokens, seed=0)
# Up to the first answer: a number that is hidden in the novel and asked for here.
prompt = torch.from_numpy(document.tokens[: document.answers[0][0]])[None]
print(f"{prompt.shape[1]} tokens of a novel; the number asked for is {document.values[0]}")


def answer() -> str:
    """Let the model write five digits."""
    out = model.generate(prompt, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(out[0, prompt.shape[1] :]).replace(" ", "")


print("dense:", answer())
attach(
    model,
    load_teacher_gates(),
    prefill="top_k:0.1,sink_blocks=1,dense_last_rows=2",
    decode=f"token_budget:{args.budget},sink_blocks=1",
    min_tokens=0,
)
print("sparse:", answer())
for how, count in usage(model).items():
    print(f"{count:6} layers {how}")
detach(model)
