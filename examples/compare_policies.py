"""Policies, and other ways to rank blocks, on one loaded model: what each reads and what that costs.

python examples/compare_policies.py --tokens 8192
"""

import argparse

from seerattention import add_gates, attach, baselines, dense, set_gates, set_policy
from seerattention.measure.bundled import load_teacher, load_teacher_gates, text_tokens
from seerattention.measure.observe import Watch
from seerattention.measure.perplexity import perplexity

POLICIES = [
    "top_k:0.1,sink_blocks=1",  # a tenth of the map
    "token_budget:512",  # the same for every row, whatever the length
    "threshold:3e-3",  # what a row needs: density adapts to text and head
    "top_p:0.9",  # the blocks that hold 90 % of the gate's softmax
]

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096)
args = parser.parse_args()

# With a model of your own: from_pretrained and load_gates.
model, tokenizer = load_teacher()
_, text = text_tokens(tokenizer)
watches = [Watch()]
# min_tokens=0: sparse at any length, also where dense is faster.
attach(
    model,
    load_teacher_gates(),
    POLICIES[0],
    name="gates",
    min_tokens=0,
    observe=lambda *seen: watches[-1](*seen),
)
add_gates(model, "quest", baselines.create("quest"))


def row(name: str) -> None:
    """Print one line of the comparison."""
    watches.append(watch := Watch(rows=16))
    loss = perplexity(model, text, window=args.tokens, windows=1)
    print(f"{name:<32} density {watch.density:6.1%}  recall {watch.recall:6.1%}  perplexity {loss:.2f}")


with dense(model):
    row("dense")
for name in ("gates", "quest"):
    for policy in POLICIES if name == "gates" else POLICIES[:2]:
        set_gates(model, name)
        set_policy(model, policy)
        row(f"{name} {policy}")
