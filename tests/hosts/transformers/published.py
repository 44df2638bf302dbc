"""Gates in the published layout, as tests write them: settings, and random weights in its keys and shapes."""

import json
import math

import torch

HEADS, KV_HEADS, DIM, LAYERS, BLOCK, THETA = 4, 2, 16, 2, 16, 10000.0
KEY = "model.layers.{}.self_attn.attn_gate.{}.weight"
DTYPES = [torch.float32, torch.bfloat16]
#: Pools of q, gate dimension, force_double.
PREFILL = {
    "default": ("Qavg_Kmaxminavg", DIM, False),
    "two-q-pools": ("Qmaxmin_Kmaxminavg", DIM, False),
    "other-gate-dim": ("Qavg_Kmaxminavg", 24, False),
    "forced": ("Qavg_Kmaxavg", DIM, True),
}
#: Pools of k, gate dimension, whether summaries are normalised.
DECODE = {
    "default": ("Kmaxminavg", DIM, True),
    "other-gate-dim": ("Kmaxminavg", 24, True),
    "two-k-pools-no-norm": ("Kmaxavg", DIM, False),
}


def settings(**changes):
    """What the published code writes into config.json: the base model's configuration and more."""
    config = {
        "base_model": "someone/Tiny-Llama",
        "model_type": "llama",
        "hidden_size": HEADS * DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rope_theta": THETA,
        "vocab_size": 97,
        "seerattn_gate_block_size": BLOCK,
        "seerattn_gate_hidden_size": DIM,
        "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 5e-4,
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not ...}


def prefill(design="default", **changes):
    gate_type, dim, force = PREFILL[design]
    return settings(
        seerattn_gate_type=gate_type,
        seerattn_gate_hidden_size=dim,
        seerattn_gate_force_double=force,
        seerattn_nz_ratio=1.0,
        seerattn_last_block_dense=True,
        **changes,
    )


def decode(design="default", **changes):
    pools, dim, normed = DECODE[design]
    return settings(
        seerattn_k_seq_pooling_type=pools,
        seerattn_q_head_pooling_type="Qproj",
        seerattn_gate_hidden_size=dim,
        seerattn_use_qk_norm=normed,
        **changes,
    )


def pools_of(text):
    return [name for name in ("max", "min", "avg") if name in text]


def weights_of(config, dtype=torch.float32):
    """Random weights in the published keys and shapes."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-2])).to(dtype)

    dim, weights = config["seerattn_gate_hidden_size"], {}
    for layer in range(config["num_hidden_layers"]):
        if "seerattn_gate_type" in config:
            q_pools, k_pools = map(pools_of, config["seerattn_gate_type"].split("_"))
            double = len(q_pools) > 1 or dim != DIM or config["seerattn_gate_force_double"]
            if double:
                weights[KEY.format(layer, "mask_linear_q")] = random(HEADS, len(q_pools) * DIM, dim)
            heads = KV_HEADS if double else HEADS
            weights[KEY.format(layer, "mask_linear_k")] = random(heads, len(k_pools) * DIM, dim)
            continue
        k_width = len(pools_of(config["seerattn_k_seq_pooling_type"])) * DIM
        weights[KEY.format(layer, "attngate_linear_q")] = random(KV_HEADS, HEADS // KV_HEADS, DIM, dim)
        weights[KEY.format(layer, "attngate_linear_k")] = random(KV_HEADS, k_width, dim)
        if config["seerattn_use_qk_norm"]:
            weights[KEY.format(layer, "attngate_qnorm")] = 1 + random(1, dim)[0] / 4
            weights[KEY.format(layer, "attngate_knorm")] = 1 + random(1, dim)[0] / 4
    return weights


def write(folder, config, weights=None, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = weights_of(config, dtype) if weights is None else weights
    torch.save(weights, folder / "attn_gate_weights.pth")
    return folder
