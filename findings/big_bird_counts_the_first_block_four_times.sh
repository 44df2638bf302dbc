#!/usr/bin/env bash
# BigBird's block-sparse attention of transformers draws random blocks in training only. In evaluation it reads the
# first block in the place of each, beside the first block that every token reads anyhow: softmax counts it once and
# num_random_blocks times more. The attention weights that the model returns count it once, and do not add up to 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import BigBirdConfig, BigBirdModel

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "block_size": 16}
undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
model = BigBirdModel(BigBirdConfig(**sizes, **undropped, num_attention_heads=2), add_pooling_layer=False)
attention = model.encoder.layer[0].attention.self
for part in (attention.query, attention.key):  # All scores are 0, so that all blocks that are read weigh the same.
    torch.nn.init.zeros_(part.weight)
first = torch.zeros(1, 256, 32)
first[:, :16] = 1  # With these values, what comes out is the weight of the first block.
attention.value.register_forward_hook(lambda module, given, values: first)
out = []
attention.register_forward_hook(lambda module, given, result: out.append(result[0]))
ids = torch.randint(3, 128, (1, 256))
with torch.no_grad():
    for training in (True, False):
        returned = model.train(training)(ids, output_attentions=True).attentions[0]
shares = [float(one[0, 128, 0]) for one in out]
config = model.config
print(f"{config.num_random_blocks} random blocks and 5 others; the first block's weight in the middle of 16 blocks:")
print(f"    in training {shares[0]:.3f}, in evaluation {shares[1]:.3f};")
said, total = float(returned[0, 0, 128, :16].sum()), float(returned[0, 0, 128].sum())
print(f"    in the weights that evaluation returns {said:.3f}, of a total of {total:.3f}")
assert abs(shares[0] - 1 / 8) < 1e-5, "training counts the first block otherwise now"
assert abs(shares[1] - 4 / 8) < 1e-5, "evaluation counts the first block once now"
assert abs(said - 1 / 8) < 1e-5 and abs(total - 5 / 8) < 1e-5, "returned weights are those of the attention now"
PYTHON
