#!/usr/bin/env bash
# A Reformer of transformers that is made causal (is_decoder=True) looks at no later token in its LSH attention, yet
# later tokens decide which earlier ones meet in a chunk: another last token changes the outputs of tokens before it,
# and with them a perplexity. With local attention alone nothing changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import ReformerConfig, ReformerModelWithLMHead

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16}
places = {"axial_pos_embds": False, "max_position_embeddings": 256, "initializer_range": 0.3}
chunks = {"lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "num_buckets": 8, "num_hashes": 2}
changes = {}
for kind in ("local", "lsh"):
    torch.manual_seed(0)
    config = ReformerConfig(
        **sizes, **places, **chunks, feed_forward_size=48, is_decoder=True, hash_seed=1, attn_layers=[kind]
    )
    model = ReformerModelWithLMHead(config).double().eval()
    ids = torch.randint(3, 64, (1, 128))
    other = torch.cat([ids[:, :-1], 3 + (ids[:, -1:] - 2) % 61], 1)
    with torch.no_grad():
        logits = model(ids).logits
        again = float((model(ids).logits - logits).abs().max())
        moved = (model(other).logits - logits)[0, :-1].abs().amax(-1)
    changes[kind] = int((moved > 1e-6).sum())
    most = float(moved.max())
    print(f"{kind}: another token 128 changes logits of {changes[kind]} of the 127 before it, by up to {most:.2g};")
    print(f"    the same tokens once more change them by {again:.2g}")
    assert again == 0, "two equal calls differ"
assert changes["local"] == 0, "local attention depends on later tokens"
assert changes["lsh"] > 10, "LSH attention no longer depends on later tokens"
PYTHON
